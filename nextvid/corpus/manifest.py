"""From one shot to its rows in the clips table: one for each view, with its uses, or the reason why there is none.

Pure functions of a shot's row, its media file, labels and corpus.yaml. Filters apply to pretraining only: a benchmark
takes what its protocol says, so that scores can be compared. A clip is used by a benchmark only where the benchmark's
target has one value for it. The split of a file is its official one, else drawn from a hash of its group or media id:
adding files moves no other file to another split.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import polars as pl

from nextvid.config.benchmarks import BenchmarkConfig
from nextvid.config.datasets import ClipPolicy, DatasetConfig, FilterConfig, SplitConfig
from nextvid.corpus.cutting import ROUNDING_US, ShotScores, clip_id, clips_of, filter_reason, row_id, views
from nextvid.making.publishing import HELD_OUT
from nextvid.video.quality import Box
from storage.digest import digest
from storage.schemas import SPLITS, Clips

Split = Literal["train", "val", "test"]
ClipRow = dict[str, Any]  # a row of Clips
PRETRAIN = "pretrain"
PARTS = 1 << 32  # a share is compared with 32 bits of the hash: finer than one file in 10^9


@dataclass(frozen=True)
class Label:
    """One value of one target; without a span it is about the whole file."""

    target: str
    value: str
    start_us: int | None
    end_us: int | None


@dataclass(frozen=True)
class MediaNow:
    """What clips need to know of a media file: how it is read, its split and labels, and why it may not be used."""

    uri: str
    decoder: str
    reading: int  # MediaFacts.reading
    fps_hz: float
    split: Split
    group: str | None
    labels: tuple[Label, ...]
    refused: str | None = None


@dataclass(frozen=True)
class WholeFile:
    """A file across its cuts: as one shot, with the box that holds those of its shots; and where these begin."""

    scores: ShotScores
    box: Box
    starts_us: tuple[int, ...]  # ascending

    @classmethod
    def of(cls, shots: Sequence[Mapping[str, Any]]) -> "WholeFile":
        """From the file's rows of Shots with status ok, at least one."""
        starts = sorted(shot["start_us"] for shot in shots)
        end_us = max(shot["end_us"] for shot in shots)
        scores = replace(ShotScores.of(shots[0]), start_us=starts[0], end_us=end_us, cut_in="edge", cut_out="edge")
        left, top = (min(shot[name] for shot in shots) for name in ("crop_x", "crop_y"))
        right = max(shot["crop_x"] + shot["crop_w"] for shot in shots)
        bottom = max(shot["crop_y"] + shot["crop_h"] for shot in shots)
        return cls(scores, Box(left, top, right - left, bottom - top), tuple(starts))

    def begins_in(self, start_us: int, times_us: Sequence[int]) -> bool:
        """Whether a clip begins in the shot that begins at `start_us`, or after it and before the next one."""
        return self.starts_us[bisect_right(self.starts_us, times_us[0]) - 1] == start_us


@dataclass
class ShotRows:
    """Rows of one shot, and by benchmark how many clips it left out because their target has no value, or several."""

    rows: list[ClipRow]
    unlabelled: dict[str, int]


def split_of(config: SplitConfig, official: str | None, group: str | None, media_id: bytes) -> Split:
    """The split of a file, from its labels `split` and `group` and its id."""
    if official is not None:
        assert official in SPLITS, official
        return cast("Split", official)
    key = ["group", group] if group is not None else ["media", media_id.hex()]
    drawn = int(digest(["split", *key])[:8], 16)
    if drawn < round(config.test * PARTS):
        return "test"
    return "val" if drawn < round((config.test + config.val) * PARTS) else "train"


def value_of(labels: Sequence[Label], target: str, times_us: Sequence[int]) -> str | None:
    """The one value of `target` for a clip; None where there is none or several.

    A span counts if every frame is in it, to the millisecond that containers round times to.
    """
    values = {
        label.value
        for label in labels
        if label.target == target
        and (label.start_us is None or times_us[0] >= label.start_us - ROUNDING_US)
        and (label.end_us is None or times_us[-1] < label.end_us + ROUNDING_US)
    }
    return values.pop() if len(values) == 1 else None


def with_value(clips: pl.DataFrame, labels: pl.DataFrame, target: str) -> pl.DataFrame:
    """`value_of` for many clips: those with one, in the column `label`. Tables of the schemas Clips and Labels."""
    spans = labels.filter(pl.col("target") == target).select("media_id", "start_us", "end_us", "value")
    first, last = pl.col("times_us").list.first(), pl.col("times_us").list.last()
    inside = (
        clips.select("batch", "row_id", "media_id", "times_us")
        .join(spans, on="media_id")
        .filter(
            (pl.col("start_us").is_null() | (first >= pl.col("start_us") - ROUNDING_US))
            & (pl.col("end_us").is_null() | (last < pl.col("end_us") + ROUNDING_US))
        )
    )
    found = inside.group_by("batch", "row_id").agg(pl.col("value").unique()).filter(pl.col("value").list.len() == 1)
    return clips.join(found.select("batch", "row_id", label=pl.col("value").list.first()), on=["batch", "row_id"])


def rows_of(
    shot: Mapping[str, Any],
    media: MediaNow,
    dataset: DatasetConfig,
    filters: FilterConfig,
    benchmarks: Mapping[str, BenchmarkConfig],
    file: WholeFile | None = None,
) -> ShotRows:
    """Every row of one shot. A view with several uses is one row; a shot without a clip is one row with its reason.

    `file`: the whole file of the shot, if it has others: clips of it that begin in this shot are this shot's rows.
    """
    if media.refused is not None:
        return ShotRows([_refused(shot, media, media.refused, [])], {})
    scores, found = ShotScores.of(shot), _Found(shot, media, file or WholeFile.of([shot]), filters.trim_s)
    for_pretraining = dataset.weight is not None and media.split == "train"
    unused = "unused" if dataset.weight is None else HELD_OUT
    reason = filter_reason(scores, filters) if for_pretraining else unused
    if reason is None:
        for policy in dataset.clips:
            found.add(PRETRAIN, policy, None)
        reason = None if found.rows else "too_short"
    for name, benchmark in sorted(benchmarks.items()):
        found.add(name, benchmark.policy, benchmark.target)
    rows = [row | {"uses": sorted(row["uses"])} for row in found.rows.values()]
    if reason is not None and for_pretraining:
        rows.append(_refused(shot, media, reason, [PRETRAIN]))
    elif not rows:  # a benchmark that lacked a label says more than pretraining
        rows.append(_refused(shot, media, "unlabelled" if found.unlabelled else reason or "too_short", []))
    return ShotRows(rows, found.unlabelled)


def hold_quota(rows: Sequence[ClipRow], clips_per_media: int) -> None:
    """Keep at most so many clips of each file and length for pretraining, chosen by hash; the others are `over_quota`.

    So a video of an hour weighs no more than `clips_per_media` short ones (docs/decisions/0019). Rows that a benchmark
    uses too are kept for it.
    """
    clips: dict[tuple[bytes, int], set[bytes]] = {}
    mine = [row for row in rows if row["status"] == "ok" and PRETRAIN in row["uses"]]
    for row in mine:
        clips.setdefault((row["media_id"], row["frames"]), set()).add(row["clip_id"])
    kept = {
        clip
        for found in clips.values()
        for clip in sorted(found, key=lambda clip: digest(["quota", clip.hex()]))[:clips_per_media]
    }
    for row in mine:
        if row["clip_id"] not in kept:
            row["uses"] = [use for use in row["uses"] if use != PRETRAIN]
            if not row["uses"]:
                row.update(uses=[PRETRAIN], status="rejected", reason="over_quota")


class _Found:
    """Collects the rows of a shot by row id, one policy after the other."""

    def __init__(self, shot: Mapping[str, Any], media: MediaNow, file: WholeFile, trim_s: float) -> None:
        self.shot, self.media, self.file, self.trim_s = shot, media, file, trim_s
        self.scores = ShotScores.of(shot)
        self.rows: dict[bytes, ClipRow] = {}
        self.unlabelled: dict[str, int] = {}

    def add(self, use: str, policy: ClipPolicy, target: str | None) -> None:
        """Add the policy's views; with a target, only of clips that have one value of it."""
        media_hex = self.shot["media_id"].hex()
        whole = policy.cut_from == "file"
        box = Box(*(self.shot[name] for name in ("crop_x", "crop_y", "crop_w", "crop_h")))
        scores, box = (self.file.scores, self.file.box) if whole else (self.scores, box)
        fps_hz = self.media.fps_hz or 1.0  # an image has no rate, and its one time needs none
        for times in clips_of(media_hex, scores, policy, self.trim_s, fps_hz):
            if whole and not self.file.begins_in(self.shot["start_us"], times):
                continue
            if target is not None and value_of(self.media.labels, target, times) is None:
                self.unlabelled[use] = self.unlabelled.get(use, 0) + 1
                continue
            clip = clip_id(media_hex, times)
            for index, view in enumerate(views(clip, box, policy)):
                key = bytes.fromhex(row_id(clip, view, self.media.reading))
                if key not in self.rows:
                    self.rows[key] = _blank(self.shot, self.media) | {
                        "row_id": key,
                        "clip_id": bytes.fromhex(clip),
                        "frames": len(times),
                        "times_us": times,
                        "view_index": index,
                        "crop_x": view.x,
                        "crop_y": view.y,
                        "crop_w": view.w,
                        "crop_h": view.h,
                        "flip": view.flip,
                        "uses": [],
                        "status": "ok",
                    }
                if use not in self.rows[key]["uses"]:
                    self.rows[key]["uses"].append(use)


def _refused(shot: Mapping[str, Any], media: MediaNow, reason: str, uses: list[str]) -> ClipRow:
    """The row of a shot without a clip; `uses` are those that refused it."""
    crop = {name: shot[name] for name in ("crop_x", "crop_y", "crop_w", "crop_h")}
    return _blank(shot, media) | crop | {"uses": uses, "status": "rejected", "reason": reason}


def _blank(shot: Mapping[str, Any], media: MediaNow) -> ClipRow:
    row: ClipRow = dict.fromkeys(Clips.column_names())
    row.update({name: shot[name] for name in ("shot_id", "media_id", "dataset", "batch", "kind")})
    return row | {
        "uri": media.uri,
        "decoder": media.decoder,
        "split": media.split,
        "group": media.group,
        "frames": 0,
        "times_us": [],
        "view_index": 0,
        "flip": False,
    }
