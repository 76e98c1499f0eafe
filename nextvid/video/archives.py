"""Media files inside other files: members of tar files (WebDataset), cells of parquet files (Hugging Face).

The URI of such a file is that of its archive, `!/` and its name: `s3://films/0001.tar!/a/cat.mp4`,
`/data/train.parquet!/image/0000012/cat.jpg`, which is column, row and the name in the cell. Archives are read where
they are; one of an object store is copied whole to a temporary folder, and the few that were read last are kept there,
since batches are in the order of their files. Members never name a path that is written.
"""

import atexit
import shutil
import tarfile
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import polars as pl

from nextvid.video.probe import kind_of
from storage import remote
from storage.digest import digest
from storage.errors import CorpusError, MediaError

INSIDE = "!/"  # between archive and member, as in Java's URLs of archives
TAR, PARQUET = ".tar", ".parquet"
# Keys of listings whose values change with a file's content: s3fs, gcsfs and adlfs, the Hub, http, memory, local.
FINGERPRINTS = (
    "ETag",
    "etag",
    "md5Hash",
    "content_md5",
    "blob_id",
    "LastModified",
    "last_modified",
    "mtime",
    "created",
)
KEPT_COPIES = 4  # our choice: WebDataset's shards have about 1 GB, parquet files of the Hub 0.5
PIECE_BYTES = 1 << 23  # our choice: a film is not held in memory
BLOCK_BYTES = 512  # of a tar file (POSIX ustar)


@dataclass(frozen=True)
class Index:
    """What an archive holds: sizes in bytes of its media files by name, and what is wrong with it."""

    sizes_bytes: Mapping[str, int]
    doubled: frozenset[str] = frozenset()  # names that two members have
    ignored: tuple[str, ...] = ()  # extensions of other members
    damage: str | None = None  # why what follows cannot be read


def split_uri(uri: str) -> tuple[str, str] | None:
    """(archive, member) of a URI; None for a file of its own."""
    for extension in (TAR, PARQUET):
        archive, mark, name = uri.partition(f"{extension}{INSIDE}")
        if mark:
            return archive + extension, name
    return None


def fingerprint_of(info: Mapping[str, Any]) -> str:
    """What a listing says of a file that changes with its content."""
    return next((f"{key} {info[key]}" for key in FINGERPRINTS if info.get(key) is not None), "none")


def index(path: Path, column: str | None) -> Index:
    """The media files in a local tar file or in this column of a parquet file.

    Raises CorpusError for a parquet file without the column; a damaged archive gives what can be read and its `damage`.
    """
    if path.suffix == TAR:
        return _tar_index(path, path.stat().st_mtime_ns)[0]
    assert column is not None, "parquet files are listed where their column is named"
    return _parquet_index(path, column)


def copy_member(uri: str, target: Path) -> None:
    """Write a member's bytes to a local file. MediaError `missing` where the archive or the member is gone."""
    split = split_uri(uri)
    assert split is not None, f"{uri} is a file of its own"
    archive, name = split
    with local_archive(archive) as path:
        try:
            if path.suffix == TAR:
                found, offsets = _tar_index(path, path.stat().st_mtime_ns)
                left = found.sizes_bytes[name]
                with path.open("rb") as source, target.open("wb") as copy:
                    source.seek(offsets[name])
                    while left and (piece := source.read(min(left, PIECE_BYTES))):
                        left -= copy.write(piece)
            else:
                target.write_bytes(_cell(path, name))
        except (LookupError, ValueError, OSError, pl.exceptions.PolarsError) as error:
            message = f"{uri}: it cannot be read from its archive ({error}); list the dataset again"
            raise MediaError("missing", message) from error


@contextmanager
def local_archive(uri: str) -> Iterator[Path]:
    """An archive as a local path while the block runs; one of an object store is a copy."""
    if remote.is_local(uri):
        yield Path(uri.removeprefix("file://"))
        return
    key = f"{uri} {fingerprint_of(remote.ask(uri, lambda fs, key: fs.info(key)))}"
    with _LOCK:
        copies = _COPIES
        for idle in [name for name, copy in copies.items() if not copy.readers and name != key][: -KEPT_COPIES + 1]:
            copies.pop(idle).path.unlink(missing_ok=True)
        copy = copies.pop(key, None) or _Copy(_folder() / (digest(["copy of", key]) + PurePosixPath(uri).suffix))
        copies[key] = copy  # the last is the newest
        copy.readers += 1
    try:
        with copy.lock:
            if not copy.whole:
                remote.get_file(uri, str(copy.path))
                copy.whole = True
        yield copy.path
    finally:
        with _LOCK:
            copy.readers -= 1


@dataclass
class _Copy:
    path: Path
    readers: int = 0
    whole: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


_LOCK = threading.Lock()
_COPIES: dict[str, _Copy] = {}


@lru_cache(maxsize=1)
def _folder() -> Path:
    folder = tempfile.mkdtemp(prefix="nextvid-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@lru_cache(maxsize=8)
def _tar_index(path: Path, changed_ns: int) -> tuple[Index, Mapping[str, int]]:
    """The index of a tar file, and the byte at which each member begins."""
    offsets, sizes_bytes = dict[str, int](), dict[str, int]()
    doubled, ignored = set[str](), list[str]()
    damage, end, whole_bytes = None, 0, path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isreg() or member.issparse():
                    continue
                name = member.name.removeprefix("./").encode("utf-8", "surrogateescape")
                shown = name.decode("utf-8", "backslashreplace")
                if kind_of(shown) is None or any(part.startswith(".") for part in shown.split("/")):
                    ignored.append(PurePosixPath(shown).suffix.lower() or "no extension")
                elif member.offset_data + member.size > whole_bytes:
                    damage = f"it is cut off within {shown}"
                    break
                else:
                    doubled |= {shown} & sizes_bytes.keys()
                    offsets[shown], sizes_bytes[shown] = member.offset_data, member.size
            end = tar.offset
        if damage is None:  # the module takes any damage behind the first member for the end
            with path.open("rb") as file:
                file.seek(end)
                damage = None if file.read(BLOCK_BYTES) == bytes(BLOCK_BYTES) else f"it has no end mark at byte {end}"
    except (tarfile.TarError, OSError, ValueError) as error:
        damage = damage or str(error)
    return Index(sizes_bytes, frozenset(doubled), tuple(ignored), damage), offsets


def _parquet_index(path: Path, column: str) -> Index:
    try:
        schema = pl.read_parquet_schema(path)
        known = schema.get(column)
        if known is None or known not in (pl.Binary, pl.Struct({"bytes": pl.Binary, "path": pl.String})):
            there = f"it has {', '.join(schema)}" if known is None else f"this one holds {known}"
            raise CorpusError(
                f"{path} has no column '{column}' of files, as bytes or as bytes and path; {there}: correct "
                "'parquet_column' in corpus.yaml"
            )
        rows = pl.scan_parquet(path).select(pl.len()).collect().item()  # of the footer
        if rows > path.stat().st_size:  # one cell, packed: its names would not fit memory
            return Index({}, damage=f"it has {rows} rows in {path.stat().st_size} bytes")
        data, given = _cell_parts(column, known)
        cells = pl.scan_parquet(path).select(
            name=given, size=data.bin.size(), head=data.bin.slice(0, 12)
        ).collect(engine="streaming")  # fmt: skip
    except (pl.exceptions.PolarsError, OSError) as error:
        return Index({}, damage=str(error).splitlines()[0])
    sizes_bytes, ignored = dict[str, int](), list[str]()
    for row, (name, size, head) in enumerate(cells.iter_rows()):
        shown = PurePosixPath(name or "file").name
        if kind_of(shown) is None and head is not None:
            shown += _extension(head)
        if head is None or kind_of(shown) is None:
            ignored.append("no bytes" if head is None else PurePosixPath(shown).suffix.lower() or "no extension")
        else:
            sizes_bytes[f"{column}/{row:07d}/{shown}"] = size
    return Index(sizes_bytes, ignored=tuple(ignored))


def _cell_parts(column: str, dtype: pl.DataType | type[pl.DataType]) -> tuple[pl.Expr, pl.Expr]:
    """Bytes and name of a cell."""
    cell = pl.col(column)
    if dtype == pl.Binary:
        return cell, pl.lit(None, pl.String)
    return cell.struct.field("bytes"), cell.struct.field("path")


def _cell(path: Path, name: str) -> bytes:
    """The bytes of a cell; polars reads the row group that it is in."""
    column, row, _ = name.split("/", 2)
    known = pl.read_parquet_schema(path)[column]
    found = pl.scan_parquet(path).slice(int(row), 1).select(_cell_parts(column, known)[0]).collect()
    data = found.item()
    if not isinstance(data, bytes):
        raise LookupError(f"row {row} has no bytes")
    return data


def _extension(head: bytes) -> str:
    """The extension of a file by its first twelve bytes; empty for what data sets of the Hub do not have."""
    if head.startswith(b"\xff\xd8\xff"):
        return ".jpg"
    if head.startswith(b"\x89PNG"):
        return ".png"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return ".webp"
    if head[4:8] == b"ftyp":
        return ".mp4"
    return ".mkv" if head.startswith(b"\x1a\x45\xdf\xa3") else ""
