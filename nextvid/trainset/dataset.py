"""Stored latents for training code of others: a map-style torch data set over the rows of a trainset.

Rows are read and checked as our own loader reads them (storage/reader.py). The data set may be pickled, and used in
worker processes however they start: each process opens the store for itself.

Axes: F frames or latent frames, C channels, h w cells.
"""

import functools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import torch
from jaxtyping import Float16
from torch import Tensor
from torch.utils.data import Dataset

from nextvid.config.project import open_project
from nextvid.trainset.trainset import Trainset
from storage.errors import ConfigError, RefusedError, UpstreamError
from storage.reader import RowReader, open_reader, row_id
from storage.root import DataRoot
from storage.schemas import Clips, Labels
from storage.tables import read_table

TRAINSET = "/trainset/"
TABLES_KEPT = 8  # batches whose tables `row` keeps: our choice; rows of one batch follow each other in a data set

Row = Float16[Tensor, "F C h w"]


@dataclass(frozen=True)
class RowFacts:
    """Where a row comes from: ids in hex, times in microseconds of the file, crop in upright source pixels."""

    row_id: str
    clip_id: str
    media_id: str
    dataset: str
    batch: str
    uri: str
    times_us: tuple[int, ...]  # of each frame
    crop: tuple[int, int, int, int]  # x, y, width, height
    flip: bool
    labels: dict[str, tuple[str, ...]]  # values by target, of the file and of spans that meet the clip


class LatentDataset(Dataset[Row]):
    """Rows of one clip length of a trainset, in its order: sorted by dataset, then row id. `open_latents` opens it.

    A row is float16 [F, C, h, w], as the autoencoder gave it; `mean` and `std` [C] are the trainset's, to normalise it.
    """

    def __init__(self, root: DataRoot, digest: str, frames: int) -> None:
        self.root, self.digest, self.frames = root, digest, frames
        trainset = Trainset.open(root, digest)
        trainset.refuse_withdrawn([frames])
        self.spec, self.batches = trainset.spec, trainset.batches
        self.mean, self.std = torch.from_numpy(trainset.mean), torch.from_numpy(trainset.std)
        self._offsets = trainset.offsets(frames)
        self._count = sum(count for _, count in self._offsets.values())
        self._opened: tuple[int, np.ndarray, RowReader] | None = None  # process, addresses, reader

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Row:
        """One row, a copy. Raises IndexError beyond the end, DamagedError where bytes are not as committed."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Row]:
        """Rows of a batch, which torch's DataLoader asks for at once; views of one array [n, F, C, h, w]."""
        rows, reader = self._open()
        wanted = rows[[self._place(index) for index in indices]]
        reader.will_need(self.frames, wanted)
        found = np.empty((len(wanted), *self.spec.row_shape(self.frames)), np.float16)
        for address, out in zip(wanted, found, strict=True):
            reader.read_into(self.frames, address, out)
        return list(torch.from_numpy(found).unbind())

    def __iter__(self) -> Iterator[Row]:
        return map(self.__getitem__, range(self._count))

    def row(self, index: int) -> RowFacts:
        """Where a row comes from, by the tables of its batch. Raises UpstreamError where they no longer have it."""
        rows, _ = self._open()
        address = rows[self._place(index)]
        batch, row = self.batches[int(address["batch"])], row_id(address)
        clips, labels = _tables(self.root, batch)
        found = clips.filter(pl.col("row_id") == row)
        if found.is_empty():
            raise UpstreamError(
                f"clips of batch {batch} were made again without row {row.hex()}; 'nextvid lineage' has its file"
            )
        clip = found.row(0, named=True)
        times_us = tuple(clip["times_us"])
        spans = labels.filter(
            pl.col("media_id") == clip["media_id"],
            pl.col("start_us").is_null() | (pl.col("start_us") <= times_us[-1]),
            pl.col("end_us").is_null() | (pl.col("end_us") > times_us[0]),
        )
        values: dict[str, tuple[str, ...]] = {}
        for target, value in spans.select("target", "value").unique(maintain_order=True).iter_rows():
            values[target] = (*values.get(target, ()), value)
        ids = {name: clip[name].hex() for name in ("row_id", "clip_id", "media_id")}
        crop = (clip["crop_x"], clip["crop_y"], clip["crop_w"], clip["crop_h"])
        return RowFacts(**ids, dataset=self.dataset(index), batch=batch, uri=clip["uri"], times_us=times_us, crop=crop,
                        flip=clip["flip"], labels=values)  # fmt: skip

    def dataset(self, index: int) -> str:
        """The entry of corpus.yaml that a row is of."""
        place = self._place(index)
        return next(name for name, (first, count) in self._offsets.items() if first <= place < first + count)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}

    def _open(self) -> tuple[np.ndarray, RowReader]:
        if self._opened is None or self._opened[0] != os.getpid():  # a fork's locks and connections are its parent's
            rows = Trainset.open(self.root, self.digest).rows(self.frames)
            reader = open_reader(self.root, self.spec, self.batches, {self.frames: rows})
            self._opened = os.getpid(), rows, reader
        return self._opened[1:]

    def _place(self, index: int) -> int:
        place = index + self._count if index < 0 else index
        if not 0 <= place < self._count:
            raise IndexError(f"row {index} of {self._count}: trainset {self.digest}, clips of {self.frames} frames")
        return place


def open_latents(
    where: str | os.PathLike[str], frames: int | None = None, *, trainset: str | None = None, cache_gb: float = 0.0
) -> LatentDataset:
    """The rows of a trainset as a torch data set.

    Args:
        where: corpus.yaml, or the folder or URL of a data root, or that of one trainset in it (ROOT/trainset/DIGEST).
        frames: clip length; may be left out where the trainset has one length only. 1 means images.
        trainset: digest; the newest if left out.
        cache_gb: of a root on an object store, room for copies of its shards; 0 reads row by row.

    Raises ConfigError or RefusedError for a request that does not fit or a trainset with withdrawn rows, UpstreamError
    where there is no trainset.
    """
    place = os.fspath(where)
    if place.endswith((".yaml", ".yml")):
        root = open_project(place).root
    else:
        url, named, digest = place.rstrip("/").partition(TRAINSET)
        if named and trainset is not None:
            raise ConfigError(f"{place} names a trainset already: leave trainset={trainset!r} out, or name the root")
        root = DataRoot.open(url, runs_root=".", cache_bytes=round(cache_gb * 1e9))
        trainset = digest if named else trainset
    opened = Trainset.open(root, trainset)
    if frames is None:
        if len(opened.lengths) > 1:
            held = ", ".join(map(str, opened.lengths))
            raise RefusedError(f"trainset {opened.digest} has clips of {held} frames: name one by frames=")
        frames = opened.lengths[0]
    return LatentDataset(root, opened.digest, frames)


@functools.lru_cache(TABLES_KEPT)
def _tables(root: DataRoot, batch: str) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Clips that are rows of the store, and labels, of a batch."""
    clips = read_table(root.table("clips", batch), Clips).filter(pl.col("row_id").is_not_null())
    return clips, read_table(root.table("labels", batch), Labels)
