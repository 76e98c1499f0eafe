"""Reading every byte of a part against plan, index and commits: what a person runs after an accident.

Reports, never repairs: each problem names the file, the row where it concerns one row, and the remedy. A store that
does not answer is no damage (`is_damage`) and ends the reading; what a living writer has under way is no problem.
Shards are read by a few threads (one waits while another computes), some rows at a time into the same memory, straight
from the kernel. A part's commits are read together; whatever is not sound by them is judged again by its own commit.
"""

import io
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from storage import atomic, listing, shard
from storage.digest import crc32c
from storage.errors import is_damage
from storage.part import SEPARATORS, SWEPT, Part, StoredRow
from storage.seal import read_seal, sealed_commits

LEFTOVER_AGE_S = 3600.0  # our choice, as the cache's: what a writer left untouched for so long is not being written
# At a time: half of a core's cache of 1 MB, where the sum then finds them (256 kB to 2 MB: within 5 %).
READ_BYTES = 1 << 19
AT_ONCE = 4  # our choice: shards at a time; of an object store so many are in memory, 67 MB each


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


@contextmanager
def reported(problems: list[Problem], file: str, remedy: str, what: str = "") -> Iterator[None]:
    """Damage that ends the block is one more problem, of `file`."""
    try:
        yield
    except (OSError, ValueError) as error:
        if not is_damage(error):
            raise
        problems.append(Problem(file, None, f"{what}{error}", remedy))


def verify_part(part: Part[Any], withdrawn: frozenset[bytes], *, quick: bool = False) -> list[Problem]:
    """Problems of one part; rows in `withdrawn` must be zeros, or have none. With `quick` no shard is read."""
    problems: list[Problem] = []
    with reported(problems, part.plan_path, f"remove {part.path} and make the latents again"):
        shards = part.shards
    if problems:
        return problems
    files = listing.files_below(part.path)
    named = {path[len(part.array_path) + 2 :][:1] for path in files if path.startswith(f"{part.array_path}/c")}
    if len(found := named & set(SEPARATORS)) == 1:  # where the metadata says otherwise, that is the problem
        part.separator = found.pop()
    commits: pl.DataFrame | None = None
    with reported([], part.path, ""):  # damage is reported shard by shard
        commits = part.commits()  # together: 20 times faster than one by one
    known = {path for number in range(shards) for path in (part.shard_path(number), part.commit_path(number))}
    known |= {*part.metadata_paths, part.plan_path, part.seal_path, part.sealed_path}
    dead = atomic.leftovers(part.path, LEFTOVER_AGE_S)
    unknown = [path for path in set(files) - known if not path.startswith(f"{part.path}/lock")]  # and its owner file
    strange = sorted(path for path in unknown if path in dead or not atomic.is_temporary(path))
    problems += _metadata(part)
    problems += [Problem(path, None, "belongs to nothing in the plan", "sweep it, or remove it") for path in strange]
    problems += _seal(part, commits)
    if quick and commits is not None:
        return [*problems, *_sizes(part, commits, files)]

    def judged(number: int) -> list[Problem]:
        sound = commits is not None and _is_sound(part, number, commits, withdrawn)
        return [] if sound else _shard(part, number, files, withdrawn)

    with ThreadPoolExecutor(AT_ONCE, "verify") as pool:
        for some in pool.map(judged, range(shards)):
            problems += some
    return problems


def _metadata(part: Part[Any]) -> list[Problem]:
    """What zarr-python reads from the part's zarr.json files against what it writes for the spec and the plan."""
    import zarr

    problems: list[Problem] = []
    with tempfile.TemporaryDirectory(prefix="nextvid-") as folder:
        part.describe(Path(folder, "wanted"), part.plan.height)
        for path in part.metadata_paths:
            name = path.removeprefix(f"{part.path}/")
            found, wanted = Path(folder, "found", name), Path(folder, "wanted", name)
            remedy = f"restore it from another part of this length (shape {part.plan.height} rows)"
            found.parent.mkdir(parents=True)
            before = len(problems)
            with reported(problems, path, remedy, "cannot be read: "):
                found.write_bytes(data := atomic.read_bytes(path))
            if len(problems) > before or data == wanted.read_bytes():
                continue
            try:
                stored, known = (zarr.open(file.parent, mode="r").metadata.to_dict() for file in (found, wanted))
                strange = sorted(_keys(json.loads(data)) - _keys(json.loads(wanted.read_bytes())))
            except Exception as error:  # whatever zarr raises for bytes it does not understand
                problems.append(Problem(path, None, f"zarr cannot open it: {error}", remedy))
                continue
            wrong = sorted(key for key in {*stored, *known} if repr(stored.get(key)) != repr(known.get(key)))
            what = [f"{key} {stored.get(key)!r}, not {known.get(key)!r}" for key in wrong]
            what += [f"{key}, which zarr does not write and passes over" for key in strange if key not in wrong]
            if what:
                problems.append(Problem(path, None, f"describes {'; '.join(what)}", remedy))
    return problems


def _keys(value: Any, above: str = "") -> set[str]:  # noqa: ANN401 - JSON is Any
    """Every key of a JSON value, those inside others as `outer.inner`."""
    if isinstance(value, list):
        return {key for item in value for key in _keys(item, above)}
    if not isinstance(value, dict):
        return set()
    return {f"{above}{name}" for name in value}.union(*(_keys(item, f"{above}{name}.") for name, item in value.items()))


def _seal(part: Part[Any], commits: pl.DataFrame | None) -> list[Problem]:
    """Problems of a seal that counts: its table is to say what the commits say (None: one of them is damaged)."""
    problems: list[Problem] = []
    remedy = f"remove {part.seal_path}, and make the latents of the batch again to seal the part again"
    with reported(problems, part.seal_path, remedy):
        if read_seal(part) is None:
            return []
    if problems:
        return problems
    with reported(problems, part.sealed_path, remedy):
        sealed = sealed_commits(part, part.format.schema.column_names())
        if sealed is None or (commits is not None and not sealed.equals(commits)):
            problems.append(Problem(part.sealed_path, None, "differs from the commits that it seals", remedy))
    return problems


def _sizes(part: Part[Any], commits: pl.DataFrame, files: Mapping[str, int]) -> list[Problem]:
    """Committed shards that are missing or not as long as these commits, all of the part, say."""
    problems: list[Problem] = []
    for (number,), own in commits.group_by(pl.col("slot") // shard.ROWS_PER_SHARD, maintain_order=True):
        path, rows = part.shard_path(int(str(number))), part.rows_in(own)
        size_bytes = max(row.offset + row.size_bytes for row in rows) + shard.INDEX_BYTES
        if not all(row.reason == SWEPT for row in rows) and files.get(path) != size_bytes:
            found = "no file" if path not in files else f"{files[path]} bytes"
            what = f"{found} where {size_bytes} bytes were committed"
            problems.append(Problem(path, None, what, part.remedy(int(str(number)))))
    return problems


def _is_sound(part: Part[Any], number: int, commits: pl.DataFrame, withdrawn: frozenset[bytes]) -> bool:
    """Whether a shard is as these commits, all of the part, say; False too where they say nothing of it."""
    first, count = number * shard.ROWS_PER_SHARD, part.rows_of(number).height
    place = commits["slot"].search_sorted(first)
    own = commits[place : place + count]
    if own.height != count or own["slot"][0] != first or (own["reason"] == SWEPT).any():
        return False
    path, problems = part.shard_path(number), list[Problem]()
    with reported(problems, path, ""):
        problems += _rows(part, path, part.rows_in(own), withdrawn, "")
    return not problems


def _shard(part: Part[Any], number: int, files: Mapping[str, int], withdrawn: frozenset[bytes]) -> list[Problem]:
    """Problems of one shard, whether or not it is committed; `files` are the part's when they were listed."""
    path = part.shard_path(number)
    if part.commit_path(number) not in files:
        if path not in files or part.is_being_written():
            return []
        if not part.committed(number):  # nor since the files were listed
            what = "a shard without its commit, left by a writer that died"
            return [Problem(path, None, what, "make the latents of the batch again")]
    problems: list[Problem] = []
    remedy = part.remedy(number)
    with reported(problems, part.commit_path(number), remedy):
        rows = part.rows(number)
        if all(row.reason == SWEPT for row in rows):
            swept = "a sweep was killed before it removed this file"
            return [Problem(path, None, swept, "sweep again, or remove it")] if atomic.exists(path) else []
        with reported(problems, path, remedy, "committed, but cannot be read: "):
            return _rows(part, path, rows, withdrawn, remedy)
    return problems


def _rows(part: Part[Any], path: str, rows: list[StoredRow], withdrawn: frozenset[bytes], remedy: str) -> list[Problem]:
    """Problems of the bytes of a committed shard, whose file is `path`."""
    committed_bytes = max(row.offset + row.size_bytes for row in rows) + shard.INDEX_BYTES
    ended = Problem(path, None, "committed, but cannot be read: it ended while it was read", remedy)
    problems = []
    with atomic.reading(path) as (file, size_bytes):
        if size_bytes != committed_bytes:
            return [Problem(path, None, f"{size_bytes} bytes where {committed_bytes} were committed", remedy)]
        memory = np.empty(max(READ_BYTES, *(row.size_bytes for row in rows)), np.uint8)
        for block in _blocks(rows):
            start = block[0].offset
            if not _read_into(file, start, memory[: block[-1].offset + block[-1].size_bytes - start]):
                return [ended]
            for row in block:
                what = _fault(part, row, memory[row.offset - start :][: row.size_bytes], withdrawn)
                if what is not None:
                    problems.append(Problem(path, row.row_id.hex(), what, remedy))
        found = np.empty(shard.INDEX_BYTES, np.uint8)
        if not _read_into(file, size_bytes - shard.INDEX_BYTES, found):
            return [ended]
        if found.tobytes() != shard.index_of([(row.offset, row.size_bytes) for row in rows]):
            problems.append(Problem(path, None, "the index at its end was changed", remedy))
    return problems


def _fault(part: Part[Any], row: StoredRow, data: np.ndarray, withdrawn: frozenset[bytes]) -> str | None:
    """What is wrong with the bytes of a row."""
    if row.row_id in withdrawn and not data.any():
        return None
    if row.row_id in withdrawn and row.status == "ok":
        return "withdrawn, but its bytes are still here: withdraw the file again"
    if row.status != "ok":
        return None if part.format.is_blank(data) else f"{row.status}, but its slot holds values"
    return None if crc32c(data) == row.crc32c else "its bytes differ from their checksum"


def _blocks(rows: Sequence[StoredRow]) -> Iterator[list[StoredRow]]:
    """Rows that follow one another in the file, READ_BYTES or one row at a time. Each row is in one of them."""
    block: list[StoredRow] = []
    for row in rows:
        if block and (
            row.offset != block[-1].offset + block[-1].size_bytes
            or row.offset + row.size_bytes - block[0].offset > READ_BYTES
        ):
            yield block
            block = []
        block.append(row)
    yield block


def _read_into(file: io.RawIOBase | io.BytesIO, start: int, memory: np.ndarray) -> bool:
    """Fill memory (uint8) from this byte of a file on; whether there was so much."""
    file.seek(start)
    left = memory.data
    while left and (count := file.readinto(left)):
        left = left[count:]
    return not left
