"""Which clips of a file an encoder is shown: their times and their crop, as rows that the pipeline's decoder takes.

A file gives one clip, from its middle, or with `every_s` sliding windows from its first frame on; an image gives one
frame. The square in the middle is shown, or the whole picture where training squeezed it to a square.
"""

from dataclasses import dataclass
from typing import Self

import polars as pl

from nextvid.config.datasets import ClipPolicy
from nextvid.corpus.cutting import MICROSECONDS, ROUNDING_US, ShotScores, clip_id, clips_of, row_id, views
from nextvid.video.probe import Inspection
from nextvid.video.quality import Box
from storage.errors import ConfigError, MediaError
from storage.schemas import Clips

DECODED = ("row_id", "media_id", "uri", "decoder", "times_us", "crop_x", "crop_y", "crop_w", "crop_h", "flip")


@dataclass(frozen=True)
class Windows:
    """How clips are taken from a file."""

    policy: ClipPolicy
    every_s: float | None = None  # seconds between the beginnings of sliding windows; None is one clip
    stills: bool = True  # whether images are taken: not where a stride was asked for, since they have no rate

    @classmethod
    def of(
        cls,
        trained: ClipPolicy | None,
        frames: int | None = None,
        fps: float | None = None,
        stride: int | None = None,
        every_s: float | None = None,
    ) -> Self:
        """As trained, with what is given in its place. Raises ConfigError."""
        if trained is None and (frames is None or (fps is None and stride is None)):
            raise ConfigError("this encoder was exported without its clips: give frames, and fps or stride")
        if fps is not None and stride is not None:
            raise ConfigError(f"fps {fps:g} and stride {stride}: give one of them")
        if min(frames or 1, stride or 1) < 1 or min(fps or 1, 1 if every_s is None else every_s) <= 0:
            raise ConfigError(f"frames {frames}, fps {fps}, stride {stride}, every {every_s} s: all must be above 0")
        rate = {"fps": fps, "stride": stride}
        if fps is None and stride is None:
            assert trained is not None
            rate = {"fps": trained.fps, "stride": trained.stride}
        if frames is None:
            assert trained is not None
            frames = trained.frames
        crop = "whole" if trained is not None and trained.crop == "whole" else "centre"
        policy = ClipPolicy.model_validate({"frames": frames, **rate, "crop": crop, "pad": "skip"})
        return cls(policy, every_s, stills=stride is None)

    def rows(self, uri: str, found: Inspection) -> pl.DataFrame:
        """A row for each clip, with the columns DECODED. Raises MediaError where the file has none."""
        facts = found.facts
        assert facts is not None, "a file that could not be read has no clips"
        if facts.kind == "image" and not self.stills:
            raise MediaError("no_rate", f"{uri}: an image has no frame rate: leave the stride out")
        start_us, end_us = facts.start_us, facts.start_us + facts.duration_us
        shot = ShotScores(start_us, end_us, "edge", "edge", 0.0, 0.0, 0.0, 0.0)
        fps_hz = facts.fps_hz or 1.0  # an image has no rate, and its one time needs none
        found_times = clips_of(found.media, shot, self.policy, 0.0, fps_hz)
        if not found_times:
            raise MediaError(
                "too_short",
                f"{uri}: {facts.duration_us / MICROSECONDS:.2f} s are shorter than a clip of {self.policy.frames} "
                f"frames, {self.rate}: ask for fewer frames, or for frames closer together",
            )
        if self.every_s is not None and facts.kind == "video":
            offsets = [time - found_times[0][0] for time in found_times[0]]
            slack_us = end_us - start_us - offsets[-1] - round(MICROSECONDS / fps_hz) + ROUNDING_US
            steps = int(slack_us / (MICROSECONDS * self.every_s))
            firsts = (start_us + round(MICROSECONDS * self.every_s * step) for step in range(steps + 1))
            found_times = [[first + offset for offset in offsets] for first in firsts]
        rows = []
        for times in found_times:
            clip = clip_id(found.media, times)
            (view,) = views(clip, Box(0, 0, facts.width, facts.height), self.policy)
            key = bytes.fromhex(row_id(clip, view))
            box = {"crop_x": view.x, "crop_y": view.y, "crop_w": view.w, "crop_h": view.h, "flip": view.flip}
            rows.append({"row_id": key, "times_us": times, **box})
        same = [
            pl.lit(value).alias(name)
            for name, value in (("media_id", bytes.fromhex(found.media)), ("uri", uri), ("decoder", facts.decoder))
        ]
        schema = {name: kind for name, kind in Clips.create_empty().schema.items() if name in DECODED}
        return pl.DataFrame(rows, {name: kind for name, kind in schema.items() if name in rows[0]}).with_columns(same)

    @property
    def rate(self) -> str:
        """In words."""
        policy = self.policy
        return f"{policy.fps:g} a second" if policy.fps is not None else f"every {policy.stride} source frames"
