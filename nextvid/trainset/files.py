"""Files of a frozen trainset and of its pixels: write, seal, open and compare with their checksums.

A JSON record describes what was frozen. It has the crc32c of each file of addresses, and its own digest as `seal`, so
that a changed byte in any of them is found. An unreachable network, missing credentials or permissions are no damage:
those errors pass through.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from storage import atomic, listing
from storage.cache import open_rows
from storage.digest import crc32c, file_sums
from storage.errors import DamagedError, NExTVidError, UpstreamError
from storage.records import publish_record, read_record
from storage.remote import is_local
from storage.root import DataRoot
from storage.schemas import Lineage
from storage.shard_files import cited_parts
from storage.store import Store
from storage.tables import write_tables

RECORD, LINEAGE = "trainset.json", "lineage.parquet"


@dataclass(frozen=True)
class Frozen:
    """Files of addresses in a folder, with the crc32c of each by name, and what to do where one is damaged."""

    root: DataRoot
    folder: str
    files: Mapping[str, int]
    remedy: str

    def open(self, name: str, dtype: np.dtype[Any], count: int) -> np.ndarray:
        """The addresses of one file [count], memory-mapped; DamagedError where it is not what was frozen."""
        path = f"{self.folder}/{name}"
        try:
            rows = open_rows(self.root, path, self.files.get(name))
        except (UpstreamError, FileNotFoundError, IsADirectoryError) as error:
            raise DamagedError(f"{path} is no file; {self.remedy}") from error
        except DamagedError as error:
            raise DamagedError(f"{error}; {self.remedy}") from error
        except NExTVidError:
            raise  # also a ValueError, but the file is not at fault
        except (EOFError, ValueError) as error:
            raise DamagedError(f"{path}: {error}; {self.remedy}") from error
        if rows.dtype != dtype or rows.shape != (count,):
            what = f"{rows.shape} rows of {rows.dtype}, {count} addresses were frozen"
            raise DamagedError(f"{path}: {what}; {self.remedy}")
        return rows

    def check(self) -> None:
        """Read every file; DamagedError where one is not what was frozen."""
        for name, crc in self.files.items():
            path = f"{self.folder}/{name}"
            try:
                found = file_sums(Path(path))["crc32c"] if is_local(path) else crc32c(atomic.read_bytes(path))
            except (UpstreamError, FileNotFoundError, IsADirectoryError) as error:
                raise DamagedError(f"{path} is no file; {self.remedy}") from error
            if found != crc:
                raise DamagedError(f"{path}: its bytes differ from their checksum; {self.remedy}")


def rows_name(frames: int) -> str:
    """File name of the addresses of a clip length."""
    return f"rows.f{frames}.npy"


def write_trainset(
    folder: str,
    record: Mapping[str, Any],
    addresses: Mapping[int, np.ndarray],
    lineage: Iterable[pl.DataFrame],
    *,
    over: bool = False,
) -> None:
    """Write a trainset's folder at once; with `over`, replace the files of an existing one, trainset.json last.

    `addresses` are ADDRESS [n] by frames, `lineage` the tables of its batches (schema Lineage). Raises ConflictError
    where the folder exists.
    """
    with atomic.staged_folder(folder, last=RECORD, over=over) as temporary:
        files = {rows_name(frames): write_array(temporary / rows_name(frames), a) for frames, a in addresses.items()}
        write_tables(str(temporary / LINEAGE), lineage, Lineage)
        publish_record(str(temporary / RECORD), {**record, "files": files})


def read_sealed(path: str, remedy: str) -> dict[str, Any]:
    """A record that has a seal and names files of its folder alone: a seal proves no origin. As `read_record`."""
    record = read_record(path, remedy, sealed=True)
    files = record.get("files", {})
    if not isinstance(files, dict) or any(name.startswith("/") or ".." in name.split("/") for name in files):
        raise DamagedError(f"{path} names files that are not in its folder; {remedy}")
    return record


def write_array(path: Path, rows: np.ndarray) -> int:
    """Write a new .npy file of an array [n]; returns its crc32c."""
    new_array(path, rows.dtype, len(rows))[:] = rows
    return crc32c(np.memmap(path, np.uint8, "r"))


def new_array(path: Path, dtype: np.dtype[Any], count: int) -> np.memmap[Any, Any]:
    """A memory map of a new .npy file of `count` rows, to be filled.

    All its bytes are allocated here: writing a mapped page for which a full disk has no room kills the process. The
    error names the file and the reason, as np.save's would not.
    """
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
    with atomic.naming(path), path.open("xb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.flush()
        os.posix_fallocate(file.fileno(), file.tell(), max(1, count * dtype.itemsize))
    mapped: np.memmap[Any, Any] = np.lib.format.open_memmap(path, mode="r+")
    return mapped


def gone_shards(
    store: Store[Any], batches: Sequence[str], rows: Mapping[int, np.ndarray], whose: str, then: str
) -> list[str]:
    """One line for each part that lacks shards in which rows (by frames) are: which, and what to do.

    Lists files only; `verify` reads them. `whose` names the rows; `then` is what to do once the shards are back.
    Raises StoreError for a listing without a file that is there.
    """
    lines = []
    for part, shards, files in cited_parts(store, batches, rows):
        gone = [number for number in shards if not {part.shard_path(number), part.commit_path(number)} <= files.keys()]
        if gone:
            absent = {
                path for number in gone for path in (part.shard_path(number), part.commit_path(number))
            } - files.keys()
            if hidden := next(filter(atomic.exists, sorted(absent)), None):
                raise listing.untrue(f"{hidden} is there, and its folder was listed without it")
            torn = [part.commit_path(number) for number in gone if part.commit_path(number) in files]
            first = f"remove {', '.join(torn)}, " if torn else ""
            lines.append(
                f"{part.path}: {whose} cites its shards {', '.join(map(str, gone))}, which are not there. Remedy: put "
                f"them back, or {first}make the latents of batch {part.batch} again, then {then}"
            )
    return lines
