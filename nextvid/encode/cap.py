"""`cap` of a dataset: which of its rows are encoded, where it has more than training will draw.

A row id is a hash, so the rows whose ids are at or below a bound are an even sample of the dataset, whatever batch they
are in: every batch decides by itself, and a larger cap adds rows and moves none. caps/<dataset>.json records a bound
for each clip length. It is estimated while batches are still to be cut; then exactly `cap` rows that can be trained on
have such an id, so what was rejected, withdrawn or dropped as a duplicate is replaced by the next larger ids. Rows that
benchmarks use are stored whatever their id (docs/decisions/0050).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Annotated, Literal

import numpy as np
import polars as pl
from pydantic import Field

from nextvid.config.datasets import DatasetConfig
from nextvid.config.project import Project
from nextvid.config.strict import Count, Strict, parse
from nextvid.making.batches import dataset_of
from nextvid.making.publishing import read_latest
from storage import atomic
from storage.draws import most_drawn
from storage.errors import ConfigError, CorpusError
from storage.locks import locked
from storage.records import publish_record, read_record
from storage.schemas import Clips, Duplicates
from storage.store import LatentStore
from storage.tables import read_table
from storage.withdrawn import is_withdrawn

MARGIN = 1.1  # of `auto`, our choice: 9 % of the rows may be duplicates or fail before files are decoded again
STEADY = 2.0  # of `auto`, our choice: the bound falls when the dataset has grown so much that twice the draws are below
GROWTH = 2.0  # our choice: while batches are cut, the bound is estimated again when there are twice as many
COUNTED = 1 << 20  # ids in memory, our choice: of a larger cap every n-th row is counted, an error of 0.1 %
EVERY = "f" * 32  # the bound that no id exceeds
WORD = 1 << 64  # bounds are compared by the first 64 bits of ids


@dataclass(frozen=True)
class Cap:
    """The cap of one dataset and clip length: how many rows that can be trained on are to be stored."""

    rows: int
    least: int  # the bound stays while so many to `highest` rows are below it
    highest: int


def drawn_rows(project: Project) -> dict[tuple[str, int], int]:
    """How many rows the recipes of corpus.yaml draw at most, by (dataset, frames); of several recipes the most.

    A dataset's images take part in the draws of every length, so theirs (1 frame) are the sum.
    """
    found: dict[tuple[str, int], int] = {}
    for recipe in map(project.recipe, project.asked.recipes):
        counts: dict[tuple[str, int], int] = {}
        first = 0
        for frames, stages in groupby(recipe.stages, lambda stage: stage.frames):
            stop = first + sum(stage.steps * stage.batch for stage in stages)
            for name, count in most_drawn(project.corpus.weights(), first, stop).items():
                for length in (1, frames):
                    counts[name, length] = counts.get((name, length), 0) + count
            first = stop
        found |= {key: max(count, found.get(key, 0)) for key, count in counts.items()}
    return found


def caps_of(project: Project, dataset: str) -> dict[int, Cap]:
    """The caps of a dataset by clip length in frames; none where corpus.yaml has none."""
    asked = _asked(project, dataset)
    drawn = drawn_rows(project) if "auto" in asked.values() else {}
    found = {}
    for frames, rows in asked.items():
        needed = max(1, drawn.get((dataset, frames), 0))
        auto = Cap(math.ceil(MARGIN * needed), needed, math.ceil(STEADY * needed))
        found[frames] = auto if rows == "auto" else Cap(rows, rows, rows)
    return found


def bounds_of(project: Project, dataset: str) -> dict[int, str]:
    """The largest row id that is stored (32 hex digits) by clip length; only of lengths whose bound is known."""
    asked = _asked(project, dataset)
    bounds = _record(project, dataset).bounds if asked else {}
    return {frames: bound for frames in asked if (bound := bounds.get(frames)) is not None}


def cap_changed(project: Project, dataset: str) -> bool:
    """Whether the bounds of a dataset were computed for other caps than now, or never."""
    known, caps = _record(project, dataset).known, caps_of(project, dataset)
    return bool(caps) and (known is None or known.rows != {frames: cap.rows for frames, cap in caps.items()})


def below_bound(project: Project, dataset: str) -> pl.Expr:
    """Of a table of a dataset's clips, the rows that its cap takes; all of a length whose bound is not known."""
    below = pl.lit(value=True)
    for frames, bound in bounds_of(project, dataset).items():
        below &= (pl.col("frames") != frames) | (pl.col("row_id") <= pl.lit(bytes.fromhex(bound)))
    return below


def settle_cap(project: Project, store: LatentStore, batch: str) -> None:
    """Compute the bounds of a batch's dataset where more is known than when they were recorded.

    That is at the first batch, whenever twice as many are cut, when all are, and when the cap or the latest
    `duplicates` or `trainset` is another. Reads the clips of every batch and their commits in `store`.
    """
    dataset = dataset_of(batch)
    if not _asked(project, dataset) or (known := _stale(project, batch)) is None:
        return
    with locked(f"{project.root.url}/caps/lock"):
        if (known := _stale(project, batch)) is None:
            return  # another process computed them meanwhile
        caps, before, share = caps_of(project, dataset), _record(project, dataset).bounds, known.cut / known.listed
        pool = [frames for frames, cap in caps.items() if cap.least < cap.highest]  # with `auto`
        pool = pool if 1 in pool else []  # images and clips are drawn together: one bound keeps their proportion
        found = {frames: _Smallest(cap.highest) for frames, cap in caps.items()}
        for rows in _usable(project, store, dataset):
            for frames, ids in found.items():
                ids.add(rows.filter(pl.col("frames").is_in({frames, 1} if frames in pool else {frames}))["row_id"])
        bounds = {frames: _bound(cap, found[frames], share, before.get(frames)) for frames, cap in caps.items()}
        if len(pool) > 1 and found[1].count:
            bounds |= dict.fromkeys(pool, max(bounds[frames] or "" for frames in pool if frames > 1))
        publish_record(project.root.cap(dataset), _Record(bounds=bounds, known=known).model_dump(mode="json"))


class _Smallest:
    """The smallest of many row ids, and how many there were; of many, every n-th."""

    def __init__(self, most: int) -> None:
        self.every = max(1, most // COUNTED)
        self._kept, self._ids, self._seen = math.ceil(most / self.every) + 1, np.empty(0, np.uint64), 0

    @property
    def count(self) -> int:
        """All ids that were added."""
        return self._seen * self.every

    def add(self, ids: pl.Series) -> None:
        """Add ids of 16 bytes."""
        words = np.frombuffer(b"".join(ids.to_list()), ">u8").reshape(-1, 2)
        words = words[words[:, 1] % self.every == 0]
        self._seen += len(words)
        self._ids = np.concatenate((self._ids, words[:, 0].astype(np.uint64)))
        if len(self._ids) > 2 * self._kept:
            self._ids = np.partition(self._ids, self._kept - 1)[: self._kept]

    def below(self, bound: str) -> int:
        """How many ids are at or below a bound, as far as ids were kept."""
        return int((self._ids <= np.uint64(int(bound[:16], 16))).sum()) * self.every

    def bound(self, rows: int) -> str:
        """The bound that so many ids are below; fewer were added."""
        place = math.ceil(rows / self.every) - 1
        return f"{int(np.partition(self._ids, place)[place]):016x}{EVERY[16:]}"


def _bound(cap: Cap, ids: _Smallest, share: float, before: str | None) -> str | None:
    """The bound for a cap where `ids` are those of this share of the batches; None where there are none yet."""
    if ids.count == 0:
        return before
    if before is not None and cap.least * share <= ids.below(before) <= cap.highest * share:
        return before
    if ids.count <= cap.rows * share:
        return EVERY
    if share == 1:
        return ids.bound(cap.rows)
    return f"{int(cap.rows * share / ids.count * WORD):016x}{EVERY[16:]}"


def _usable(project: Project, store: LatentStore, dataset: str) -> Iterator[pl.DataFrame]:
    """Rows (row_id, frames) that pretraining can use, batch by batch, as far as is known."""
    root = project.root
    digest = read_latest(root, "duplicates")
    path = f"{root.pointed('duplicates', digest)}/duplicates.parquet" if digest else ""
    found: pl.DataFrame = read_table(path, Duplicates) if path else Duplicates.create_empty()
    dropped = found.filter(pl.col("dropped_from").list.contains("pretrain"))
    for batch in _batches(project, dataset)[1]:
        clips = read_table(root.table("clips", batch), Clips)
        clips = clips.filter(
            (pl.col("status") == "ok") & pl.col("uses").list.contains("pretrain") & ~is_withdrawn(root)
        )
        lost = store.commits(batch, columns=()).filter(pl.col("status") != "ok")
        changed = clips.join(lost.filter(pl.col("status") == "rejected"), on="row_id", how="semi")
        yield (
            clips.join(dropped.filter(pl.col("batch") == batch), on="shot_id", how="anti")
            .join(changed, on="media_id", how="anti")  # other frames at each decoding: no row of the file is used
            .join(lost, on="row_id", how="anti")
            .select("row_id", "frames")
        )


def _batches(project: Project, dataset: str) -> tuple[list[str], list[str]]:
    """Batches of a dataset: those listed, and those whose clips are cut."""
    cut = [batch for batch in project.root.batches("clips") if dataset_of(batch) == dataset]
    listed = {batch for batch in project.root.batches() if dataset_of(batch) == dataset}
    return sorted(listed.union(cut)), cut


def _stale(project: Project, batch: str) -> "_Known | None":
    """What the bounds of the batch's dataset are to be computed from now; None where those on record hold."""
    dataset = dataset_of(batch)
    record, (listed, cut) = _record(project, dataset), _batches(project, dataset)
    duplicates, trainset = (read_latest(project.root, noun) for noun in _POINTED)
    rows = {frames: cap.rows for frames, cap in caps_of(project, dataset).items()}
    now, before = (
        _Known(rows=rows, listed=len(listed), cut=len(cut), duplicates=duplicates, trainset=trainset),
        record.known,
    )
    if now == before or not cut:
        return None
    if before is None or now.model_copy(update={"listed": before.listed, "cut": before.cut}) != before:
        return now
    if now.cut == now.listed or now.cut >= GROWTH * before.cut or now.listed >= GROWTH * before.listed:
        return now
    unknown = [frames for frames, bound in record.bounds.items() if bound is None]
    clips = read_table(project.root.table("clips", batch), Clips) if unknown else Clips.create_empty()
    return now if clips["frames"].is_in(unknown).any() else None


_POINTED: tuple[Literal["duplicates", "trainset"], ...] = ("duplicates", "trainset")


class _Known(Strict):
    """What bounds were computed from: caps in rows by frames, batches listed and cut, the latest of two assets."""

    rows: dict[int, int]
    listed: Count
    cut: Count
    duplicates: str | None
    trainset: str | None


class _Record(Strict):
    """caps/<dataset>.json: bounds by frames, null where no clip of that length is known yet."""

    bounds: dict[int, Annotated[str, Field(pattern="^[0-9a-f]{32}$")] | None] = Field(default_factory=dict)
    known: _Known | None = None


def _record(project: Project, dataset: str) -> _Record:
    path = project.root.cap(dataset)
    if not atomic.exists(path):
        return _Record()
    try:
        return parse(_Record, read_record(path), path)
    except ConfigError as error:
        raise CorpusError(f"{error}: the record of a cap is damaged; remove it, and make 'latents' again") from error


def _asked(project: Project, dataset: str) -> dict[int, int | Literal["auto"]]:
    """What corpus.yaml says of a dataset's caps, by frames."""
    config: DatasetConfig | None = project.corpus.datasets.get(dataset)
    if config is None or config.cap is None:
        return {}
    if isinstance(config.cap, dict):
        return dict(sorted(config.cap.items()))
    return dict.fromkeys(sorted({policy.frames for policy in config.clips}), config.cap)
