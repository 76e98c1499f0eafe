"""Files of a frozen trainset and of its pixels: how they are written, sealed, opened and compared with their checksums.

One JSON file says what was frozen. It names the crc32c of each file of addresses beside it and carries the digest of
all it says as `seal`, so that a byte of either that changed is found. What does not answer (a network, credentials, a
mode) is no damage and passes through. Holds no choice of rows and no meaning of a field.

Which shards frozen rows stand in, and which of these are not there: a copy that was interrupted, a part removed.

Asks listings only, one a part: what the shards hold, `verify` of the store reads. Writes nothing.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from storage import atomic, listing
from storage.cache import open_rows
from storage.digest import crc32c, digest_config
from storage.errors import DamagedError, NExTVidError, UpstreamError
from storage.part import Part
from storage.root import DataRoot
from storage.schemas import Lineage
from storage.shard_files import AT_ONCE, shards_of
from storage.store import Store
from storage.tables import write_tables

SAID, LINEAGE = "trainset.json", "lineage.parquet"


@dataclass(frozen=True)
class Frozen:
    """Files of addresses in a folder: the crc32c of each by its name, and what to do where one is damaged."""

    root: DataRoot
    folder: str
    files: Mapping[str, int]
    remedy: str

    def open(self, name: str, dtype: np.dtype[Any], count: int) -> np.ndarray:
        """The addresses of one file [count], memory-mapped; DamagedError where it is not what was frozen."""
        path = f"{self.folder}/{name}"
        try:
            rows = open_rows(self.root, path, self.files.get(name))
        except (UpstreamError, FileNotFoundError) as error:
            raise DamagedError(f"{path} does not exist; {self.remedy}") from error
        except DamagedError as error:
            raise DamagedError(f"{error}; {self.remedy}") from error
        except NExTVidError:
            raise  # a ValueError too, but nothing is wrong with the file
        except (EOFError, ValueError) as error:
            raise DamagedError(f"{path}: {error}; {self.remedy}") from error
        if rows.dtype != dtype or rows.shape != (count,):
            what = f"{rows.shape} rows of {rows.dtype}, {count} addresses were frozen"
            raise DamagedError(f"{path}: {what}; {self.remedy}")
        return rows

    def check(self) -> None:
        """Read every file; DamagedError where one is not what was frozen. Costs what reading them costs."""
        for name, crc in self.files.items():
            path = f"{self.folder}/{name}"
            try:
                found = crc32c(atomic.read_bytes(path))
            except UpstreamError as error:
                raise DamagedError(f"{path} does not exist; {self.remedy}") from error
            if found != crc:
                raise DamagedError(f"{path}: its bytes differ from their checksum; {self.remedy}")


def rows_name(frames: int) -> str:
    """Name of the file with the addresses of a clip length."""
    return f"rows.f{frames}.npy"


def write_trainset(
    folder: str,
    said: Mapping[str, Any],
    addresses: Mapping[int, np.ndarray],
    lineage: Iterable[pl.DataFrame],
    *,
    over: bool = False,
) -> None:
    """Write a trainset's folder whole, or, with `over`, the files of one that stands, trainset.json at the end.

    `addresses` are ADDRESS [n] by frames, `lineage` frames of schema Lineage one under the other. ConflictError where
    the folder is taken.
    """
    with atomic.staged_folder(folder, last=SAID, over=over) as temporary:
        files = {rows_name(frames): write_array(temporary / rows_name(frames), a) for frames, a in addresses.items()}
        write_tables(str(temporary / LINEAGE), lineage, Lineage)
        publish_sealed(str(temporary / SAID), {**said, "files": files})


def publish_sealed(path: str, said: Mapping[str, Any]) -> None:
    """Publish JSON that `read_sealed` takes."""
    atomic.publish_json(path, {**said, "seal": digest_config(said)})


def read_sealed(path: str, remedy: str) -> dict[str, Any]:
    """What `publish_sealed` wrote; UpstreamError where it is missing, DamagedError where it says anything else."""
    said: Any = atomic.read_json(path)
    if not isinstance(said, dict) or "seal" not in said:
        raise DamagedError(f"{path} has no seal, so that nobody knows whether it is what was written; {remedy}")
    seal = said.pop("seal")
    if seal != _seal(said):
        raise DamagedError(f"{path} was changed after it was written; {remedy}")
    return said


def _seal(said: Mapping[str, Any]) -> str | None:
    try:
        return digest_config(said)
    except ValueError:  # half a character: text that no file can hold
        return None


def write_array(path: Path, rows: np.ndarray) -> int:
    """Write a new .npy file of an array [n] in C order; its crc32c.

    Not by numpy, whose error on a full disk names neither the file nor the reason.
    """
    with atomic.naming(path), path.open("xb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(rows))
        file.write(rows.view(np.uint8).data)
    return crc32c(np.memmap(path, np.uint8, "r"))


def new_array(path: Path, dtype: np.dtype[Any], count: int) -> np.memmap[Any, Any]:
    """A new .npy file of `count` rows to be filled through the memory map that comes back.

    The disk gives all its bytes here: a page that a full disk has no place for kills the process that writes it.
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
    """A line for each part that lacks shards which rows (by frames) cite: which, and what to do.

    `whose` are the rows, `then` is to be done once the shards are there again.
    """
    cited = [
        (store.part(batches[batch], frames, part), shards)
        for frames, addresses in rows.items()
        for (batch, part), shards in shards_of(addresses).items()
    ]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        lines = pool.map(lambda one: _gone(one[0], one[1], whose, then), cited)
    return [line for line in lines if line]


def _gone(part: Part[Any], shards: Sequence[int], whose: str, then: str) -> str:
    files = listing.files_below(part.path)
    gone = [number for number in shards if not {part.shard_path(number), part.commit_path(number)} <= files.keys()]
    if not gone:
        return ""
    torn = [part.commit_path(number) for number in gone if part.commit_path(number) in files]
    first = f"remove {', '.join(torn)}, " if torn else ""
    numbers = ", ".join(map(str, gone))
    return (
        f"{part.path}: {whose} cites its shards {numbers}, which are not there. Remedy: put them back, or {first}make "
        f"the latents of batch {part.batch} again, then {then}"
    )
