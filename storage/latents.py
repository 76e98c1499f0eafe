"""LatentStore: the latents of one encoding spec, as batches, clip lengths, parts and committed shards.

RowStore is what it shares with the store of pixels (storage/pixels.py): everything but what a row is. Any number
of processes write at once, each shard once; readers see committed rows only, and a missing or short shard is an error,
never zeros or NaN (design, section 5). Lives on file systems and object stores. Must not know media,
autoencoders or training. Reading rows fast: reader.py.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, ClassVar, Generic, Self, TypeVar

import dataframely as dy
import polars as pl

from storage import atomic, listing
from storage.errors import ConfigError, ConflictError, DamagedError, UpstreamError, is_damage
from storage.part import Part, PlannedPart, Spec, create_part
from storage.root import DataRoot, Stored
from storage.schemas import Commits
from storage.shard import ROWS_PER_SHARD
from storage.spec import EncodingSpec
from storage.verify import Problem, verify_latents
from storage.withdrawn import withdrawn_rows

__all__ = ["ROWS_PER_SHARD", "EncodingSpec", "LatentStore", "Part", "Problem"]

S = TypeVar("S", bound=Spec)
P = TypeVar("P", bound=PlannedPart)

_WHERE = {"batch": pl.String, "frames": pl.Int32, "part": pl.UInt16, "shard": pl.UInt32}


class RowStore(ABC, Generic[S, P]):
    """A store of one spec; nothing is read or written before a method asks for it."""

    noun: ClassVar[Stored]  # names the folder, and the store in messages
    schema: ClassVar[type[dy.Schema]]  # of its commits

    def __init__(self, root: DataRoot, spec: S) -> None:
        self.root = root
        self.spec = spec
        self.digest = spec.digest()

    @staticmethod
    @abstractmethod
    def spec_of(value: Mapping[str, Any]) -> S:
        """The spec of what its `to_json` gave; ConfigError where it is none."""

    @abstractmethod
    def part(self, batch: str, frames: int, number: int) -> P:
        """A part by its number, whether or not it exists."""

    @abstractmethod
    def check(self, part: P, withdrawn: frozenset[bytes]) -> list[Problem]:
        """Read every byte of a part; what is wrong with it."""

    @classmethod
    def open(cls, root: DataRoot, digest: str) -> Self:
        """The store of that digest; UpstreamError where there is none, DamagedError where its spec is not its own."""
        path = f"{root.spec_folder(digest, cls.noun)}/spec.json"
        try:
            spec = cls.spec_of(atomic.read_json(path))
        except ConfigError as error:
            raise DamagedError(f"{path} is no spec of {cls.noun} ({error}): restore it") from error
        if spec.digest() != digest:
            raise DamagedError(f"{path} was changed: its digest is {spec.digest()}. Restore it")
        return cls(root, spec)

    @classmethod
    def every(cls, root: DataRoot) -> list[Self]:
        """Every store that the root holds, by digest; DamagedError where a spec is not its own."""
        return [cls.open(root, digest) for digest in listing.folders(root.stores(cls.noun), r"[0-9a-f]{32}")]

    def create(self) -> None:
        """Write the spec in words; nothing to do where it stands already."""
        path = f"{self._folder}/spec.json"
        if not atomic.exists(path):  # asked first: where nothing may be written, what stands may be used
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

    def plan_part(self, batch: str, frames: int, row_ids: Sequence[bytes]) -> P:
        """Open the next part for these rows, in this order; ConflictError if another planner took its number."""
        part = self.part(batch, frames, max(self.parts(batch, frames), default=-1) + 1)
        create_part(part, row_ids)
        return part

    def unfinished(self, batch: str, frames: int) -> P | None:
        """The first part with a shard that is not committed."""
        for number in self.parts(batch, frames):
            part = self.part(batch, frames, number)
            if len(part.committed_shards()) < part.shards:
                return part
        return None

    def commits(self, batch: str, frames: int | None = None) -> pl.DataFrame:
        """Columns of `schema` and batch, frames, part, shard: one line a committed row, failed ones too.

        A row id found twice counts once: ok before failed, then in the lowest (part, shard). `slot` numbers the part.
        """
        lengths = self.frames_of(batch) if frames is None else [frames]
        empty = self.schema.create_empty()
        found = [empty.with_columns(pl.lit(None, dtype).alias(name) for name, dtype in _WHERE.items())]
        for length in lengths:
            for number in self.parts(batch, length):
                part = self.part(batch, length, number)
                found += [_located(part, shard) for shard in part.committed_shards()]
        order = [pl.col("status") != "ok", "frames", "part", "shard", "slot"]
        united = pl.concat(found).sort(order).unique("row_id", keep="first", maintain_order=True)
        return united.sort("frames", "part", "slot")

    def table_paths(self, batch: str) -> list[str]:
        """All that `commits` is read from: each part's plan and commits."""
        places = [(frames, number) for frames in self.frames_of(batch) for number in self.parts(batch, frames)]
        return [path for place in places for path in self.part(batch, *place).table_paths()]

    def refuse_gone(self) -> None:
        """UpstreamError where the store is not there whose rows are asked for, DamagedError for another spec."""
        try:
            self.open(self.root, self.digest)
        except UpstreamError as error:
            raise UpstreamError(
                f"the {self.noun} in {self._folder} are gone: {error}. Put the folder back, or make 'latents' and "
                "'trainset' again"
            ) from error

    def verify(self, batch: str | None = None) -> list[Problem]:
        """Read every byte of one batch or of all; what is missing, changed or left over. Sound: an empty list."""
        problems: list[Problem] = []
        try:
            self.open(self.root, self.digest)
        except (OSError, ValueError) as error:
            if not is_damage(error):
                raise
            problems.append(Problem(f"{self._folder}/spec.json", None, str(error), "restore it"))
        try:
            withdrawn = withdrawn_rows(self.root)
        except DamagedError as error:  # rows of that file are then told as well: nobody knows that they may be zeros
            problems.append(Problem(self.root.withdrawn(), None, str(error), "as it says"))
            withdrawn = frozenset()
        for name in self.batches() if batch is None else [batch]:
            for frames in self.frames_of(name):
                for number in self.parts(name, frames):
                    problems += self.check(self.part(name, frames, number), withdrawn)
        return problems

    @property
    def _folder(self) -> str:
        return self.root.spec_folder(self.digest, self.noun)


class LatentStore(RowStore[EncodingSpec, Part]):
    """The latents of one encoding spec."""

    noun = "latents"
    schema = Commits

    @staticmethod
    def spec_of(value: Mapping[str, Any]) -> EncodingSpec:
        return EncodingSpec.from_json(value)

    def part(self, batch: str, frames: int, number: int) -> Part:
        return Part(self.root.part(self.digest, batch, frames, number), self.spec, batch, frames, number)

    def check(self, part: Part, withdrawn: frozenset[bytes]) -> list[Problem]:
        return verify_latents(part, withdrawn)


def _located(part: PlannedPart, shard: int) -> pl.DataFrame:
    values = {"batch": part.batch, "frames": part.frames, "part": part.number, "shard": shard}
    return part.commit(shard).with_columns(pl.lit(values[name], dtype).alias(name) for name, dtype in _WHERE.items())
