"""LatentStore, PixelStore: the rows of one spec, as batches, clip lengths, parts and committed shards.

Any number of processes write at once, each shard once; readers see committed rows only, and a missing or short shard is
an error, never zeros or NaN. A store is on a file system or an object store. Reading rows fast: reader.py.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, ClassVar, Generic, Self

import polars as pl

from storage import atomic, listing, shard
from storage.errors import ConfigError, ConflictError, DamagedError, UpstreamError
from storage.part import Part, S
from storage.remote import refuse_overwriting
from storage.root import DataRoot, Stored
from storage.seal import commits_of, is_finished, seal_part, seals_of
from storage.spec import EncodingSpec, PixelSpec
from storage.verify import Problem, reported, verify_part
from storage.withdrawn import withdrawn_rows

_WHERE = {"batch": pl.String, "frames": pl.Int32, "part": pl.UInt16, "shard": pl.UInt32}
_ALWAYS = ("row_id", "slot", "status")


class Store(Generic[S]):
    """A store of one spec; nothing is read or written before a method asks for it."""

    noun: ClassVar[Stored]  # names the folder, and the store in messages
    spec_type: ClassVar[Any]  # S

    def __init__(self, root: DataRoot, spec: S) -> None:
        self.root = root
        self.spec = spec
        self.digest = spec.digest()
        self._folder = root.spec_folder(self.digest, self.noun)

    @classmethod
    def open(cls, root: DataRoot, digest: str) -> Self:
        """The store of that digest; UpstreamError where there is none, DamagedError where its spec is not its own."""
        path = f"{root.spec_folder(digest, cls.noun)}/spec.json"
        try:
            spec = cls.spec_type.from_json(atomic.read_json(path))
        except ConfigError as error:
            raise DamagedError(f"{path} is no spec of {cls.noun} ({error}): restore it") from error
        if spec.digest() != digest:
            raise DamagedError(f"{path} was changed: its digest is {spec.digest()}. Restore it")
        return cls(root, spec)

    @classmethod
    def every(cls, root: DataRoot) -> list[Self]:
        """Every store that the root holds, by digest; DamagedError where a spec is not its own."""
        return [cls.open(root, digest) for digest in listing.folders(root.folder(cls.noun), r"[0-9a-f]{32}")]

    def create(self) -> None:
        """Write the spec as JSON; nothing to do where it exists already.

        ConfigError on an object store that cannot tell which of two writers was first.
        """
        refuse_overwriting(self.root.url)
        path = f"{self._folder}/spec.json"
        if not atomic.exists(path):  # asked first: what exists may be used where nothing may be written
            with suppress(ConflictError):
                atomic.create_exclusively(path, (json.dumps(self.spec.to_json(), indent=1) + "\n").encode())
        self.open(self.root, self.digest)  # refuses one that was changed

    def batches(self) -> list[str]:
        """Batches that have at least one part, sorted."""
        names = listing.folders(self._folder, r"[a-z0-9_]+(\.[0-9]{6})?")
        return [name for name in names if self.frames_of(name)]

    def frames_of(self, batch: str) -> list[int]:
        """Clip lengths (frames) of which the batch has parts, sorted."""
        names = listing.folders(self.root.stored_batch(self.digest, batch, self.noun), r"f[1-9][0-9]*")
        found = sorted(int(name[1:]) for name in names)
        return [frames for frames in found if self.parts(batch, frames)]

    def parts(self, batch: str, frames: int) -> list[int]:
        """Numbers of the parts, sorted."""
        names = listing.folders(self.root.parts(self.digest, batch, frames, self.noun), r"[0-9]{4,5}")
        return sorted(int(name) for name in names)

    def part(self, batch: str, frames: int, number: int) -> Part[S]:
        """A part by its number, whether or not it exists."""
        return Part(self.root.part(self.digest, batch, frames, number, self.noun), self.spec, batch, frames, number)

    def parts_of(self, batch: str, frames: int | None = None) -> Iterator[Part[S]]:
        """Every part of a batch, or those of one clip length, in order."""
        for length in self.frames_of(batch) if frames is None else [frames]:
            yield from (self.part(batch, length, number) for number in self.parts(batch, length))

    def plan_part(
        self, batch: str, frames: int, row_ids: Sequence[bytes], known: Sequence[int] | None = None
    ) -> Part[S]:
        """Open the next part for these rows, in this order; ConflictError if another planner took its number.

        `known` are the parts that were there before the rows were chosen, as writers that share a batch must say: the
        rows of a part that was planned since may be the same.
        """
        known = self.parts(batch, frames) if known is None else known
        part = self.part(batch, frames, max(known, default=-1) + 1)
        part.create(row_ids)
        return part

    def unfinished(self, batch: str, frames: int) -> Part[S] | None:
        """The first part with a shard that is not committed."""
        return next((part for part in self.parts_of(batch, frames) if not is_finished(part)), None)

    def seal(self, batch: str) -> None:
        """Seal each finished part of a batch; nothing to do where they are sealed."""
        for part in self.parts_of(batch):
            seal_part(part)

    def commits(self, batch: str, frames: int | None = None, columns: Sequence[str] | None = None) -> pl.DataFrame:
        """Columns of the format's schema and batch, frames, part, shard: one line a committed row, failed ones too.

        A row id found twice counts once: ok before failed, then in the lowest (part, shard). `slot` numbers the part.
        Of the schema's `columns`, row_id, slot and status are always there; the others cost less where not asked for.
        """
        schema = shard.row_format(self.spec, 1).schema
        asked = [name for name in schema.column_names() if columns is None or name in {*_ALWAYS, *columns}]
        empty = schema.create_empty().select(asked)
        found = [empty.with_columns(pl.lit(None, dtype).alias(name) for name, dtype in _WHERE.items())]
        for part in self.parts_of(batch, frames):
            where = {"batch": part.batch, "frames": part.frames, "part": part.number}
            located = [pl.lit(value, _WHERE[name]).alias(name) for name, value in where.items()]
            located.append((pl.col("slot") // shard.ROWS_PER_SHARD).alias("shard"))
            found.append(commits_of(part, asked).with_columns(located))
        united = pl.concat(found)
        if united["row_id"].n_unique() == united.height:
            return united  # in this order already
        order = [pl.col("status") != "ok", "frames", "part", "shard", "slot"]
        return united.sort(order).unique("row_id", keep="first", maintain_order=True).sort("frames", "part", "slot")

    def seals(self, batch: str) -> list[tuple[str, tuple[int, int]]]:
        """What `commits` is read from: each table and its seal, so that a change is seen without reading rows."""
        return [found for part in self.parts_of(batch) for found in seals_of(part)]

    def refuse_gone(self) -> None:
        """UpstreamError where the store is not there whose rows are asked for, DamagedError for another spec."""
        try:
            self.open(self.root, self.digest)
        except UpstreamError as error:
            raise UpstreamError(
                f"the {self.noun} in {self._folder} are gone: {error}. Put the folder back, or make 'latents' and "
                "'trainset' again"
            ) from error

    def verify(self, batch: str | None = None, *, quick: bool = False) -> list[Problem]:
        """Read every byte of one batch or of all; what is missing, changed or left over. Sound: an empty list.

        With `quick`, names, sizes, seals and records alone.
        """
        problems: list[Problem] = []
        with reported(problems, f"{self._folder}/spec.json", "restore it"):
            self.open(self.root, self.digest)
        withdrawn: frozenset[bytes] = frozenset()
        # where a record is damaged, its rows are reported too: that they may be zeros is not known
        with reported(problems, self.root.withdrawn(), "as it says"):
            withdrawn = withdrawn_rows(self.root)
        for name in self.batches() if batch is None else [batch]:
            for part in self.parts_of(name):
                problems += verify_part(part, withdrawn, quick=quick)
        return problems


class LatentStore(Store[EncodingSpec]):
    """The latents of one encoding spec."""

    noun = "latents"
    spec_type = EncodingSpec


class PixelStore(Store[PixelSpec]):
    """The clips of one pixel spec: JPEG frames under the row ids of the latents, for recipes that read pixels."""

    noun = "pixels"
    spec_type = PixelSpec


def every_store(root: DataRoot) -> list[LatentStore | PixelStore]:
    """All stores that the root holds."""
    return [*LatentStore.every(root), *PixelStore.every(root)]
