"""The first pass: one decode of a file to its shots, with scores, hashes and a preview each.

Everything is measured while frames go by, since decoding dominates the cost. Of the pictures, four a second are kept
for the last minutes and one a second before that: at 160 x 90 pixels an hour is 78 MB (computed, not measured).
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import av
import numpy as np
from jaxtyping import UInt8

from nextvid.config.datasets import ShotConfig
from nextvid.video.decode import stream
from nextvid.video.display import DISPLAYED_AS_STORED
from nextvid.video.images import load_image
from nextvid.video.planes import Look, PlaneReader
from nextvid.video.probe import MediaFacts, is_missing
from nextvid.video.quality import GREY_SIDE, Box, Sample, Sampler, crop_box, perceptual_hash, scores
from nextvid.video.transitions import Transition, Transitions
from storage.errors import MediaError

Edge = Literal["edge", "hard", "dissolve", "fade"]
Picture = UInt8[np.ndarray, "h w 3"]

DENSE_PICTURES = 1200  # five minutes at 4 Hz and 160 x 90 pixels: 26 MB
DECODED_SHARE = 0.9  # our choice: fewer frames than this share of the packets is damage; our 50 clean files lose none
SAME_SHAPE = 0.02  # our choice: share by which width over height may differ; coders round sizes to even numbers
BURST = 32  # frames; our measurement: looked at one by one between decoding, they cost a fifth more
DECODED_SLACK = 2  # frames: leading pictures at the start of a cut file


@dataclass(frozen=True)
class ShotFacts:
    """One shot: a run of frames without a cut, from start_us to before end_us (0 and 0 for an image), and its scores.

    The crop box is in upright source pixels. Hashes are PDQ of what the crop box shows. `preview` is uint8 [h, w, 3],
    RGB, at most 160 pixels a side, from the middle of the shot.
    """

    start_us: int
    end_us: int
    cut_in: Edge
    cut_out: Edge
    score: float  # change in grey levels at cut_in; 0 at the file's start
    crop_x: int
    crop_y: int
    crop_w: int
    crop_h: int
    motion_mean: float  # % of the diagonal per 0.25 s
    motion_p90: float
    freeze_share: float
    luma_mean: float
    luma_std: float
    blur: float
    black_share: float
    hashes: tuple[bytes, ...]
    hash_quality: tuple[int, ...]
    hash_times_us: tuple[int, ...]
    preview: Picture


class _Small(NamedTuple):
    """What is kept of a frame until it is looked at."""

    time_us: int
    thumb: UInt8[np.ndarray, "h3 w"]
    grey: UInt8[np.ndarray, "h w"] | None  # of sampled frames


@dataclass(frozen=True)
class _Span:
    start_us: int
    end_us: int
    cut_in: Edge
    cut_out: Edge
    score: float


def first_pass(path: Path, facts: MediaFacts, config: ShotConfig) -> list[ShotFacts]:
    """The shots of a video in order, in one decode; one too short to hold a sample is left out. Raises MediaError."""
    if facts.kind == "image":
        return [image_shot(path, facts, config)]
    transitions = Transitions(config, facts.fps_hz)
    grid, sampler = _Grid(facts.start_us, config), Sampler(facts.display)
    samples: list[Sample] = []
    pictures: dict[int, Look] = {}
    keys_us: list[int] = []
    reduced = _reduced(path, config, grid, sampler, keys_us)
    while burst := list(itertools.islice(reduced, BURST)):
        for one in burst:
            transitions.see(one.time_us, one.thumb)
        for one in burst:
            if one.grey is not None:
                sample, pictures[one.time_us] = sampler.measure(one.time_us, one.grey, one.thumb)
                samples.append(sample)
                if len(pictures) > grid.kept + DENSE_PICTURES:
                    pictures = grid.thinned(pictures)
    seen = len(transitions.times_us)
    if not seen or (facts.frames and seen < DECODED_SHARE * facts.frames - DECODED_SLACK):
        raise MediaError(
            "short", f"{path}: {seen} frames decode, {facts.frames} packets are there; fetch the file again"
        )
    end_us = min(transitions.times_us[-1] + round(1e6 / facts.fps_hz), facts.start_us + facts.duration_us)
    found = transitions.found(end_us)
    if "lost_pictures" in facts.hazards:
        # from a hole to the next key picture: what is between may refer to what is lost, and belongs to no shot
        times_us, keys = transitions.times_us, np.array(keys_us, np.int64)
        for at in np.flatnonzero(is_missing(np.array(times_us, np.int64), keys, facts.container)):
            whole_us = next((key_us for key_us in keys_us if key_us > times_us[at]), end_us)
            found.append(Transition(times_us[at - 1] + round(1e6 / facts.fps_hz), whole_us, "hard", 0.0))
        found.sort(key=lambda transition: transition.start_us)
    spans = _spans(transitions.times_us[0], end_us, found)
    return [
        _shot(span, inside, pictures, facts, config)
        for span in spans
        if (inside := [s for s in samples if span.start_us <= s.time_us < span.end_us and s.time_us in pictures])
    ]


def _reduced(path: Path, config: ShotConfig, grid: "_Grid", sampler: Sampler, keys_us: list[int]) -> Iterator[_Small]:
    """Every frame reduced, at once, while its planes are in the CPU's cache; times of key pictures go to `keys_us`.

    Frames of another size are scaled to the first's. Raises MediaError where they are of another shape, which would be
    squeezed.
    """
    read, first = PlaneReader(GREY_SIDE), (0, 0)
    for time_us, frame in stream(path):
        now = (frame.width, frame.height)
        first = first if any(first) else now
        if abs(now[0] * first[1] - now[1] * first[0]) > SAME_SHAPE * now[1] * first[0]:
            raise MediaError(
                "changing_shape",
                f"{path}: {first[0]} x {first[1]} pixels a frame, from {time_us} us on {now[0]} x {now[1]}: cut it "
                "there",
            )
        if frame.key_frame:
            keys_us.append(time_us)
        planes = read(frame)
        grey = sampler.grey(planes) if grid.wants(time_us) else None
        yield _Small(time_us, planes.thumbnail(config.thumb_width, config.thumb_height), grey)


def image_shot(path: Path, facts: MediaFacts, config: ShotConfig) -> ShotFacts:
    """An image as one shot from 0 to 0. Raises MediaError."""
    frame = av.VideoFrame.from_ndarray(load_image(path), format="rgb24")
    planes = PlaneReader(GREY_SIDE)(frame)
    thumb = planes.thumbnail(config.thumb_width, config.thumb_height)
    sampler = Sampler(DISPLAYED_AS_STORED)
    sample, picture = sampler.measure(0, sampler.grey(planes), thumb)
    return _shot(_Span(0, 0, "edge", "edge", 0.0), [sample], {0: picture}, facts, config)


class _Grid:
    """Which frames are sampled, and which of the samples keep their picture for good."""

    def __init__(self, start_us: int, config: ShotConfig) -> None:
        self.start_us, self.config = start_us, config
        self.last = -1
        self.kept = 0

    def wants(self, time_us: int) -> bool:
        """Whether this frame is the first of its sampling interval."""
        slot = int((time_us - self.start_us) * self.config.sample_hz // 1e6)
        if slot <= self.last:
            return False
        self.last = slot
        return True

    def thinned(self, pictures: dict[int, Look]) -> dict[int, Look]:
        """One picture for each interval of hash_hz."""
        chosen = {time_us: pictures[time_us] for time_us in _hash_times(pictures, self.start_us, self.config.hash_hz)}
        self.kept = len(chosen)
        return chosen


def _hash_times(times_us: Iterable[int], start_us: int, hash_hz: float) -> list[int]:
    """The first of the times in each interval of `hash_hz`."""
    first: dict[int, int] = {}
    for time_us in times_us:
        first.setdefault(int((time_us - start_us) * hash_hz // 1e6), time_us)
    return list(first.values())


def _spans(start_us: int, end_us: int, transitions: list[Transition]) -> list[_Span]:
    """Spans between transitions."""
    spans = []
    cut_in: Edge = "edge"
    score = 0.0
    for transition in transitions:
        if transition.start_us > start_us:
            spans.append(_Span(start_us, transition.start_us, cut_in, transition.kind, score))
        start_us, cut_in, score = max(start_us, transition.end_us), transition.kind, transition.score
    if end_us > start_us:
        spans.append(_Span(start_us, end_us, cut_in, "edge", score))
    return spans


def _shot(
    span: _Span, samples: list[Sample], pictures: dict[int, Look], facts: MediaFacts, config: ShotConfig
) -> ShotFacts:
    box: Box = crop_box(samples, facts.width, facts.height)
    values = scores(samples, config.fade_luma)
    times = [sample.time_us for sample in samples]
    middle = min(times, key=lambda time_us: abs(2 * time_us - span.start_us - span.end_us))
    hashed = sorted({middle, *_hash_times(times, span.start_us, config.hash_hz)})
    hashes = [perceptual_hash(pictures[time_us].luma, box, facts.width, facts.height) for time_us in hashed]
    return ShotFacts(
        start_us=span.start_us,
        end_us=span.end_us,
        cut_in=span.cut_in,
        cut_out=span.cut_out,
        score=span.score,
        crop_x=box.x,
        crop_y=box.y,
        crop_w=box.w,
        crop_h=box.h,
        motion_mean=values.motion_mean,
        motion_p90=values.motion_p90,
        freeze_share=values.freeze_share,
        luma_mean=values.luma_mean,
        luma_std=values.luma_std,
        blur=values.blur,
        black_share=values.black_share,
        hashes=tuple(value for value, _ in hashes),
        hash_quality=tuple(quality for _, quality in hashes),
        hash_times_us=tuple(hashed),
        preview=pictures[middle].rgb(),
    )
