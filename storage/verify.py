"""Reading every byte of a part against plan, index and commits: what a person runs after an accident.

Reports, never repairs: each problem names the file, the row where it is one row's, and the remedy. The remedies are the
same everywhere, since a shard without its commit is encoded again. What does not answer is no damage (`is_damage`) and
ends the reading; what a living writer has under way is no problem. A disk is read as fast as it reads: shards by a few
threads (one waits while another computes), each row into the same memory. Must not be on any fast path.
"""

import json
import tempfile
from collections.abc import Callable, Container, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path

import numpy as np
import polars as pl
from jaxtyping import UInt8

from storage import atomic, listing, shard
from storage.digest import crc32c
from storage.errors import DamagedError, is_damage
from storage.part import SWEPT, Part, PlannedPart

LITTER_AGE_S = 3600.0  # our choice, as the cache's: what a writer left untouched for so long is not being written
AT_ONCE = 4  # our choice: shards at a time; of an object store so many are in memory, 67 MB each
OTHER_BYTES = "holds other bytes than were committed (or a withdrawn row)"  # what readers say of a row


@dataclass(frozen=True)
class Problem:
    """One finding: `file`, the `row` id (hex) if it concerns one row, `what` is wrong and the `remedy`."""

    file: str
    row: str | None
    what: str
    remedy: str

    def __str__(self) -> str:
        row = "" if self.row is None else f", row {self.row}"
        return f"{self.file}{row}: {self.what}. Remedy: {self.remedy}"


RowsOf = Callable[[int, pl.DataFrame], Sequence[Problem]]  # a shard's number and commits -> what is wrong with its rows


def verify_latents(part: Part, withdrawn: frozenset[bytes]) -> list[Problem]:
    """Problems of one part of latents; rows in `withdrawn` must be zeros."""
    return verify_part(part, lambda number, commits: _rows(part, number, commits, withdrawn))


def verify_part(part: PlannedPart, rows: RowsOf) -> list[Problem]:
    """Problems of one part, whatever its rows are: `rows`, given the commits of one shard, finds those of its bytes."""
    try:
        shards = part.shards
    except (OSError, ValueError) as error:
        if not is_damage(error):
            raise
        return [
            Problem(f"{part.path}/plan.parquet", None, str(error), f"remove {part.path} and make the latents again")
        ]
    files = listing.files_below(part.path)
    problems = [*_metadata(part), *_leftovers(part, shards, files)]
    with ThreadPoolExecutor(AT_ONCE, "verify") as pool:
        for found in pool.map(lambda number: _found(part, number, files, rows), range(shards)):
            problems += found
    return problems


def _found(part: PlannedPart, number: int, files: Container[str], rows: RowsOf) -> Sequence[Problem]:
    """Problems of one shard, whether or not it is committed."""
    if part.commit_path(number) in files:
        return _shard(part, number, rows)
    if part.shard_path(number) in files and not part.is_being_written():
        if part.committed(number):  # since the files were listed
            return _shard(part, number, rows)
        what = "a shard without its commit, left by a writer that died"
        return [Problem(part.shard_path(number), None, what, "make the latents of the batch again")]
    return []


def encode_again(part: PlannedPart, number: int) -> str:
    """The remedy for a shard that cannot be read."""
    if part.committed(number):
        return f"remove {part.commit_path(number)} and make the latents of batch {part.batch} again"
    return f"make the latents of batch {part.batch} again, and 'trainset', whose rows stand elsewhere then"


def _metadata(part: PlannedPart) -> list[Problem]:
    """What zarr-python reads from the part's zarr.json files against what it writes for the spec and the plan."""
    import zarr

    problems = []
    with tempfile.TemporaryDirectory(prefix="nextvid-") as folder:
        part.describe(Path(folder, "wanted"), part.plan.height)
        for path in part.metadata_paths:
            name = path.removeprefix(f"{part.path}/")
            found, wanted = Path(folder, "found", name), Path(folder, "wanted", name)
            remedy = f"restore it from another part of this length (shape {part.plan.height} rows)"
            found.parent.mkdir(parents=True)
            try:
                data = atomic.read_bytes(path)
            except (OSError, ValueError) as error:
                if not is_damage(error):
                    raise
                problems.append(Problem(path, None, f"cannot be read: {error}", remedy))
                continue
            found.write_bytes(data)
            try:
                said, known = (zarr.open(file.parent, mode="r").metadata.to_dict() for file in (found, wanted))
                strange = sorted(set(json.loads(found.read_bytes())) - set(json.loads(wanted.read_bytes())))
            except Exception as error:  # whatever zarr raises for bytes it does not understand
                problems.append(Problem(path, None, f"zarr cannot open it: {error}", remedy))
                continue
            wrong = sorted(key for key in {*said, *known} if repr(said.get(key)) != repr(known.get(key)))
            what = [f"{key} {said.get(key)!r}, not {known.get(key)!r}" for key in wrong]
            what += [f"{key}, which zarr does not write and passes over" for key in strange if key not in wrong]
            if what:
                problems.append(Problem(path, None, f"describes {'; '.join(what)}", remedy))
    return problems


def _leftovers(part: PlannedPart, shards: int, files: Iterable[str]) -> list[Problem]:
    """Files that the plan does not know: temporary ones of dead writers, and shards or commits beyond the last."""
    known = {part.shard_path(number) for number in range(shards)} | {
        part.commit_path(number) for number in range(shards)
    }
    known |= {*part.metadata_paths, f"{part.path}/plan.parquet", f"{part.path}/lock"}
    dead = atomic.litter(part.path, LITTER_AGE_S)
    strange = sorted(path for path in set(files) - known if path in dead or not atomic.is_temporary(path))
    return [Problem(path, None, "belongs to nothing in the plan", "sweep it, or remove it") for path in strange]


def _shard(part: PlannedPart, number: int, rows: RowsOf) -> Sequence[Problem]:
    path = part.shard_path(number)
    try:
        commits = part.commit(number)
    except (OSError, ValueError) as error:
        if not is_damage(error):
            raise
        return [Problem(part.commit_path(number), None, str(error), encode_again(part, number))]
    if (commits["reason"] == SWEPT).fill_null(False).all():
        swept = "a sweep was killed before it removed this file"
        return [Problem(path, None, swept, "sweep again, or remove it")] if atomic.exists(path) else []
    return rows(number, commits)


def _rows(part: Part, number: int, commits: pl.DataFrame, withdrawn: frozenset[bytes]) -> list[Problem]:
    path, remedy = part.shard_path(number), encode_again(part, number)
    row_bytes = part.spec.row_bytes(part.frames)
    wanted_bytes = shard.shard_bytes(commits.height, row_bytes)
    problems = []
    try:
        with atomic.reading(path) as (file, size_bytes):
            if size_bytes != wanted_bytes:
                return [Problem(path, None, f"{size_bytes} bytes where {wanted_bytes} were committed", remedy)]
            row = np.empty(row_bytes, np.uint8)
            for row_id, status, crc in commits.select("row_id", "status", "crc32c").iter_rows():
                fill(row, file)
                what = _row(part, row, row_id, status, crc, withdrawn)
                if what is not None:
                    problems.append(Problem(path, row_id.hex(), what, remedy))
            if file.read() != shard.index(commits.height, row_bytes):
                problems.append(Problem(path, None, "the index at its end was changed", remedy))
    except (OSError, ValueError) as error:
        if not is_damage(error):
            raise
        return [Problem(path, None, f"committed, but cannot be read: {error}", remedy)]
    return problems


def fill(row: UInt8[np.ndarray, " bytes"], file: BufferedIOBase) -> None:
    """The next bytes of a file into memory that is used again; DamagedError where it ends before."""
    if file.readinto(row.data) != row.nbytes:
        raise DamagedError("it ended while it was read")


def _row(
    part: Part,
    row: UInt8[np.ndarray, " bytes"],
    row_id: bytes,
    status: str,
    crc: int | None,
    withdrawn: frozenset[bytes],
) -> str | None:
    """What is wrong with one row's bytes; None where nothing is."""
    if row_id in withdrawn:
        return "withdrawn, but its bytes still stand here: withdraw the file again" if row.any() else None
    if status != "ok":
        values = shard.unpacked(row, part.spec.storage, part.spec.row_shape(part.frames))
        return None if np.isnan(values).all() else f"{status}, but its slot holds values"
    return None if crc32c(row) == crc else "its bytes differ from their checksum"
