"""Tables on disk: parquet with a schema, written whole, read whole or refused; and the JSON of their checks.

Every table carries the crc32c of its own file in its parquet metadata (computed with that field zeroed), since parquet
readers find flipped bytes only by luck; any parquet reader still opens it. Dtypes are widened, never bent: strings
become enums, integers another width if they fit; all else that breaks the schema is a TableError.
"""

import functools
import io
import itertools
import json
import math
import mmap
import re
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import dataframely as dy
import numpy as np
import polars as pl
from polars.exceptions import PolarsError

from storage import atomic, remote
from storage.digest import crc32c
from storage.errors import DamagedError, TableError, UpstreamError
from storage.records import FORMAT, publish_record, read_record, refuse_newer
from storage.root import DataRoot, Table

_KEY = "nextvid.crc32c"
_BLANK = b"crc32c=00000000"
_FIELD = re.compile(rb"crc32c=[0-9a-f]{8}(?: format=([0-9]{1,9}))?")  # release 0.1.0 wrote no format
_SEALED = f"{_BLANK.decode()} format={FORMAT}"
_NOT_WRITTEN = "Nothing was written: what is to be stored is at fault, not the disk; please report it"
_OTHER_WRITER = "Another version or program wrote it: remove it and make it again"


def write_table(path: str, frame: pl.DataFrame, schema: type[dy.Schema]) -> None:
    """Check `frame` against its schema and publish it as parquet; TableError, and nothing written, if it breaks it."""
    atomic.publish_bytes(path, encode_table(frame, schema, path))


def encode_table(frame: pl.DataFrame, schema: type[dy.Schema], path: str) -> bytes:
    """Parquet bytes of a checked table, sealed with their own crc32c. `path` is for messages only."""
    return _sealed(_checked(frame, schema, path, _NOT_WRITTEN))


def _sealed(checked: pl.DataFrame) -> bytes:
    buffer = io.BytesIO()
    checked.write_parquet(buffer, metadata={_KEY: _SEALED})
    data = buffer.getvalue()
    start = data.rindex(_BLANK)  # the footer is at the end
    return data[:start] + b"crc32c=%08x" % crc32c(data) + data[start + len(_BLANK) :]


def write_many(frames: Mapping[str, pl.DataFrame], schema: type[dy.Schema]) -> None:
    """`write_table` of frames by path, checked as one table: small tables take a third of the time."""
    if not frames:
        return
    whole = _checked(pl.concat(frames.values(), rechunk=True), schema, f"{next(iter(frames))} and others", _NOT_WRITTEN)
    ends = itertools.accumulate(frame.height for frame in frames.values())
    parts = [(path, whole[end - frame.height : end]) for (path, frame), end in zip(frames.items(), ends, strict=True)]
    with ThreadPoolExecutor(remote.SMALL_AT_ONCE) as pool:  # on a file system, too, most of the time is waiting: fsync
        list(pool.map(lambda part: atomic.publish_bytes(part[0], _sealed(part[1])), parts))


def write_tables(path: str, frames: Iterable[pl.DataFrame], schema: type[dy.Schema]) -> None:
    """`write_table` of frames one under the other, with one of them in memory at a time; `path` is local.

    Each is checked alone: that no key is in two frames is for the caller to know.
    """
    with tempfile.TemporaryDirectory(dir=Path(path).parent, prefix="parts-") as folder:
        parts = [f"{folder}/empty.parquet"]
        write_table(parts[0], schema.create_empty(), schema)
        for number, frame in enumerate(frames):
            parts.append(f"{folder}/{number}.parquet")
            write_table(parts[-1], frame, schema)
        with atomic.staged_file(path) as temporary:
            pl.scan_parquet(parts).sink_parquet(temporary, metadata={_KEY: _SEALED})
            found = crc32c(np.memmap(temporary, np.uint8, "r"))
            with atomic.naming(temporary), temporary.open("r+b") as file:
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
                    start = memory.rfind(_BLANK)  # the footer is at the end
                file.seek(start)
                file.write(b"crc32c=%08x" % found)


def read_table(path: str, schema: type[dy.Schema]) -> pl.DataFrame:
    """The table at `path`; UpstreamError where there is none, TableError where it is damaged or breaks its schema."""
    return decode_table(atomic.read_bytes(path), schema, path)


def decode_table(data: bytes, schema: type[dy.Schema], path: str) -> pl.DataFrame:
    """Table of parquet bytes, checked against their seal and the schema."""
    _check_seal(data, path)
    try:
        frame = pl.read_parquet(io.BytesIO(data))
    except PolarsError as error:
        raise TableError(f"{path} cannot be read as parquet ({error}): remove it and make it again") from error
    return _checked(frame, schema, path, _OTHER_WRITER)


def seal(path: str) -> tuple[int, int]:
    """(crc32c, size in bytes) of a table whose bytes are as they were written: another table has another seal.

    Far cheaper than reading it. Raises as `read_table` does, but for broken rules, which are not looked at.
    """
    return seal_of(atomic.read_bytes(path), path)


def seal_of(data: bytes, path: str) -> tuple[int, int]:
    """`seal` of a table's parquet bytes. `path` is for messages only."""
    return _check_seal(data, path), len(data)


def read_tables(root: DataRoot, noun: Table, batches: Sequence[str] | None, schema: type[dy.Schema]) -> pl.DataFrame:
    """Tables of these batches one under the other (all that exist for None); an empty frame where there are none."""
    return read_many([root.table(noun, key) for key in (root.batches(noun) if batches is None else batches)], schema)


def read_many(paths: Sequence[str], schema: type[dy.Schema]) -> pl.DataFrame:
    """`read_table` of these tables one under the other; an empty frame for no table."""
    if not paths:
        return schema.create_empty()
    read = remote.at_once(paths[0], atomic.read_bytes, paths)
    for data, path in zip(read, paths, strict=True):
        _check_seal(data, path)
    files: list[IO[bytes]] = [io.BytesIO(data) for data in read]
    try:  # all in one go, 20 times faster than each for itself by our measurement on tables of four rows
        together = pl.read_parquet(files)
        if together.schema == _dtypes(schema) and schema.is_valid(together):
            return together
    except PolarsError:
        pass  # their dtypes differ
    # dtypes to widen, or a table to name
    return pl.concat([decode_table(data, schema, path) for data, path in zip(read, paths, strict=True)])


def decode_columns(data: bytes, schema: type[dy.Schema], columns: Sequence[str], path: str) -> pl.DataFrame:
    """Some columns of a table's parquet bytes, in this order. The bytes are checked against their seal.

    Rules of the schema are not: they were when the table was written, and no byte has changed since.
    """
    _check_seal(data, path)
    try:
        frame = pl.read_parquet(io.BytesIO(data), columns=list(columns))
        return frame.select(pl.col(name).cast(_dtypes(schema)[name]) for name in columns)
    except PolarsError as error:
        raise TableError(f"{path} is no table of {schema.__name__} ({error}). {_OTHER_WRITER}") from error


def missing_rows(wanted: pl.DataFrame, done: pl.DataFrame, on: str | Sequence[str]) -> pl.DataFrame:
    """Rows of `wanted`, in their order, whose key `on` is not in `done`."""
    return wanted.join(done.select(on), on=on, how="anti", maintain_order="left")


def read_arrays(path: str, remedy: str) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, whose parts have checksums. DamagedError with the remedy where it is not one."""
    data = atomic.read_bytes(path)
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            found = dict(arrays.items())
            if other := [name for name, array in found.items() if not isinstance(array, np.ndarray)]:
                raise ValueError(f"{other[0]} is no array")
            return found
    except (OSError, EOFError, KeyError, ValueError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise DamagedError(f"{path} is damaged ({type(error).__name__}: {error}): {remedy}") from error


def publish_checks(
    path: str, asset: str, checks: Sequence[Mapping[str, Any]], made_from: Mapping[str, str] | None = None
) -> None:
    """Write the checks of an asset: mappings with `name`, `passed`, and, where known, numbers, blocking, description.

    `made_from` is what the asset was made from, a digest by name. A check without `blocking` blocks. Numbers
    that are not finite are written as text, since JSON has none.
    """
    plain = [_plain(check) for check in checks]
    passed = all(check["passed"] for check in plain if check.get("blocking", True))
    publish_record(path, {"asset": asset, "passed": passed, "made_from": dict(made_from or {}), "checks": plain})


def read_checks(path: str) -> dict[str, Any] | None:
    """What `publish_checks` wrote, or None where nothing was published.

    Files of before release 0.1 do not tell what their asset was made from: `made_from` is empty.
    """
    try:
        found = read_record(path, "remove it and make the asset again")
    except UpstreamError:
        return None
    if not isinstance(found, dict) or not isinstance(found.get("passed"), bool):
        raise TableError(f"{path} is no file of checks: remove it and make the asset again")
    return {"made_from": {}} | found


def require_checks(path: str, asset: str) -> None:
    """UpstreamError unless the checks of `asset` at `path` exist and no blocking one failed."""
    found = read_checks(path)
    if found is None:
        raise UpstreamError(f"'{asset}' has not been made: {path} does not exist. Make '{asset}' first")
    if found.get("asset") != asset:
        raise TableError(f"{path} holds the checks of '{found.get('asset')}', not of '{asset}'")
    if not found["passed"]:
        blocking = [check for check in found["checks"] if check.get("blocking", True) and not check["passed"]]
        failed = "; ".join(f"{check['name']} {json.dumps(check.get('numbers', {}))}" for check in blocking)
        raise UpstreamError(f"'{asset}' failed its checks ({path}): {failed}")


def _plain(value: Any) -> Any:  # noqa: ANN401 - JSON is Any
    match value:
        case np.generic():
            return _plain(value.item())
        case float() if not math.isfinite(value):
            return str(value)
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case _:
            return value


def _check_seal(data: bytes, path: str) -> int:
    # the footer, which ends with its length (4 bytes, little-endian) and the magic
    footer_bytes = int.from_bytes(data[-8:-4], "little") + 8 if data[-4:] == b"PAR1" and len(data) >= 12 else 0
    for field in list(_FIELD.finditer(data, max(0, len(data) - footer_bytes)))[::-1]:
        blank = data[: field.start()] + _BLANK + data[field.start() + len(_BLANK) :]
        if field.group().startswith(b"crc32c=%08x" % (found_crc := crc32c(blank))):
            refuse_newer(path, int(field[1] or FORMAT))
            return found_crc
    raise TableError(f"{path} is damaged: its bytes differ from their checksum. Remove it and make it again")


def _checked(frame: pl.DataFrame, schema: type[dy.Schema], path: str, remedy: str) -> pl.DataFrame:
    """The frame in the schema's dtypes, if it keeps its rules; `remedy` ends the message of the TableError."""
    widened = _widened(frame, schema, path, remedy)
    if schema.is_valid(widened):  # a third faster than `validate` by our measurement, which copies the frame
        return widened
    try:
        return schema.validate(widened)
    except (dy.exc.ValidationError, dy.exc.SchemaError) as error:
        raise TableError(f"{path} breaks the rules of {schema.__name__}: {error}. {remedy}") from error


def _widened(frame: pl.DataFrame, schema: type[dy.Schema], path: str, remedy: str) -> pl.DataFrame:
    """Columns of the schema in its order and dtypes; TableError where a column is missing, unknown or would change."""
    wanted = _dtypes(schema)
    if frame.schema == wanted:
        return frame
    if set(frame.columns) != set(wanted):
        missing, unknown = sorted(set(wanted) - set(frame.columns)), sorted(set(frame.columns) - set(wanted))
        raise TableError(f"{path}: columns of {schema.__name__} missing: {missing}, unknown: {unknown}. {remedy}")
    for name, dtype in wanted.items():
        if not _fits(frame.schema[name], dtype):
            raise TableError(
                f"{path}: column '{name}' is {frame.schema[name]}, {schema.__name__} wants {dtype}. {remedy}"
            )
    try:
        return frame.select(pl.col(name).cast(dtype) for name, dtype in wanted.items())
    except PolarsError as error:
        raise TableError(f"{path}: a value does not fit {schema.__name__}: {error}. {remedy}") from error


@functools.cache
def _dtypes(schema: type[dy.Schema]) -> pl.Schema:
    """Columns of a schema in order; the same for as long as the program runs."""
    return schema.create_empty().schema


def _fits(found: pl.DataType, wanted: pl.DataType) -> bool:
    """Whether a strict cast keeps the meaning; a value out of range still fails in the cast itself."""
    if found == wanted or found == pl.Null:
        return True
    if isinstance(wanted, pl.List):
        return isinstance(found, pl.List) and _fits(_inner(found), _inner(wanted))
    if isinstance(wanted, pl.Enum):
        return found in (pl.String, pl.Categorical) or isinstance(found, pl.Enum)
    if isinstance(wanted, pl.Datetime):
        return isinstance(found, pl.Datetime) and found.time_zone == wanted.time_zone and found.time_unit != "ns"
    if wanted.is_integer():
        return found.is_integer()
    return wanted.is_float() and found.is_numeric()


def _inner(dtype: pl.List) -> pl.DataType:
    return dtype.inner() if isinstance(dtype.inner, type) else dtype.inner
