"""Stored latents for training code of others: a map-style torch data set over the rows of a trainset.

Rows are read and checked as our own loader reads them (storage/reader.py). The data set may be pickled, and used in
worker processes however they start: each process opens the store for itself.

Axes: F frames or latent frames, C channels, h w cells.
"""

import functools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float16
from torch import Tensor
from torch.utils.data import Dataset

from nextvid.config.project import open_project
from nextvid.trainset.trainset import Trainset
from storage.atomic import exists
from storage.errors import ConfigError, RefusedError
from storage.reader import RowReader, open_reader, row_id
from storage.root import DataRoot
from storage.schemas import Clips, Labels
from storage.tables import read_table

TRAINSET = "/trainset/"
BATCHES_KEPT = 8  # whose facts `row` keeps: our choice; 10,000 rows of a batch take some MB

Row = Float16[Tensor, "F C h w"]


@dataclass(frozen=True)
class RowFacts:
    """Where a row comes from: ids in hex, times in microseconds of the file, crop in upright source pixels.

    The last four are None where the root has no tables of the row's batch, or newer ones without this row.
    """

    row_id: str
    clip_id: str
    media_id: str
    dataset: str
    batch: str
    uri: str
    times_us: tuple[int, ...] | None = None  # of each frame
    crop: tuple[int, int, int, int] | None = None  # x, y, width, height
    flip: bool | None = None
    labels: dict[str, tuple[str, ...]] | None = None  # values by target, of the file and of spans that meet the clip


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
        # torch's memory begins a cache line; into numpy's, 16 bytes after one, a copy takes a quarter longer
        found = torch.empty((len(wanted), *self.spec.row_shape(self.frames)), dtype=torch.float16)
        for address, out in zip(wanted, found.numpy(), strict=True):
            reader.read_into(self.frames, address, out)
        return list(found.unbind())

    def __iter__(self) -> Iterator[Row]:
        return map(self.__getitem__, range(self._count))

    def row(self, index: int) -> RowFacts:
        """Where a row comes from, by the trainset's lineage and the tables of its batch."""
        place = self._place(index)
        address = self._open()[0][place]
        dataset = next(name for name, (first, count) in self._offsets.items() if first <= place < first + count)
        return _facts(self.root, self.digest, self.batches[int(address["batch"])])[dataset, row_id(address)]

    def in_store_order(self) -> list[int]:
        """Indices of all rows in the order in which the store has them, which reads fastest."""
        rows, _ = self._open()
        return np.lexsort([rows[name] for name in ("slot", "shard", "part", "batch")]).tolist()

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


@functools.lru_cache(BATCHES_KEPT)
def _facts(root: DataRoot, digest: str, batch: str) -> dict[tuple[str, bytes], RowFacts]:
    """Facts of a batch's rows in a trainset, by dataset and row id."""
    lineage = Trainset.open(root, digest).lineage(batch)
    found = {
        (row["dataset"], row["row_id"]): RowFacts(
            row["row_id"].hex(), row["clip_id"].hex(), row["media_id"].hex(), row["dataset"], batch, row["uri"]
        )
        for row in lineage.iter_rows(named=True)
    }
    if not (exists(root.table("clips", batch)) and exists(root.table("labels", batch))):
        return found
    spans: dict[bytes, list[tuple[int | None, int | None, str, str]]] = {}
    for media, *span in read_table(root.table("labels", batch), Labels).iter_rows():
        spans.setdefault(media, []).append((span[0], span[1], span[2], span[3]))
    for clip in read_table(root.table("clips", batch), Clips).iter_rows(named=True):
        if row := found.get((clip["dataset"], clip["row_id"])):
            times_us, labels = tuple(clip["times_us"]), dict[str, tuple[str, ...]]()
            for start_us, end_us, target, value in spans.get(clip["media_id"], ()):
                meets = (start_us is None or start_us <= times_us[-1]) and (end_us is None or end_us > times_us[0])
                if meets and value not in labels.get(target, ()):
                    labels[target] = (*labels.get(target, ()), value)
            crop = (clip["crop_x"], clip["crop_y"], clip["crop_w"], clip["crop_h"])
            key = clip["dataset"], clip["row_id"]
            found[key] = replace(row, times_us=times_us, crop=crop, flip=clip["flip"], labels=labels)
    return found
