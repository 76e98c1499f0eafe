"""The asset `trainset`: a frozen snapshot of the rows that pretraining reads, under one digest; and how it is opened.

The corpus grows, a run's data must not: a run reads one trainset. selection.py chooses its rows.

Axes: C channels.
"""

import bisect
import itertools
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self

import numpy as np
import polars as pl
from jaxtyping import Float32
from polars.exceptions import PolarsError

from nextvid.config.project import Project
from nextvid.encode.cap import settle_cap
from nextvid.encode.latent_stats import mixed
from nextvid.encode.plan import usable_clips
from nextvid.making.batches import dataset_of
from nextvid.making.outcome import Check, Number, Outcome
from nextvid.making.progress import OnProgress, Progress, silent
from nextvid.making.publishing import publish_latest, publish_verdict, read_latest
from nextvid.trainset.files import LINEAGE, RECORD, Frozen, gone_shards, read_sealed, rows_name, write_trainset
from nextvid.trainset.selection import Selection, select
from storage import listing
from storage.atomic import exists, remove_tree
from storage.digest import ID_BYTES, digest_bytes, digest_config
from storage.errors import ConflictError, DamagedError, RefusedError, TableError, UpstreamError
from storage.locks import locked
from storage.reader import ADDRESS, row_id
from storage.remote import is_local
from storage.root import DataRoot
from storage.schemas import Lineage
from storage.spec import EncodingSpec
from storage.store import LatentStore
from storage.tables import read_table
from storage.withdrawn import withdrawn_rows

ASSET = "trainset"
NAMED = 20  # our choice: batches that a message or an event names one by one
LENGTH = re.compile(r"f[1-9][0-9]{0,8}")  # key of `offsets`: a clip length in frames
KEPT = ("parent", "mean", "std")  # facts of a trainset that stay where its files are written again


def make_trainset(project: Project, on_progress: OnProgress = silent) -> Outcome:
    """Freeze the rows of every batch that is complete, passed its checks and was searched by the latest `duplicates`.

    Where the same rows were frozen before, nothing is written, unless files are missing or rows moved within the store.
    Raises UpstreamError where too few batches are ready or no row is left, DamagedError where frozen files have
    changed.
    """
    began = time.perf_counter()
    chosen = select(project, on_progress)
    positive = {name: weight for name, weight in sorted(project.corpus.weights().items()) if weight > 0}
    written = {name: weight for name, weight in positive.items() if name in chosen.datasets}
    weights = {name: weight / sum(written.values()) for name, weight in written.items()}  # they sum to one
    digest = _digest(chosen, weights)
    folder = project.root.pointed("trainset", digest)
    lacking = _stored(project, chosen, weights, digest, on_progress)
    total = sum(weights.values())
    checks = (
        Check("no_test_duplicate", chosen.leaked == 0, {"rows": chosen.height, "leaked": chosen.leaked}),
        Check("weights_sum_to_one", abs(total - 1) < 1e-9, {"sum": total}),
    )
    publish_verdict(f"{folder}/checks.json", ASSET, checks)
    if all(check.passed for check in checks):
        publish_latest(project.root, "trainset", digest)
    for batch in {dataset_of(batch): batch for batch in chosen.batches}.values():
        settle_cap(project, LatentStore(project.root, chosen.spec), batch)  # rows that this one lacks are encoded next
    numbers: dict[str, Number] = {f"rows_f{frames}": len(rows) for frames, rows in chosen.addresses.items()}
    numbers |= {f"weight_{name}": weight for name, weight in weights.items()}
    numbers |= {"batches": len(chosen.batches), "batches_left_out": len(chosen.left_out), "spec": chosen.spec.digest()}
    if chosen.left_out:  # trainset.json has all of them
        named = [f"{batch}: {reason}" for batch, reason in itertools.islice(sorted(chosen.left_out.items()), NAMED)]
        more = [f"and {len(chosen.left_out) - NAMED} more"] if len(chosen.left_out) > NAMED else []
        numbers["left_out"] = "; ".join(named + more)
    numbers |= {"dropped": sum(chosen.dropped.values())}
    numbers |= {f"dropped_{reason}": count for reason, count in chosen.dropped.items()}
    numbers |= {"written because": lacking} if lacking else {}
    size_bytes = sum(rows.nbytes for rows in chosen.addresses.values())
    seconds = time.perf_counter() - began
    made = lacking is not None
    return Outcome(ASSET, None, made, chosen.height, size_bytes, seconds, digest=digest, numbers=numbers, checks=checks)


class Trainset:
    """A frozen trainset, opened for reading: rows are memory-mapped, so opening costs the same at any size."""

    def __init__(self, root: DataRoot, folder: str, record: Mapping[str, Any]) -> None:
        self._root, self._folder, self._record = root, folder, record
        self._files = Frozen(root, folder, record["files"], f"remove {folder} and make 'trainset' again")
        self.digest: str = record["digest"]
        self.spec = EncodingSpec.from_json(record["spec"])
        self.parent: str | None = record.get("parent")  # the trainset that was the latest before
        self.weights: dict[str, float] = record["weights"]
        self.batches: tuple[str, ...] = tuple(record["batches"])  # an address's `batch` is an index into these
        for batch in self.batches:
            root.table("clips", batch)  # refuses what is no name
        if odd := [name for name in record["offsets"] if not LENGTH.fullmatch(name)]:
            raise ValueError(f"'offsets' has {odd[0]!r}, which is no clip length")
        self.mean: Float32[np.ndarray, " C"] = np.array(record["mean"], np.float32)
        self.std: Float32[np.ndarray, " C"] = np.array(record["std"], np.float32)

    @classmethod
    def open(cls, root: DataRoot, digest: str | None = None) -> Self:
        """The trainset of a digest, else the latest. Raises UpstreamError where there is none."""
        found = digest or read_latest(root, "trainset")
        if found is None:
            raise UpstreamError(f"{root.url}: there is no trainset yet: make 'trainset' first")
        folder = root.pointed("trainset", found)
        path, remedy = f"{folder}/{RECORD}", f"remove {folder} and make 'trainset' again"
        try:
            record = read_sealed(path, remedy)
        except UpstreamError as error:
            what = f"trainset {found} is not whole: {path} does not exist"
            raise UpstreamError(f"{what}. Put it back, or make 'trainset' again") from error
        if record.get("digest") != found:
            raise DamagedError(f"{path} describes trainset {record.get('digest')}, not that of its folder; {remedy}")
        try:
            return cls(root, folder, record)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DamagedError(f"{path} is not a trainset record ({error}); {remedy}") from error

    @property
    def lengths(self) -> tuple[int, ...]:
        """Its clip lengths in frames, ascending; 1 means images."""
        return tuple(sorted(int(name[1:]) for name in self._record["offsets"]))

    def rows(self, frames: int) -> np.ndarray:
        """Addresses of all rows of a clip length, memory-mapped; sorted by dataset, then row id.

        Raises RefusedError for a length that it lacks, DamagedError where the file is not what was frozen.
        """
        count = sum(count for _, count in self.offsets(frames).values())
        return self._files.open(rows_name(frames), ADDRESS, count)

    def offsets(self, frames: int) -> dict[str, tuple[int, int]]:
        """(first row, count) of each dataset that has rows of this length."""
        found = self._record["offsets"].get(f"f{frames}")
        if found is None:
            if self.lengths == (1,):
                raise RefusedError(
                    f"trainset {self.digest} has images alone, and nothing moves in them: recipes train on clips, with "
                    "images beside them. Add a dataset of videos to corpus.yaml and make 'trainset' again"
                )
            held = ", ".join(str(length) for length in self.lengths)
            raise RefusedError(
                f"trainset {self.digest} has no clips of {frames} frames; it has {held}. Add clips of that length in "
                "corpus.yaml and make 'trainset' again, or choose another recipe"
            )
        return {name: (int(first), int(count)) for name, (first, count) in found.items()}

    def refuse_withdrawn(self, lengths: Iterable[int]) -> None:
        """RefusedError if a row of these clip lengths was withdrawn; by a binary search in each dataset."""
        withdrawn = withdrawn_rows(self._root)
        for frames in lengths if withdrawn else ():
            rows = self.rows(frames)
            for (first, count), row in itertools.product(self.offsets(frames).values(), withdrawn):
                place = bisect.bisect_left(rows, row, first, first + count, key=row_id)
                if place < first + count and row_id(rows[place]) == row:
                    raise RefusedError(
                        f"trainset {self.digest} holds row {row.hex()}, which was withdrawn: make the trainset again "
                        "and train on the new one"
                    )

    def check(self) -> None:
        """Read every file of rows; DamagedError where one is not what was frozen."""
        self._files.check()

    def gone(self) -> list[str]:
        """One line for each part of the store that lacks shards of these rows: which, and what to do."""
        store, rows = LatentStore(self._root, self.spec), {frames: self.rows(frames) for frames in self.lengths}
        return gone_shards(store, self.batches, rows, f"trainset {self.digest}", "make 'trainset' again")

    def lineage(self, batch: str | None = None) -> pl.DataFrame:
        """The way of each row, or each of a batch, back to its file (schema Lineage); sorted by batch, then row id."""
        path = f"{self._folder}/{LINEAGE}"
        try:
            if batch is not None and is_local(path):  # without reading what parquet says is of other batches
                return Lineage.validate(pl.scan_parquet(path).filter(batch=batch).collect(), cast=True)
            whole = read_table(path, Lineage)
        except (UpstreamError, TableError, PolarsError, OSError) as error:
            raise DamagedError(f"{path} is missing or damaged; {self._files.remedy}") from error
        return whole if batch is None else whole.filter(batch=batch)

    def facts(self) -> dict[str, Any]:
        """What is kept where its files are written again."""
        return {name: self._record[name] for name in KEPT}


def _stored(
    project: Project,
    chosen: Selection,
    weights: Mapping[str, float],
    digest: str,
    on_progress: OnProgress,
) -> str | None:
    """Freeze what was chosen, if it is not frozen yet; why it was written, None where it was there."""
    folder = project.root.pointed("trainset", digest)
    if _lacking(project.root, chosen, digest, folder) is None:
        return None  # asked before the lock, which a read-only root does not allow
    with locked(f"{project.root.url}/trainset/lock"):
        lacking = _lacking(project.root, chosen, digest, folder)
        if lacking is None:
            return None  # another process wrote it meanwhile
        try:
            _freeze(project, chosen, weights, digest, on_progress)
        except ConflictError:
            if exists(folder) and _lacking(project.root, chosen, digest, folder) is None:
                return None  # as above, where there are no locks
            raise
        return lacking


def _lacking(root: DataRoot, chosen: Selection, digest: str, folder: str) -> str | None:
    """Why the folder has to be written, None where it need not; DamagedError where frozen files have changed."""
    names = set(listing.files(folder))
    if not names:
        return "it was not there"
    needed = {RECORD, LINEAGE, *(rows_name(frames) for frames in chosen.addresses)}
    if missing := sorted(needed - names):
        return f"{', '.join(missing)} were missing"
    frozen = Trainset.open(root, digest)
    if all(_same(frozen, frozen.rows(frames), chosen, rows) for frames, rows in chosen.addresses.items()):
        return None
    frozen.check()
    return "its rows moved within the store"


def _same(trainset: Trainset, frozen: np.ndarray, chosen: Selection, rows: np.ndarray) -> bool:
    """Whether frozen addresses are the chosen ones; the same batch may have another number in them."""
    numbers = {batch: number for number, batch in enumerate(chosen.batches)}
    now = np.array([numbers.get(batch, -1) for batch in trainset.batches], np.int64)
    others = [name for name in rows.dtype.names or () if name != "batch"]
    if frozen["batch"].max(initial=0) >= len(now):
        return False
    return np.array_equal(now[frozen["batch"]], rows["batch"]) and all(
        np.array_equal(frozen[name], rows[name]) for name in others
    )


def _digest(chosen: Selection, weights: Mapping[str, float]) -> str:
    """Digest of the spec, the weights and (dataset, row id, crc) in order: a row that moved is the same row."""
    rows: dict[str, dict[str, str]] = {}
    for frames, addresses in chosen.addresses.items():
        for name, (first, count) in chosen.offsets[frames].items():
            some = addresses[first : first + count]
            content = some["row_id"].astype(">u8").tobytes() + some["crc"].astype("<u4").tobytes()
            rows.setdefault(f"f{frames}", {})[name] = digest_bytes(content)
    return digest_config({"spec": chosen.spec.digest(), "weights": dict(weights), "rows": rows})


def statistics(chosen: Selection, weights: Mapping[str, float]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel [C], float64, over images and clips of the base length.

    Datasets are weighted as in the mixture; within a dataset every row weighs the same.
    """
    base = min((frames for frames in chosen.addresses if frames > 1), default=1)
    parts = []
    for name, weight in weights.items():
        found = [part for frames in sorted({1, base}) for part in chosen.moments.get((name, frames), ())]
        rows = sum(part.rows for part in found)
        parts += [(weight * part.rows / rows, part) for part in found]
    return mixed(parts)


def _freeze(
    project: Project,
    chosen: Selection,
    weights: Mapping[str, float],
    digest: str,
    on_progress: OnProgress,
) -> None:
    """Write the folder's files; over those of the same trainset where it is there."""
    folder = project.root.pointed("trainset", digest)
    mean, std = statistics(chosen, weights)
    latest = read_latest(project.root, "trainset")
    record: dict[str, Any] = {
        "digest": digest,
        "parent": latest if latest != digest else None,
        "spec": chosen.spec.to_json(),
        "weights": dict(weights),
        "mean": mean.tolist(),
        "std": std.tolist(),
        "batches": list(chosen.batches),
        "offsets": {f"f{frames}": dict(offsets) for frames, offsets in chosen.offsets.items()},
        "duplicates": chosen.duplicates,
        "left_out": dict(chosen.left_out),
        "dropped": dict(chosen.dropped),
    }
    there = bool(listing.files(folder))
    before = Trainset.open(project.root, digest) if exists(f"{folder}/{RECORD}") else None
    if before is not None:
        record |= before.facts()
    if before is None or before.batches != chosen.batches:
        for name in listing.files(folder):
            if name.startswith("pixels.") and name.endswith(".json"):
                remove_tree(f"{folder}/{name}")  # they count batches as the rows did; frozen again when asked for
    write_trainset(folder, record, chosen.addresses, _lineage(project, chosen, on_progress), over=there)


def _lineage(project: Project, chosen: Selection, on_progress: OnProgress) -> Iterator[pl.DataFrame]:
    """Lineage of the chosen rows, one batch at a time, sorted by row id; read again, since it is too large to keep.

    Raises ConflictError where a batch's clips are no longer those that were chosen.
    """
    order = {frames: np.argsort(rows["batch"], kind="stable") for frames, rows in chosen.addresses.items()}
    for number, batch in enumerate(chosen.batches):
        ids: list[bytes] = []
        for frames, rows in chosen.addresses.items():
            first, last = np.searchsorted(rows["batch"], (number, number + 1), sorter=order[frames])
            data = rows["row_id"][order[frames][first:last]].astype(">u8").tobytes()
            ids += [data[start : start + ID_BYTES] for start in range(0, len(data), ID_BYTES)]
        wanted = usable_clips(project, batch).filter(pl.col("uses").list.contains("pretrain"))
        taken = pl.DataFrame({"row_id": ids}, schema={"row_id": pl.Binary})
        lines = wanted.select(Lineage.column_names()).join(taken, on="row_id", how="semi").sort("row_id")
        if lines["row_id"].to_list() != sorted(ids):
            raise ConflictError(f"batch {batch} changed while its rows were frozen: make 'trainset' again")
        yield lines
        on_progress(Progress("trainset lineage", number + 1, len(chosen.batches)))
