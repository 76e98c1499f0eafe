"""Choose the batches and rows of a trainset, with the reason for each that is left out.

A batch is taken if its clips and latents passed their checks, each row that should be stored has a commit in the
accepted encoding, and the latest `duplicates` searched its current tables. A row is taken if it is for pretraining, in
split train, encoded, not dropped as a duplicate and not withdrawn. One batch's tables are in memory at a time, and
32 bytes of each row: 10 million rows fit in 2 GB (benchmarks/manifests.py).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from nextvid.config.project import Project
from nextvid.encode.latent_stats import Moments, moments
from nextvid.encode.plan import UNSTABLE, accepted_spec, is_unstable, wanted_clips
from nextvid.making.batches import batch_state, dataset_of
from nextvid.making.publishing import read_latest
from storage import reader
from storage.atomic import read_bytes, read_json
from storage.digest import digest_bytes
from storage.errors import UpstreamError
from storage.reader import ADDRESS
from storage.root import DataRoot
from storage.schemas import Clips, Duplicates, Lineage
from storage.shard import ROWS_PER_SHARD
from storage.spec import EncodingSpec
from storage.store import LatentStore
from storage.tables import read_table, require_checks
from storage.withdrawn import withdrawn_rows


@dataclass(frozen=True)
class Selection:
    """The rows of a trainset, each as its address in the latent store (32 bytes), and what was left out.

    `addresses` and `offsets` are by frames; rows are sorted by dataset, then row id, and offsets are (first, count).
    """

    spec: EncodingSpec
    duplicates: str
    batches: tuple[str, ...]
    left_out: Mapping[str, str]  # batch -> reason
    addresses: Mapping[int, np.ndarray]
    offsets: Mapping[int, Mapping[str, tuple[int, int]]]
    moments: Mapping[tuple[str, int], Sequence[Moments]]  # (dataset, frames) -> one of each batch's rows
    dropped: Mapping[str, int]  # reason -> rows for pretraining that were not taken
    leaked: int  # rows of shots that are, or look like, a shot of a probe's test set; a check wants 0

    @property
    def height(self) -> int:
        """All rows."""
        return sum(len(rows) for rows in self.addresses.values())

    @property
    def datasets(self) -> list[str]:
        """Datasets that have rows, sorted."""
        return sorted({name for offsets in self.offsets.values() for name in offsets})


def select(project: Project) -> Selection:
    """Choose the rows that a trainset made now would take.

    Raises UpstreamError where `duplicates` is missing or outdated, too few batches are ready, or no row is left.
    """
    root, spec = project.root, accepted_spec(project)
    duplicates, known = _known_to_duplicates(root)
    weighted = {name for name, weight in project.corpus.weights().items() if weight > 0}
    batches = [batch for batch in sorted({*root.batches(), *root.batches("clips")}) if dataset_of(batch) in weighted]
    ready = {batch: _ready(project, spec, batch, known) for batch in batches}
    taken = tuple(sorted(batch for batch, (_, reason) in ready.items() if reason is None))
    left_out = {batch: reason for batch, (_, reason) in ready.items() if reason is not None}
    passed = sum(counts for counts, _ in ready.values())
    if passed == 0 or len(taken) / passed < project.corpus.min_complete:
        listed = "; ".join(f"{batch}: {reason}" for batch, reason in sorted(left_out.items())) or "there is none"
        needed = f"{project.corpus.min_complete:.0%} of the batches must be complete"
        raise UpstreamError(f"{len(taken)} of {passed} batches are ready, {needed}. Not taken: {listed}")
    table = read_table(f"{root.pointed('duplicates', duplicates)}/duplicates.parquet", Duplicates)
    gathered = _Gathered(spec, taken, _test_shots(project, table))
    for batch in taken:
        gathered.add(batch, *rows_of(project, spec, batch, table))
    if not gathered.parts:
        raise UpstreamError(f"no row for pretraining is left in {', '.join(taken)}: {dict(gathered.dropped)}")
    addresses, offsets = gathered.sorted()
    dropped = dict(sorted(gathered.dropped.items()))
    return Selection(spec, duplicates, taken, left_out, addresses, offsets, gathered.moments, dropped, gathered.leaked)


class _Gathered:
    """Collects what is kept of one batch after the other, so that only one batch's tables are in memory."""

    def __init__(self, spec: EncodingSpec, batches: tuple[str, ...], test_shots: pl.Series) -> None:
        self._spec, self._batches, self._test_shots = spec, batches, test_shots
        self.parts: dict[tuple[int, str], list[np.ndarray]] = {}  # addresses by (frames, dataset)
        self.moments: dict[tuple[str, int], list[Moments]] = {}
        self.dropped: Counter[str] = Counter()
        self.leaked = 0

    def add(self, batch: str, kept: pl.DataFrame, lost: pl.DataFrame) -> None:
        """Add the rows taken of one batch; `lost` are the others, with the column `why`."""
        self.dropped.update(dict(lost.group_by("why").len().iter_rows()))
        self.leaked += kept.filter(pl.col("shot_id").is_in(self._test_shots.implode())).height
        for group in kept.partition_by("dataset", "frames"):
            dataset, frames = str(group["dataset"][0]), int(group["frames"][0])
            self.parts.setdefault((frames, dataset), []).append(
                reader.addresses(group.with_columns(status=pl.lit("ok")), self._batches)
            )
            self.moments.setdefault((dataset, frames), []).append(moments(group, self._spec))

    def sorted(self) -> tuple[dict[int, np.ndarray], dict[int, dict[str, tuple[int, int]]]]:
        """Addresses and offsets as in Selection; empties `parts`, so that addresses are in memory once."""
        addresses: dict[int, np.ndarray] = {}
        offsets: dict[int, dict[str, tuple[int, int]]] = {}
        for frames in sorted({frames for frames, _ in self.parts}):
            names = sorted(name for length, name in self.parts if length == frames)
            counts = [sum(map(len, self.parts[frames, name])) for name in names]
            firsts = [sum(counts[:n]) for n in range(len(counts))]
            out = np.empty(sum(counts), ADDRESS)
            for name, first, count in zip(names, firsts, counts, strict=True):
                rows = out[first : first + count]
                np.concatenate(self.parts.pop((frames, name)), out=rows)
                # stable sort: a row id in two batches keeps their order
                rows[:] = rows[np.lexsort((rows["row_id"][:, 1], rows["row_id"][:, 0]))]
            addresses[frames] = out
            offsets[frames] = dict(zip(names, zip(firsts, counts, strict=True), strict=True))
        return addresses, offsets


def _known_to_duplicates(root: DataRoot) -> tuple[str, Mapping[str, Any]]:
    """The latest `duplicates`, and the digests of the tables that it searched, by batch.

    Raises UpstreamError where a batch with clips of a probe's test set is not among them: then it is
    not known what pretraining shares with it.
    """
    digest = read_latest(root, "duplicates")
    if digest is None:
        raise UpstreamError("'duplicates' has not been made: make 'duplicates' first")
    folder = root.pointed("duplicates", digest)
    require_checks(f"{folder}/checks.json", "duplicates")
    known = read_json(f"{folder}/duplicates.json")["inputs"]
    for batch in root.batches("clips"):
        if not batch_state(root, batch, "clips").usable or _is_known(root, batch, known):
            continue
        clips = read_table(root.table("clips", batch), Clips)
        if clips.filter(_tested()).height:
            raise UpstreamError(f"batch {batch} holds probe test clips that 'duplicates' has not seen: make it again")
    return digest, known


def _ready(project: Project, spec: EncodingSpec, batch: str, known: Mapping[str, Any]) -> tuple[bool, str | None]:
    """(whether the batch counts for `min_complete`, why it is left out or None)."""
    root = project.root
    state = batch_state(root, batch, "media", "shots", "clips", "latents", encoding=spec.digest())
    if state.failed:
        return False, f"its {state.failed[0]} did not pass their checks"
    if "clips" in state.not_made:
        return False, "its clips are not made yet"
    if "latents" in state.not_made:
        return True, "it has no latents in the accepted encoding"
    wanted = wanted_clips(project, batch)
    missing = wanted.join(LatentStore(root, spec).commits(batch), on="row_id", how="anti").height
    if missing:
        return True, f"{missing} of its {wanted.height} rows are not encoded yet"
    if not _is_known(root, batch, known):
        return True, "'duplicates' has not seen its clips as they are now"
    return True, None


def _is_known(root: DataRoot, batch: str, known: Mapping[str, Any]) -> bool:
    now = [digest_bytes(read_bytes(root.table(noun, batch))) for noun in ("shots", "clips")]
    return known.get(batch) == now


def rows_of(
    project: Project, spec: EncodingSpec, batch: str, duplicates: pl.DataFrame
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """(rows taken, rows for pretraining that are not, with `why`) of one batch.

    Columns of the rows taken: those of Lineage, and part, shard, slot (within the shard), crc32c, sums, sums_squared,
    posterior_std.
    """
    asked = wanted_clips(project, batch).filter(pl.col("uses").list.contains("pretrain"))
    stored = LatentStore(project.root, spec).commits(batch)
    unstable = asked.join(stored.filter(is_unstable()), on="row_id", how="semi")[
        "media_id"
    ]  # rows of earlier shards too
    commits = stored.select("row_id", *_STORED, committed="status").with_columns(pl.col("slot") % ROWS_PER_SHARD)
    given_way = duplicates.filter((pl.col("batch") == batch) & pl.col("dropped_from").list.contains("pretrain"))
    gone = pl.Series(sorted(withdrawn_rows(project.root)), dtype=pl.Binary)
    why = (
        pl.when(pl.col("split") != "train")
        .then(pl.lit("split"))
        .when(pl.col("media_id").is_in(unstable.implode()))
        .then(pl.lit(UNSTABLE))
        .when(pl.col("committed") != "ok")
        .then(pl.lit("not_encoded"))
        .when(pl.col("row_id").is_in(gone.implode()))
        .then(pl.lit("withdrawn"))
        .otherwise(pl.col("why"))
    )
    judged = (
        asked.join(commits, on="row_id", how="inner")
        .join(given_way.select("shot_id", why=pl.col("reason")), on="shot_id", how="left")
        .with_columns(why=why)
    )
    kept = judged.filter(pl.col("why").is_null()).select(*Lineage.column_names(), *_STORED)
    return kept, judged.filter(pl.col("why").is_not_null()).select("row_id", "why")


_STORED = ("part", "shard", "slot", "crc32c", "sums", "sums_squared", "posterior_std")


def _test_shots(project: Project, duplicates: pl.DataFrame) -> pl.Series:
    """Shots of probes' test clips and all shots in a group with one, computed from clips and groups.

    Not from `dropped_from`, so that the check `no_test_duplicate` finds mistakes there.
    """
    tested: Sequence[pl.DataFrame] = [
        read_table(project.root.table("clips", batch), Clips).filter(_tested()).select("shot_id")
        for batch in project.root.batches("clips")
    ]
    shots = pl.concat([Clips.create_empty().select("shot_id"), *tested])["shot_id"].unique()
    touched = duplicates.filter(pl.col("shot_id").is_in(shots.implode()))["group"].unique()
    near = duplicates.filter(pl.col("group").is_in(touched.implode()))["shot_id"]
    return pl.concat([shots, near]).unique().sort()


def _tested() -> pl.Expr:
    """Clips of a probe's test set."""
    probed = pl.col("uses").list.set_difference(pl.lit(["pretrain"], pl.List(pl.String))).list.len() > 0
    return (pl.col("status") == "ok") & (pl.col("split") == "test") & probed
