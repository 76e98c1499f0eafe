"""Reading every byte of a part against plan, index and commits: what a person runs after an accident.

Reports, never repairs: each problem names the file, the row where it is one row's, and the remedy. The remedies are the
same everywhere, since a shard without its commit is encoded again. Must not be on any fast path.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import polars as pl

from storage import shard
from storage.digest import crc32c
from storage.errors import NExTVidError
from storage.part import SWEPT, Part, PlannedPart
from storage.shard import ROWS_PER_SHARD

P = TypeVar("P", bound=PlannedPart)


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


def verify_latents(part: Part, withdrawn: frozenset[bytes]) -> list[Problem]:
    """Problems of one part of latents; rows in `withdrawn` must be zeros."""
    return verify_part(part, _metadata, lambda number, commits: _rows(part, number, commits, withdrawn))


def verify_part(
    part: P,
    metadata: Callable[[P], Sequence[Problem]],
    rows: Callable[[int, pl.DataFrame], Sequence[Problem]],
) -> list[Problem]:
    """Problems of one part, whatever its rows are: `metadata` and `rows` (of one shard) say what they should be."""
    try:
        shards = part.shards
    except NExTVidError as error:
        return [
            Problem(f"{part.path}/plan.parquet", None, str(error), f"remove {part.path} and make the latents again")
        ]
    problems = [*metadata(part), *_leftovers(part, shards)]
    for number in range(shards):
        if part.committed(number):
            problems += _shard(part, number, rows)
        elif part.shard_path(number).exists():
            what = "a shard without its commit, left by a writer that died"
            problems.append(Problem(str(part.shard_path(number)), None, what, "make the latents of the batch again"))
    return problems


def encode_again(part: PlannedPart, number: int) -> str:
    """The remedy for damaged bytes of a shard."""
    return f"remove {part.commit_path(number)} and make the latents of batch {part.batch} again"


def _metadata(part: Part) -> list[Problem]:
    """What zarr-python reads from zarr.json against what the spec and the plan say."""
    import zarr

    path = f"{part.path}/latent/zarr.json"
    remedy = f"restore it from another part of this length (shape {part.plan.height} rows)"
    try:
        array = zarr.open_array(f"{part.path}/latent", mode="r")
        found = (array.shape, array.chunks, array.shards, str(array.dtype), array.compressors, array.filters)
        fill = float(array.fill_value)
        location = array.metadata.to_dict()["codecs"][0]["configuration"]["index_location"]
    except Exception as error:  # whatever zarr raises for bytes it does not understand
        return [Problem(path, None, f"zarr cannot open it: {error}", remedy)]
    row = part.spec.row_shape(part.frames)
    wanted = ((part.plan.height, *row), (1, *row), (ROWS_PER_SHARD, *row), "float16", (), ())
    if found != wanted or fill == fill or location != "end":  # NaN differs from itself
        return [Problem(path, None, f"describes {found}, fill {fill}, index at {location}, not {wanted}", remedy)]
    return []


def _leftovers(part: PlannedPart, shards: int) -> list[Problem]:
    """Files that the plan does not know: temporary ones, and shards or commits beyond the last."""
    known = {part.shard_path(number) for number in range(shards)} | {
        part.commit_path(number) for number in range(shards)
    }
    known |= {Path(part.path, name) for name in ("zarr.json", f"{part.array}/zarr.json", "plan.parquet", "lock")}
    strange = sorted(path for path in Path(part.path).rglob("*") if path.is_file() and path not in known)
    return [Problem(str(path), None, "belongs to nothing in the plan", "sweep it, or remove it") for path in strange]


def _shard(part: PlannedPart, number: int, rows: Callable[[int, pl.DataFrame], Sequence[Problem]]) -> Sequence[Problem]:
    path = str(part.shard_path(number))
    try:
        commits = part.commit(number)
    except NExTVidError as error:
        return [Problem(str(part.commit_path(number)), None, str(error), encode_again(part, number))]
    if (commits["reason"] == SWEPT).fill_null(False).all():
        swept = "a sweep was killed before it removed this file"
        return [Problem(path, None, swept, "sweep again, or remove it")] if Path(path).exists() else []
    return rows(number, commits)


def _rows(part: Part, number: int, commits: pl.DataFrame, withdrawn: frozenset[bytes]) -> list[Problem]:
    path, remedy = str(part.shard_path(number)), encode_again(part, number)
    row_bytes = part.spec.row_bytes(part.frames)
    wanted_bytes = shard.shard_bytes(commits.height, row_bytes)
    try:
        data = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        return [Problem(path, None, f"committed, but cannot be read: {error}", remedy)]
    if data.nbytes != wanted_bytes:
        return [Problem(path, None, f"{data.nbytes} bytes where {wanted_bytes} were committed", remedy)]
    problems = []
    if data[commits.height * row_bytes :].tobytes() != shard.index(commits.height, row_bytes):
        problems.append(Problem(path, None, "the index at its end was changed", remedy))
    rows = data[: commits.height * row_bytes].reshape(commits.height, row_bytes)
    for row, (row_id, status, crc) in zip(rows, commits.select("row_id", "status", "crc32c").iter_rows(), strict=True):
        what = _row(row, row_id, status, crc, withdrawn)
        if what is not None:
            problems.append(Problem(path, row_id.hex(), what, remedy))
    return problems


def _row(row: np.ndarray, row_id: bytes, status: str, crc: int | None, withdrawn: frozenset[bytes]) -> str | None:
    """What is wrong with one row's bytes; None where nothing is."""
    if row_id in withdrawn:
        return "withdrawn, but its bytes still stand here: withdraw the file again" if row.any() else None
    if status != "ok":
        return None if np.isnan(row.view("<f2")).all() else f"{status}, but its slot holds values"
    return None if crc32c(row) == crc else "its bytes differ from their checksum"
