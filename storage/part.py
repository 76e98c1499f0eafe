"""Part: one planned encode of a batch at one clip length. Its plan never changes, its shards are written once.

A part appears whole (Zarr metadata and plan in one rename). On object stores the plan makes it, created exclusively,
and the next writer adds metadata that a dead planner left out. A shard exists for readers once its commit does. Once
all do, the part is sealed (seal.py), until one of its commits changes. What differs between latents and pixels is the
part's format: shard.py.
"""

import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import polars as pl

from storage import atomic, listing, shard, tables
from storage.errors import ConflictError, DamagedError, StoreError, TableError, UpstreamError
from storage.locks import is_locked, locked
from storage.remote import is_local
from storage.schemas import Plan
from storage.spec import EncodingSpec, PixelSpec

COMMIT = r"[0-9]{6,}\.parquet"  # the shard's number
SEPARATORS = (".", "/")  # of the numbers in a chunk's name: Zarr v3 specification, chunk key encoding `default`
SWEPT = "swept"  # reason in the commit of a shard whose bytes a sweep has freed
OTHER_BYTES = "holds other bytes than were committed (or a withdrawn row)"  # what readers say of a row

S = TypeVar("S", bound=EncodingSpec | PixelSpec)


class StoredRow(NamedTuple):
    """Where a shard's file holds one row, by its commit. `size_bytes` is 0 where the row failed and has no bytes."""

    row_id: bytes
    status: str
    reason: str | None
    offset: int  # bytes from the start of the file
    size_bytes: int
    crc32c: int | None  # None for a failed row


class Part(Generic[S]):
    """A part that exists. `path` is its folder; slots number its rows from 0, shard = slot // 256."""

    def __init__(self, path: str, spec: S, batch: str, frames: int, number: int) -> None:
        self.path = path
        self.spec = spec
        self.format = shard.row_format(spec, frames)
        self.batch = batch
        self.frames = frames
        self.number = number
        self._guard = threading.RLock()
        self._is_locked = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path!r})"

    @property
    def plan_path(self) -> str:
        """The plan's file."""
        return f"{self.path}/plan.parquet"

    @property
    def array_path(self) -> str:
        """The folder of the Zarr array."""
        return f"{self.path}/{self.format.array}"

    @property
    def metadata_paths(self) -> tuple[str, str]:
        """The zarr.json of the group and of its array."""
        return f"{self.path}/zarr.json", f"{self.array_path}/zarr.json"

    @cached_property
    def separator(self) -> str:
        """What is between the numbers of a chunk's name in Zarr: `.`, so that a shard is one file in one folder.

        Parts of 0.1 have `/`, a file in four folders. Where the metadata is missing or damaged, which `verify`
        reports, the files say it.
        """
        with suppress(DamagedError, UpstreamError, KeyError, TypeError):
            found = atomic.read_json(self.metadata_paths[1])["chunk_key_encoding"]["configuration"]["separator"]
            if found in SEPARATORS:
                return str(found)
        return "/" if atomic.exists(f"{self.array_path}/c") else "."

    def files(self) -> dict[str, int]:
        """Path and size in bytes of every file of the part, by one listing, which also tells the separator."""
        found = listing.files_below(self.path)
        if any(path.startswith(f"{self.array_path}/c.") for path in found):
            self.separator = "."
        return found

    def shard_path(self, number: int) -> str:
        """The file of a shard's rows, named as Zarr names its chunk."""
        before, after = self._chunk_name
        return f"{before}{number}{after}"

    @cached_property
    def _chunk_name(self) -> tuple[str, str]:
        """What is before and after the number of a shard in its path; asked for with every map."""
        return f"{self.array_path}/c{self.separator}", f"{self.separator}0" * len(self.format.shape)

    def commit_path(self, number: int) -> str:
        """The file of a shard's commit."""
        return f"{self.path}/commits/{number:06d}.parquet"

    @cached_property
    def plan(self) -> pl.DataFrame:
        """Columns of Plan, by slot; DamagedError where it is missing or damaged."""
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
        """Number of shards in the plan."""
        return -(-self.plan.height // shard.ROWS_PER_SHARD)

    def rows_of(self, number: int) -> pl.DataFrame:
        """Columns of Plan of one shard, by slot (of the part, not of the shard)."""
        assert 0 <= number < self.shards, f"shard {number} of {self.shards}"
        return self.plan.slice(number * shard.ROWS_PER_SHARD, shard.ROWS_PER_SHARD)

    @property
    def seal_path(self) -> str:
        """The file that says that the part is sealed."""
        return f"{self.path}/sealed.json"

    @property
    def sealed_path(self) -> str:
        """The table of all commits of a sealed part."""
        return f"{self.path}/sealed.parquet"

    def table_paths(self) -> list[str]:
        """The plan and every commit, those beyond the plan too."""
        commits = listing.files(f"{self.path}/commits", COMMIT)
        return [self.plan_path, *(f"{self.path}/commits/{name}" for name in commits)]

    def committed(self, number: int) -> bool:
        """Whether a shard has a commit."""
        return atomic.exists(self.commit_path(number))

    def committed_shards(self) -> list[int]:
        """Numbers of all committed shards, sorted, by one listing."""
        found = sorted(int(name.removesuffix(".parquet")) for name in listing.files(f"{self.path}/commits", COMMIT))
        return [number for number in found if number < self.shards]

    def is_stored(self, number: int) -> bool:
        """Whether a shard is committed and its file is there; a swept one has none."""
        return self.committed(number) and atomic.exists(self.shard_path(number))

    def commit(self, number: int) -> pl.DataFrame:
        """Columns of the format's schema of a committed shard, by slot; DamagedError where it does not fit the plan."""
        path = self.commit_path(number)
        commits = tables.read_table(path, self.format.schema).sort("slot")
        if not commits.select("row_id", "slot").equals(self.rows_of(number)):
            raise DamagedError(f"{path} names other rows than the plan: remove it and make the latents again")
        return commits

    def commits(self) -> pl.DataFrame:
        """Columns of the format's schema of every committed shard, by slot; read together. Raises as `commit` does."""
        numbers = self.committed_shards()
        found = tables.read_many([self.commit_path(number) for number in numbers], self.format.schema).sort("slot")
        planned = self.plan.filter((pl.col("slot") // shard.ROWS_PER_SHARD).is_in(numbers))
        if not found.select("row_id", "slot").equals(planned):
            return pl.concat([self.commit(number) for number in numbers])  # raises, and names the commit
        return found

    def rows(self, number: int) -> list[StoredRow]:
        """Where the file of a committed shard holds its rows, by slot. Raises as `commit` does."""
        return self.rows_in(self.commit(number))

    def rows_in(self, commits: pl.DataFrame) -> list[StoredRow]:
        """Where a shard's file holds its rows, by its commit."""
        described = commits.select("row_id", "status", "reason", "crc32c").iter_rows()
        return [
            StoredRow(row_id, status, reason, offset, size_bytes, crc)
            for (row_id, status, reason, crc), (offset, size_bytes) in zip(
                described, self.format.extents(commits), strict=True
            )
        ]

    def remedy(self, number: int) -> str:
        """What makes a shard that cannot be read readable again."""
        if self.committed(number):
            return f"remove {self.commit_path(number)} and make the latents of batch {self.batch} again"
        return f"make the latents of batch {self.batch} again, and 'trainset', whose rows have other addresses then"

    def write_shard(self, number: int, rows: Any, commits: pl.DataFrame) -> None:  # noqa: ANN401 - as the format has it
        """Write one shard, then its commit; ConflictError if another writer committed it first.

        On a file system the bytes are written aside before the lock is taken, so that writers of one part do not wait
        for each other's disk; under the lock, a shard without a commit is a dead writer's and is removed.

        `rows` are in slot order, one for each planned row: of latents an array [n, F, C, h, w], of pixels a list of
        chunks, None for a failed row. `commits` has the columns of the format's schema; checksums and whatever
        else is measured on the stored bytes may be null or empty. StoreError where rows do not fit the plan.
        """
        ordered, planned = commits.sort("slot"), self.rows_of(number)
        if any(ordered[column].to_list() != planned[column].to_list() for column in ("row_id", "slot")):
            raise StoreError(f"shard {number} of {self.path}: the commit's rows are not the planned ones")
        try:
            pieces, complete = self.format.encode(rows, ordered)
        except StoreError as error:
            raise type(error)(f"shard {number} of {self.path}: {error}") from error
        sealed = tables.encode_table(complete, self.format.schema, self.commit_path(number))
        if self.committed(number):
            raise ConflictError(f"shard {number} of {self.path} is committed already: another writer was first")
        if not is_local(self.path):
            self.complete()
            self.unseal()
            self._publish(number, b"".join(pieces), sealed, complete)
            return
        shard_path = self.shard_path(number)
        with atomic.written_aside(shard_path, pieces) as publish, self.lock():
            if self.committed(number):
                raise ConflictError(f"shard {number} of {self.path} is committed already: another writer was first")
            self.unseal()
            atomic.remove_tree(shard_path)  # left by a writer that died before its commit
            publish()
            atomic.create_exclusively(self.commit_path(number), sealed)

    def _publish(self, number: int, data: bytes, sealed: bytes, commits: pl.DataFrame) -> None:
        """Write a shard's object, then the bytes of its commit, each under a name that must be new, without a lock.

        An object without a commit is of a dead writer, or of one that is about to commit. Equal bytes are taken as they
        are, since a shard encoded again has the same ones; others are replaced, and put back by the one who replaced
        them if the commit then goes to somebody else. Whatever slips through this (two that replace at once, one of
        them killed) is found by the commit's checksums, and the shard is encoded again.
        """
        shard_path, found = self.shard_path(number), None
        try:
            atomic.create_exclusively(shard_path, data)
        except ConflictError:
            found = atomic.read_bytes(shard_path)
            if found != data:
                atomic.publish_bytes(shard_path, data)
        try:
            atomic.create_exclusively(self.commit_path(number), sealed)
        except ConflictError:
            if found not in (None, data) and not self.commit(number)["crc32c"].equals(
                commits["crc32c"], null_equal=True
            ):
                atomic.publish_bytes(shard_path, found)
            raise

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Exclusive lock of the part among threads, processes and machines (flock); waits; the holder may nest it.

        On object stores, which have no locks, among this object's threads only.
        """
        with self._guard:
            if self._is_locked:
                yield
                return
            with locked(f"{self.path}/lock"):
                self._is_locked = True
                try:
                    yield
                finally:
                    self._is_locked = False

    def is_being_written(self) -> bool:
        """Whether a writer holds the lock at this moment; never known on object stores."""
        return is_locked(f"{self.path}/lock")

    def extents(self, slots: Sequence[int]) -> dict[int, list[tuple[int, int]]]:
        """(offset, size) in bytes of the rows in these slots, by shard; shards whose file is gone are left out."""
        found: dict[int, list[tuple[int, int]]] = {}
        for number in sorted({slot // shard.ROWS_PER_SHARD for slot in slots}):
            if self.is_stored(number):
                rows, first = self.rows(number), number * shard.ROWS_PER_SHARD
                own = [rows[slot - first] for slot in slots if first <= slot < first + len(rows)]
                found[number] = [(row.offset, row.size_bytes) for row in own]
        return found

    def erase(self, slots: Sequence[int]) -> None:
        """Zero the bytes of these slots in place, for withdrawn media only. Nothing else moves or changes."""
        with self.lock():
            for number, extents in self.extents(slots).items():
                atomic.zero(self.shard_path(number), extents)

    def unseal(self) -> None:
        """Remove the seal before a commit changes; until the part is sealed again, its commits are read."""
        for path in (self.seal_path, self.sealed_path):
            if atomic.exists(path):
                atomic.remove_tree(path)

    def discard(self, number: int) -> int:
        """Free the bytes of a committed shard, for sweeps only; the bytes freed.

        Its commit then says `swept` of every row, and is written first: a shard without a commit is taken for a dead
        writer's and encoded again. Any Zarr reader sees the fill value. Asking again frees what a killed sweep left.
        """
        path = self.shard_path(number)
        with self.lock():
            commits = self.commit(number)
            if (commits["reason"] != SWEPT).fill_null(True).any():
                self.unseal()
                swept = commits.with_columns(status=pl.lit("rejected"), reason=pl.lit(SWEPT), **self.format.freed)
                tables.write_table(self.commit_path(number), swept, self.format.schema)
            size_bytes = listing.size_bytes(path) or 0
            atomic.remove_tree(path)
        return size_bytes

    def create(self, row_ids: Sequence[bytes]) -> None:
        """Publish Zarr metadata and plan of a new part; ConflictError if its number is taken."""
        assert row_ids, "a part without rows"
        plan = pl.DataFrame({"row_id": list(row_ids), "slot": range(len(row_ids))}, schema=Plan.create_empty().schema)
        if not is_local(self.path):
            atomic.create_exclusively(self.plan_path, tables.encode_table(plan, Plan, self.plan_path))
            self.complete()
            return
        with atomic.staged_folder(self.path) as folder:
            self.describe(folder, len(row_ids))
            tables.write_table(str(folder / "plan.parquet"), plan, Plan)
            (folder / "commits").mkdir()

    def complete(self) -> None:
        """Write the Zarr metadata of a part on an object store, where its planner died before doing so."""
        if is_local(self.path) or all(atomic.exists(path) for path in self.metadata_paths):
            return
        with tempfile.TemporaryDirectory(prefix="nextvid-") as folder:
            self.describe(Path(folder), self.plan.height)
            for path in self.metadata_paths:
                atomic.publish_bytes(path, Path(folder, path.removeprefix(f"{self.path}/")).read_bytes())

    def describe(self, folder: Path, rows: int) -> None:
        """Write the Zarr metadata of the part's group and array, for so many rows, into a new folder."""
        import zarr  # here, since readers do without it and it takes half a second to import

        about = {"encoding": self.spec.digest(), "batch": self.batch, "frames": self.frames, "part": self.number}
        shape = self.format.shape
        zarr.create_group(store=str(folder), zarr_format=3, attributes=about).create_array(
            self.format.array,
            shape=(rows, *shape),
            chunks=(1, *shape),
            chunk_key_encoding={"name": "default", "separator": self.separator},
            shards={"shape": (shard.ROWS_PER_SHARD, *shape), "index_location": "end"},
            compressors=None,
            filters=None,
            **self.format.array_options(),
        )


LatentPart = Part[EncodingSpec]
PixelPart = Part[PixelSpec]
