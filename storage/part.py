"""Part: one planned encode of a batch at one clip length. Its plan never changes, its shards are written once.

A part appears whole (Zarr metadata and plan in one rename); on object stores the plan makes it, created exclusively,
and whoever writes next adds metadata that a dead planner left out. How a shard and its commit come to stand: commit.py.
The commit is the truth; readers look at nothing else. PlannedPart holds what all parts share, Part what is the latents'
own, storage/pixels.py what is the pixels'. Must not know how rows were chosen or encoded.
"""

import fcntl
import os
import re
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

import dataframely as dy
import numpy as np
import polars as pl
from jaxtyping import Float

from storage import atomic, listing, shard, tables
from storage.commit import publish_shard
from storage.errors import ConflictError, DamagedError, StoreError, TableError, UpstreamError
from storage.remote import is_local
from storage.schemas import Commits, Plan
from storage.shard import ROWS_PER_SHARD
from storage.spec import EncodingSpec

AXES = ("row", "frame", "channel", "y", "x")
COMMIT = re.compile(r"[0-9]{6,}\.parquet")  # the shard's number
SWEPT = "swept"  # reason in the commit of a shard whose bytes a sweep has freed


class Spec(Protocol):
    """What the stores of one kind differ by; its digest names the store."""

    def digest(self) -> str: ...

    def to_json(self) -> Mapping[str, str | int]: ...


class PlannedPart(ABC):
    """A part that exists. `path` is its folder; slots number its rows from 0, shard = slot // 256."""

    array: ClassVar[str]  # name of the Zarr array in the part's group
    schema: ClassVar[type[dy.Schema]]  # of its commits
    freed: ClassVar[Mapping[str, Any]]  # what their columns say of a shard whose bytes are gone

    def __init__(self, path: str, spec: Spec, batch: str, frames: int, number: int) -> None:
        self.path = path
        self.spec = spec
        self.batch = batch
        self.frames = frames
        self.number = number
        self._guard = threading.RLock()
        self._lock_file: int | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path!r})"

    @abstractmethod
    def describe(self, folder: Path, rows: int) -> None:
        """Write the Zarr metadata of the part's array for so many rows into its new folder."""

    @abstractmethod
    def extent(self, slot: int) -> tuple[int, int]:
        """(offset, size) in bytes of a committed row in the file of its shard; size 0 where it has none."""

    @cached_property
    def plan(self) -> pl.DataFrame:
        """Columns of Plan, by slot."""
        path = self.plan_path
        try:
            plan = tables.read_table(path, Plan).sort("slot")
        except (UpstreamError, TableError) as error:
            remedy = f"Remove the folder {self.path} and make the latents of the batch again"
            raise DamagedError(f"{path} is missing or damaged ({error}). {remedy}") from error
        if plan["slot"].to_list() != list(range(plan.height)):
            raise DamagedError(f"{path}: slots are not 0 to {plan.height - 1}")
        return plan

    @property
    def shards(self) -> int:
        """Number of shards that the plan asks for."""
        return -(-self.plan.height // ROWS_PER_SHARD)

    def rows_of(self, number: int) -> pl.DataFrame:
        """Columns of Plan of one shard, by slot (of the part, not of the shard)."""
        assert 0 <= number < self.shards, f"shard {number} of {self.shards}"
        return self.plan.slice(number * ROWS_PER_SHARD, ROWS_PER_SHARD)

    @property
    def plan_path(self) -> str:
        return f"{self.path}/plan.parquet"

    def table_paths(self) -> list[str]:
        """The plan and every commit, asked for or not."""
        names = listing.files(f"{self.path}/commits")
        return [self.plan_path, *(f"{self.path}/commits/{name}" for name in names if COMMIT.fullmatch(name))]

    @property
    def metadata_paths(self) -> tuple[str, str]:
        """The zarr.json of the group and of its array."""
        return f"{self.path}/zarr.json", f"{self.path}/{self.array}/zarr.json"

    def shard_path(self, number: int) -> str:
        return f"{self.path}/{self.array}/c/{number}/0/0/0/0"

    def commit_path(self, number: int) -> str:
        return f"{self.path}/commits/{number:06d}.parquet"

    def committed(self, number: int) -> bool:
        return atomic.exists(self.commit_path(number))

    def committed_shards(self) -> list[int]:
        """Numbers of all committed shards, by one listing."""
        names = listing.files(f"{self.path}/commits")
        found = [int(name.removesuffix(".parquet")) for name in names if COMMIT.fullmatch(name)]
        return sorted(number for number in found if number < self.shards)

    def stands(self, number: int) -> bool:
        """Whether a shard is committed and its file is there; a swept one has none."""
        return self.committed(number) and atomic.exists(self.shard_path(number))

    def commit(self, number: int) -> pl.DataFrame:
        """Columns of `schema` of a committed shard, by slot; DamagedError where it does not fit the plan."""
        path = self.commit_path(number)
        commits = tables.read_table(path, self.schema).sort("slot")
        if not commits.select("row_id", "slot").equals(self.rows_of(number)):
            raise DamagedError(f"{path} names other rows than the plan: remove it and make the latents again")
        return commits

    def planned(self, number: int, commits: pl.DataFrame) -> pl.DataFrame:
        """The commits by slot; StoreError where their rows are not the planned ones of the shard."""
        rows, ordered = self.rows_of(number), commits.sort("slot")
        if (
            ordered["row_id"].to_list() != rows["row_id"].to_list()
            or ordered["slot"].to_list() != rows["slot"].to_list()
        ):
            raise StoreError(f"shard {number} of {self.path}: the commit's rows are not the planned ones")
        return ordered

    def publish(self, number: int, pieces: Iterable[bytes | memoryview], commits: pl.DataFrame) -> None:
        """Write a shard's file from its pieces, then its commit; ConflictError if another writer committed it first."""
        sealed = tables.encode_table(commits, self.schema, self.commit_path(number))
        with self.lock():
            self._refuse_committed(number)
            complete_part(self)
            publish_shard(
                self.shard_path(number),
                self.commit_path(number),
                pieces,
                sealed,
                lambda: self.commit(number)["crc32c"].equals(commits["crc32c"], null_equal=True),
            )

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Exclusive lock of the part among threads, processes and machines (flock); waits; the holder may nest it.

        On object stores, which know none, among this object's threads only.
        """
        with self._guard:
            if self._lock_file is not None or not is_local(self.path):
                yield
                return
            with atomic.writing(f"{self.path}/lock"):
                self._lock_file = os.open(f"{self.path}/lock", os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(self._lock_file, fcntl.LOCK_EX)
                yield
            finally:
                os.close(self._lock_file)  # and with it the lock
                self._lock_file = None

    def is_being_written(self) -> bool:
        """Whether a writer holds the lock at this moment; never known on object stores."""
        if not is_local(self.path):
            return False
        try:
            file = os.open(f"{self.path}/lock", os.O_RDONLY)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(file)
        return False

    def erase(self, slots: Sequence[int]) -> None:
        """Zero the bytes of these slots in place, for withdrawn media only. Nothing else moves or changes."""
        with self.lock():
            for number in sorted({slot // ROWS_PER_SHARD for slot in slots}):
                if self.stands(number):
                    own = [slot for slot in slots if slot // ROWS_PER_SHARD == number]
                    atomic.zero(self.shard_path(number), [self.extent(slot) for slot in own])

    def discard(self, number: int) -> int:
        """Free the bytes of a committed shard, for sweeps only; the bytes freed.

        Its commit then says `swept` of every row, and comes first: a shard without one is taken for a dead writer's and
        encoded again. Any Zarr reader sees the fill value. Asking again frees what a killed sweep left.
        """
        path = self.shard_path(number)
        with self.lock():
            commits = self.commit(number)
            if (commits["reason"] != SWEPT).fill_null(True).any():
                swept = commits.with_columns(status=pl.lit("rejected"), reason=pl.lit(SWEPT), **self.freed)
                tables.write_table(self.commit_path(number), swept, self.schema)
            size_bytes = listing.size_bytes(path) or 0
            atomic.remove_tree(path)
        return size_bytes

    def _refuse_committed(self, number: int) -> None:
        if self.committed(number):
            raise ConflictError(f"shard {number} of {self.path} is committed already: another writer was first")


class Part(PlannedPart):
    """A part of latents: dense rows of one size (storage/shard.py)."""

    array = "latent"
    schema = Commits
    freed: ClassVar[Mapping[str, Any]] = {
        "crc32c": None,
        "sums": pl.lit([], pl.List(pl.Float64)),
        "sums_squared": pl.lit([], pl.List(pl.Float64)),
    }
    spec: EncodingSpec

    def write_shard(self, number: int, latents: Float[np.ndarray, "n F C h w"], commits: pl.DataFrame) -> None:
        """Write one shard, then its commit; ConflictError if another writer committed it first.

        `latents` stand in slot order, one for each planned row; what stands in the slot of a failed row is replaced by
        NaN. `commits` has the columns of Commits; its crc32c, sums and sums_squared are measured here on the stored
        values and may come in null or empty. StoreError where rows do not fit the plan or are not finite.
        """
        commits = self.planned(number, commits)
        wanted = (commits.height, *self.spec.row_shape(self.frames))
        if latents.shape != wanted:
            raise StoreError(f"shard {number} of {self.path}: latents have shape {latents.shape}, not {wanted}")
        raw = shard.packed(latents, (commits["status"] == "ok").to_numpy(), self.spec.storage)
        stored = shard.unpacked(raw, self.spec.storage, self.spec.row_shape(self.frames))
        index = shard.index(commits.height, self.spec.row_bytes(self.frames))
        self.publish(number, (raw.data, index), shard.measured(raw, stored, commits))

    def shard_path(self, number: int) -> str:
        return f"{self.path}/{self.array}/c/{number}/0" if self._in_bytes else super().shard_path(number)

    def extent(self, slot: int) -> tuple[int, int]:
        row_bytes = self.spec.row_bytes(self.frames)
        return slot % ROWS_PER_SHARD * row_bytes, row_bytes

    def describe(self, folder: Path, rows: int) -> None:
        """Values where the storage option keeps values; else the rows' bytes, and in words what they are."""
        values = self.spec.row_shape(self.frames)
        shape = (self.spec.row_bytes(self.frames),) if self._in_bytes else values
        words = f"int8 {list(values)}, then float32 [{values[1]}], little-endian; value = int8 * float32 of its channel"
        new_group(folder, self).create_array(
            self.array,
            shape=(rows, *shape),
            chunks=(1, *shape),
            shards={"shape": (ROWS_PER_SHARD, *shape), "index_location": "end"},
            dtype="int8" if self._in_bytes else "float16",
            compressors=None,
            filters=None,
            fill_value=0 if self._in_bytes else float("nan"),
            dimension_names=("row", "byte") if self._in_bytes else AXES,
            attributes={"row": words} if self._in_bytes else None,
        )

    @property
    def _in_bytes(self) -> bool:
        """Whether a row is more than an array of values."""
        return self.spec.storage == "int8"


def create_part(part: PlannedPart, row_ids: Sequence[bytes]) -> None:
    """Bring a part into being: Zarr metadata and plan; ConflictError if the number is taken."""
    assert row_ids, "a part without rows"
    plan = pl.DataFrame({"row_id": list(row_ids), "slot": range(len(row_ids))}, schema=Plan.create_empty().schema)
    if not is_local(part.path):
        path = f"{part.path}/plan.parquet"
        atomic.create_exclusively(path, tables.encode_table(plan, Plan, path))
        complete_part(part)
        return
    with atomic.staged_folder(part.path) as folder:
        part.describe(folder, len(row_ids))
        tables.write_table(str(folder / "plan.parquet"), plan, Plan)
        (folder / "commits").mkdir()


def complete_part(part: PlannedPart) -> None:
    """Write the Zarr metadata of a part on an object store, unless its planner lived to do it."""
    if is_local(part.path) or all(atomic.exists(path) for path in part.metadata_paths):
        return
    with tempfile.TemporaryDirectory(prefix="nextvid-") as folder:
        part.describe(Path(folder), part.plan.height)
        for path in part.metadata_paths:
            atomic.publish_bytes(path, Path(folder, path.removeprefix(f"{part.path}/")).read_bytes())


def new_group(folder: Path, part: PlannedPart) -> Any:  # noqa: ANN401 - a zarr.Group, which is not imported here
    """The part's Zarr group, with what it is as attributes."""
    import zarr  # here, since readers do without it and it takes half a second to import

    about = {"encoding": part.spec.digest(), "batch": part.batch, "frames": part.frames, "part": part.number}
    return zarr.create_group(store=str(folder), zarr_format=3, attributes=about)
