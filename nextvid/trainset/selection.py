"""Choose the batches and rows of a trainset, with the reason for each that is left out.

A batch is taken if its clips and latents passed their checks, each row that should be stored has a commit in the
accepted encoding, and the latest `duplicates` searched its current tables. A row is taken if it is for pretraining, in
split train, below the dataset's cap, encoded, not dropped as a duplicate and not withdrawn. The tables of AT_ONCE
batches are in memory at a time, and 32 bytes of each row: 10 million rows fit in 2 GB (benchmarks/manifests.py).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import polars as pl

from nextvid.config.project import Project
from nextvid.encode.cap import below_bound
from nextvid.encode.latent_stats import Moments, moments
from nextvid.encode.plan import UNSTABLE, accepted_spec, is_unstable, usable_clips, within_cap
from nextvid.making.batches import batch_state, dataset_of
from nextvid.making.progress import OnProgress, Progress, silent
from nextvid.making.publishing import read_latest
from storage import reader
from storage.atomic import read_bytes
from storage.digest import digest_bytes
from storage.errors import UpstreamError
from storage.reader import ADDRESS
from storage.records import read_record
from storage.root import DataRoot
from storage.schemas import Clips, Duplicates, Lineage
from storage.shard import ROWS_PER_SHARD
from storage.spec import EncodingSpec
from storage.store import LatentStore
from storage.tables import decode_columns, read_table, require_checks
from storage.withdrawn import is_withdrawn

AT_ONCE = 2  # our choice: batches, of which one waits for its files while another is computed; each takes 150 MB


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


def select(project: Project, on_progress: OnProgress = silent) -> Selection:
    """Choose the rows that a trainset made now would take: one pass over the batches, a few at a time.

    Raises UpstreamError where `duplicates` is missing or outdated, too few batches are ready, or no row is left.
    """
    root, spec = project.root, accepted_spec(project)
    digest, known, tested = _known_to_duplicates(root, on_progress)
    table = read_table(f"{root.pointed('duplicates', digest)}/duplicates.parquet", Duplicates)
    weighted = {name for name, weight in project.corpus.weights().items() if weight > 0}
    batches = [batch for batch in sorted({*root.batches(), *root.batches("clips")}) if dataset_of(batch) in weighted]
    # near test clips: by groups, not by `dropped_from`, so that the check `no_test_duplicate` finds mistakes there
    touched = table.filter(pl.col("shot_id").is_in(tested.implode()))["group"].unique()
    near = table.filter(pl.col("group").is_in(touched.implode()))["shot_id"]
    leaking, gone = pl.concat([tested, near]).unique().sort(), is_withdrawn(root)
    with ThreadPoolExecutor(AT_ONCE, "select") as pool:
        passed_over = pool.map(lambda batch: _read(project, spec, batch, batch in known, table, gone, leaking), batches)
        found: dict[str, _Batch] = {}
        for batch, one in zip(batches, passed_over, strict=True):
            found[batch] = one
            on_progress(Progress("trainset rows", len(found), len(batches)))
    taken = tuple(batch for batch in batches if found[batch].reason is None)
    left_out = {batch: reason for batch in batches if (reason := found[batch].reason) is not None}
    passed = sum(one.counts for one in found.values())
    if passed == 0 or len(taken) / passed < project.corpus.min_complete:
        listed = "; ".join(f"{batch}: {reason}" for batch, reason in sorted(left_out.items())) or "there is none"
        needed = f"{project.corpus.min_complete:.0%} of the batches must be complete"
        raise UpstreamError(f"{len(taken)} of {passed} batches are ready, {needed}. Not taken: {listed}")
    read = [found.pop(batch) for batch in taken]
    dropped = dict(sorted(sum((one.dropped for one in read), Counter[str]()).items()))
    if not any(one.rows for one in read):
        raise UpstreamError(f"no row for pretraining is left in {', '.join(taken)}: {dropped}")
    by_dataset: dict[tuple[str, int], list[Moments]] = {}
    for key, part in (item for one in read for item in one.moments.items()):
        by_dataset.setdefault(key, []).append(part)
    leaked = sum(one.leaked for one in read)
    addresses, offsets = _sorted(read)
    return Selection(spec, digest, taken, left_out, addresses, offsets, by_dataset, dropped, leaked)


@dataclass(frozen=True)
class _Batch:
    """What the pass over one batch found; rows and moments by (dataset, frames) of a batch that is taken."""

    counts: bool  # whether it counts for `min_complete`
    reason: str | None  # why it is left out
    rows: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)  # addresses, whose `batch` is not set
    moments: Mapping[tuple[str, int], Moments] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)
    leaked: int = 0


def _read(
    project: Project,
    spec: EncodingSpec,
    batch: str,
    known: bool,
    duplicates: pl.DataFrame,
    gone: pl.Expr,
    leaking: pl.Series,
) -> _Batch:
    """Judge one batch and read the rows that are taken: its clips and its commits once."""
    state = batch_state(project.root, batch, "media", "shots", "clips", "latents", encoding=spec.digest())
    if state.failed:
        return _Batch(False, f"its {state.failed[0]} did not pass their checks")
    if "clips" in state.not_made:
        return _Batch(False, "its clips are not made yet")
    if "latents" in state.not_made:
        return _Batch(True, "it has no latents in the accepted encoding")
    wanted, stored = usable_clips(project, batch), LatentStore(project.root, spec).commits(batch, columns=_STORED)
    needed = wanted.filter(within_cap(project, batch) & ~gone)
    if missing := needed.join(stored, on="row_id", how="anti").height:
        return _Batch(True, f"{missing} of its {needed.height} rows are not encoded yet")
    if not known:
        return _Batch(True, "'duplicates' has not seen its clips as they are now")
    below = below_bound(project, dataset_of(batch))
    kept, lost = rows_of(wanted, stored, duplicates.filter(pl.col("batch") == batch), gone, below)
    rows: dict[tuple[str, int], np.ndarray] = {}
    found: dict[tuple[str, int], Moments] = {}
    for group in kept.partition_by("dataset", "frames"):
        key = str(group["dataset"][0]), int(group["frames"][0])
        rows[key], found[key] = reader.addresses(group, [batch]), moments(group, spec)
    dropped = Counter[str](dict(lost.group_by("why").len().iter_rows()))
    return _Batch(True, None, rows, found, dropped, kept.filter(pl.col("shot_id").is_in(leaking.implode())).height)


def _sorted(read: Sequence[_Batch]) -> tuple[dict[int, np.ndarray], dict[int, dict[str, tuple[int, int]]]]:
    """Addresses and offsets as in Selection; empties the rows of each batch, so that addresses are in memory once."""
    addresses: dict[int, np.ndarray] = {}
    offsets: dict[int, dict[str, tuple[int, int]]] = {}
    keys = sorted({key for one in read for key in one.rows})
    for frames in sorted({frames for _, frames in keys}):
        names = [name for name, length in keys if length == frames]
        counts = [sum(len(one.rows.get((name, frames), ())) for one in read) for name in names]
        firsts = [sum(counts[:n]) for n in range(len(counts))]
        out = np.empty(sum(counts), ADDRESS)
        for name, first, count in zip(names, firsts, counts, strict=True):
            rows, end = out[first : first + count], 0
            for number, one in enumerate(read):
                here = one.rows.pop((name, frames), rows[:0])
                rows[end : end + len(here)] = here
                rows["batch"][end : end + len(here)] = number
                end += len(here)
            # stable sort: a row id in two batches keeps their order
            rows[:] = rows[np.lexsort((rows["row_id"][:, 1], rows["row_id"][:, 0]))]
        addresses[frames] = out
        offsets[frames] = dict(zip(names, zip(firsts, counts, strict=True), strict=True))
    return addresses, offsets


def _known_to_duplicates(root: DataRoot, on_progress: OnProgress) -> tuple[str, set[str], pl.Series]:
    """The latest `duplicates`, the batches whose tables it searched as they are, and the shots of probes' test clips.

    Raises UpstreamError where a batch with such clips is not among these batches: then it is not known what pretraining
    shares with it.
    """
    digest = read_latest(root, "duplicates")
    if digest is None:
        raise UpstreamError("'duplicates' has not been made: make 'duplicates' first")
    folder = root.pointed("duplicates", digest)
    require_checks(f"{folder}/checks.json", "duplicates")
    inputs = read_record(f"{folder}/duplicates.json")["inputs"]

    def look(batch: str) -> tuple[bool, pl.Series]:
        path, searched = root.table("clips", batch), inputs.get(batch)
        clips = read_bytes(path)
        table = decode_columns(clips, Clips, ("shot_id", "status", "split", "uses"), path)
        is_known = searched is not None and searched == [
            digest_bytes(read_bytes(root.table("shots", batch))),
            digest_bytes(clips),
        ]
        probed = pl.col("uses").list.set_difference(pl.lit(["pretrain"], pl.List(pl.String))).list.len() > 0
        tested = (pl.col("status") == "ok") & (pl.col("split") == "test") & probed
        return is_known, table.filter(tested)["shot_id"]

    known: set[str] = set()
    tested = [Clips.create_empty()["shot_id"]]
    batches = root.batches("clips")
    with ThreadPoolExecutor(AT_ONCE, "select") as pool:
        for number, (batch, (is_known, shots)) in enumerate(zip(batches, pool.map(look, batches), strict=True), 1):
            on_progress(Progress("trainset clips", number, len(batches)))
            if not is_known and len(shots) and batch_state(root, batch, "clips").usable:
                raise UpstreamError(
                    f"batch {batch} holds probe test clips that 'duplicates' has not seen: make it again"
                )
            known |= {batch} if is_known else set()
            tested.append(shots.unique())
    return digest, known, pl.concat(tested).unique()


def rows_of(
    wanted: pl.DataFrame, stored: pl.DataFrame, duplicates: pl.DataFrame, gone: pl.Expr, below: pl.Expr
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """(rows taken, rows for pretraining that are not, with `why`) of one batch.

    From its clips with a use, their commits (`LatentStore.commits`), its lines of `duplicates`, and which rows are
    withdrawn (`gone`) and `below` the dataset's cap. Columns of the rows taken: those of Lineage, and status, part,
    shard, slot (within the shard), crc32c, sums, sums_squared, posterior_std.
    """
    asked = wanted.filter(pl.col("uses").list.contains("pretrain"))
    # rows of earlier shards too
    unstable = asked.join(stored.filter(is_unstable()), on="row_id", how="semi")["media_id"]
    commits = stored.select(
        "row_id", "part", "shard", *_STORED, committed="status", slot=pl.col("slot") % ROWS_PER_SHARD
    )
    given_way = duplicates.filter(pl.col("dropped_from").list.contains("pretrain"))
    why = (
        pl.when(~below)
        .then(pl.lit("over_cap"))
        .when(pl.col("split") != "train")
        .then(pl.lit("split"))
        .when(pl.col("media_id").is_in(unstable.implode()))
        .then(pl.lit(UNSTABLE))
        .when(gone)
        .then(pl.lit("withdrawn"))
        .when(pl.col("committed").ne_missing("ok"))
        .then(pl.lit("not_encoded"))
        .otherwise(pl.col("why"))
    )
    judged = (
        asked.select(*Lineage.column_names(), "split")
        .join(commits, on="row_id", how="left")
        .join(given_way.select("shot_id", why=pl.col("reason")), on="shot_id", how="left")
        .with_columns(why=why)
    )
    kept = judged.filter(pl.col("why").is_null()).drop("why", "split", "reason").rename({"committed": "status"})
    return kept, judged.filter(pl.col("why").is_not_null()).select("row_id", "why")


_STORED = ("reason", "crc32c", "sums", "sums_squared", "posterior_std")
