"""The clips of a benchmark with their labels, and the digest of that list.

The rules turn tables into a task: uses, labels by span, splits, duplicates, segments, views, held-out rows. A clip is
in the benchmark if its row is committed in the trainset's encoding spec. Training clips with a near-duplicate in a
test set are left out of probe-train, because their labels would leak. Every clip that could not be taken is counted by
reason in `left_out`.

A *sample* is what the probe sees at once: the segments of one shot and view, or of one file and view where the policy
cuts files, in the order of time (docs/method.md 9).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import polars as pl

from nextvid.config.benchmarks import BenchmarkConfig
from nextvid.corpus.manifest import with_value
from storage.digest import digest_config
from storage.errors import UpstreamError
from storage.schemas import ProbeRows

_32_BITS = 1 << 32
ROW_COLUMNS = ProbeRows.column_names()


@dataclass(frozen=True)
class BenchmarkRows:
    """The rows that a benchmark scores.

    `frame` has one row for each (sample, segment), sorted by them, with columns sample, segment, clip_group (samples
    that one answer is given for share it), split, held_out, label (its number in `classes`) and the address columns of
    commits.
    """

    benchmark: str
    target: str
    classes: tuple[str, ...]
    segments: int
    frame: pl.DataFrame
    left_out: Mapping[str, int]
    other_views: pl.DataFrame = field(default_factory=pl.DataFrame)  # of train; `sample` is the one that they vary

    def digest(self) -> str:
        """Id of rows, their bytes, labels and splits; not of their places in the store."""
        found = {"target": self.target, "classes": list(self.classes), "rows": _listed(self.frame)}
        if not self.other_views.is_empty():
            found["other_views"] = _listed(self.other_views)
        return digest_config(found)

    def part(self, split: str) -> pl.DataFrame:
        """Rows of one split."""
        return self.frame.filter(pl.col("split") == split)


def benchmark_rows(
    name: str,
    config: BenchmarkConfig,
    clips: pl.DataFrame,
    labels: pl.DataFrame,
    duplicates: pl.DataFrame,
    commits: pl.DataFrame,
    held_out: float,
    every_view: bool,
) -> BenchmarkRows:
    """Build the task from tables of the schemas Clips, Labels, Duplicates and from `LatentStore.commits`.

    Where the benchmark has a limit, which shots stay is decided by shot id, which is a hash. `held_out` is the share of
    probe-train that chooses heads, by hash of the group, else of the media file. `every_view`: where heads learn from
    one view, the others are `other_views`, of which an epoch may draw.
    """
    asked = clips.filter(
        (pl.col("status") == "ok") & pl.col("uses").list.contains(name) & pl.col("split").is_in(["train", "test"])
    )
    labelled = with_value(asked, labels, config.target)
    unit = "media_id" if config.policy.cut_from == "file" else "shot_id"  # what segments are of
    copies = duplicates.filter(pl.col("dropped_from").list.contains("probe_train")).select(unit).unique()
    kept = labelled.filter(pl.col("split") == "test").vstack(
        labelled.filter(pl.col("split") == "train").join(copies, on=unit, how="anti")
    )
    addresses = commits.filter(pl.col("status") == "ok").select("row_id", "batch", "part", "shard", "slot", "crc32c")
    stored = kept.join(addresses, on=["row_id", "batch"]).sort("batch").unique("row_id", keep="first")
    seen = stored
    if config.train_views == "one":
        seen = _one_view(stored, unit)
    sampled = _into_samples(seen, unit, config.policy.clips_per_shot)
    limited = sampled
    if config.limit is not None:  # the first of each split by id, so that views stay together
        limited = sampled.filter(pl.col(unit).rank("dense").over("split") <= config.limit)
    classes = tuple(sorted(limited["label"].unique().to_list()))
    one_answer = ["split", "media_id" if config.judged == "file" else unit, "label"]
    ordered = list(dict.fromkeys([*one_answer, unit, "view_index"]))
    frame = limited.with_columns(
        label=pl.col("label").replace_strict(list(classes), range(len(classes)), return_dtype=pl.Int64),
        held_out=_held_out(limited, held_out),
        sample=pl.struct(ordered).rank("dense").cast(pl.Int64) - 1,
        clip_group=pl.struct(one_answer).rank("dense").cast(pl.Int64) - 1,
    )
    others = pl.DataFrame()
    if every_view and seen.height < stored.height:
        rest = _into_samples(stored.join(seen, on="row_id", how="anti"), unit, config.policy.clips_per_shot)
        others = _beside(rest, frame.filter(pl.col("split") == "train"), unit, classes)
    left_out = {
        "unlabelled": asked.height - labelled.height,
        "copies_of_test_clips": labelled.height - kept.height,
        "not_encoded": kept["row_id"].n_unique() - stored.height,
        "other_views": stored.height - seen.height if others.is_empty() else 0,
        "over_the_limit": sampled.height - limited.height,
    }
    return BenchmarkRows(
        name, config.target, classes, config.policy.clips_per_shot, frame.sort("sample", "segment"), left_out, others
    )


def refuse_unlearnable(rows: BenchmarkRows, config: BenchmarkConfig) -> None:
    """UpstreamError where heads could not learn from the rows, or not be judged by them."""
    where = f"benchmark '{rows.benchmark}'"
    for split in ("train", "test"):
        if rows.part(split).is_empty():
            raise UpstreamError(
                f"{where} has no encoded {split} clip with a label '{rows.target}' (left out: {dict(rows.left_out)}): "
                f"check the labels and splits of {', '.join(config.datasets)}"
            )
    learnt = rows.part("train").filter(~pl.col("held_out"))
    classes = learnt["label"].unique()
    if len(classes) < 2:
        known = f"only the class '{rows.classes[classes[0]]}'" if len(classes) else "no class"
        raise UpstreamError(
            f"{where} has {known} of '{rows.target}' in the clips that heads learn from: check the labels of "
            f"{', '.join(config.datasets)}"
        )
    if (samples := learnt["sample"].n_unique()) < config.batch:
        raise UpstreamError(
            f"{where} has {samples} clips for heads to learn from, fewer than a batch of {config.batch}: lower "
            f"benchmarks.{rows.benchmark}.batch in corpus.yaml, or add clips"
        )


def _listed(rows: pl.DataFrame) -> list[list[object]]:
    columns = (pl.col("row_id").bin.encode("hex"), "crc32c", "sample", "segment", "label", "split")
    return [list(row) for row in rows.select(*columns).rows()]


def _one_view(rows: pl.DataFrame, unit: str) -> pl.DataFrame:
    """Of train, the clips of one view of each shot or file, drawn by the last bits of its id, a hash; test whole."""
    drawn = pl.col(unit).bin.encode("hex").str.slice(-8).str.to_integer(base=16)
    views = rows.group_by(unit).agg(_views=pl.col("view_index").unique().sort())
    chosen = views.select(unit, _view=pl.col("_views").list.get(drawn % pl.col("_views").list.len()))
    kept = (pl.col("split") != "train") | (pl.col("view_index") == pl.col("_view"))
    return rows.join(chosen, on=unit).filter(kept).drop("_view")


def _into_samples(clips: pl.DataFrame, unit: str, segments: int) -> pl.DataFrame:
    """One row for each (sample, segment): where there are fewer clips than segments they are repeated in turn."""
    sample = [unit, "label", "view_index"]
    ordered = clips.sort(*sample, pl.col("times_us").list.first(), "row_id").group_by(sample, maintain_order=True)
    pieces = ordered.agg(pl.all().head(segments), _n=pl.min_horizontal(pl.len(), pl.lit(segments)))
    turns = pieces.with_columns(segment=pl.lit(list(range(segments)))).explode("segment")
    columns = [name for name in clips.columns if name not in sample]
    return turns.with_columns(pl.col(name).list.get(pl.col("segment") % pl.col("_n")) for name in columns).drop("_n")


def _beside(others: pl.DataFrame, train: pl.DataFrame, unit: str, classes: tuple[str, ...]) -> pl.DataFrame:
    """The samples of `others` that show what a sample of `train` shows, in its order, with its columns."""
    known = train.filter(segment=0).select(unit, "label", "sample", "held_out", "clip_group")
    names = pl.DataFrame({"label": range(len(classes)), "name": classes}, schema_overrides={"label": pl.Int64})
    found = others.rename({"label": "name"}).join(known.join(names, on="label"), on=[unit, "name"])
    return found.select(train.columns).sort("sample", "view_index", "segment")


def _held_out(rows: pl.DataFrame, share: float) -> pl.Series:
    """Whether each row is held out: by a hash of its group, else of its media file, so that either stays together."""
    media = rows["media_id"].bin.encode("hex")
    keys = [f"group {g}" if g is not None else f"media {m}" for g, m in zip(rows["group"], media, strict=True)]
    return pl.Series([int(digest_config(["probe", key])[:8], 16) < share * _32_BITS for key in keys], dtype=pl.Boolean)


def per_sample(rows: pl.DataFrame, column: str) -> np.ndarray:
    """A column's value for each sample, in order: [N], of `label`, `held_out` or `clip_group`."""
    return rows.unique("sample").sort("sample")[column].to_numpy()
