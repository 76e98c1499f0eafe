"""Formats that need no package beyond the project's own: how each holds the clips and gives out one by its number.

`write` is never timed; `opened` gives a function from a number to a clip, as a view where the format can. Batches of
any of them come from torch's DataLoader, as their users have it. Peers with packages of their own: peers.py.

Axes: F frames, C channels, h w cells.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float16
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from benchmarks.clips import BATCH, SHAPE, Clips, Store, write_store

Read = Callable[[int], Float16[np.ndarray, "F C h w"]]


@dataclass(frozen=True)
class Source:
    """One format: how clips get into a folder, and how they come out. All functions live in modules, for workers."""

    name: str
    write: Callable[[Clips, Path], None]
    opened: Callable[[Path], Read] | None  # None: it has no random access
    batches: Callable[[Path, Sequence[int], int], Iterable[Tensor]]  # folder, order, workers -> an epoch each time


class ByNumber(Dataset[np.ndarray]):
    """Clips of an opened format for a DataLoader; each worker opens its own."""

    def __init__(self, opened: Callable[[Path], Read], folder: Path) -> None:
        self._opened, self._folder = opened, folder
        self._read: Read | None = None

    def __getitem__(self, clip: int) -> np.ndarray:
        self._read = self._read or self._opened(self._folder)
        return self._read(clip)


def stacked(clips: Sequence[np.ndarray]) -> Tensor:
    """A batch, copied once: in a worker into shared memory, as torch's own default_collate does it."""
    shape = (len(clips), *SHAPE)
    if get_worker_info() is None:
        return torch.from_numpy(np.stack(clips))
    shared = torch.UntypedStorage._new_shared(2 * math.prod(shape))  # of float16
    out = torch.empty(0, dtype=torch.float16).set_(shared).view(shape)
    np.stack(clips, out=out.numpy())
    return out


def by_number(opened: Callable[[Path], Read], folder: Path, order: Sequence[int], workers: int) -> Iterable[Tensor]:
    """Batches in a given order through torch's DataLoader."""
    return loaded(ByNumber(opened, folder), workers, stacked, sampler=order)


def loaded(
    data: Dataset[Any],
    workers: int,
    collate: Callable[[Sequence[Any]], Tensor],
    **more: Any,  # noqa: ANN401 - torch's
) -> Iterable[Tensor]:
    """A DataLoader of torch as all formats have it; its workers live on from epoch to epoch."""
    found: Iterable[Tensor] = DataLoader(
        data, BATCH, num_workers=workers, persistent_workers=workers > 0, collate_fn=collate, **more
    )
    return found


def _write_raw(clips: Clips, folder: Path) -> None:
    clips.tofile(folder / "clips.bin")


def open_raw(folder: Path) -> Read:
    """One big file in a memory map, without index or checks: the limit of what a file can give."""
    clips = np.asarray(np.memmap(folder / "clips.bin", np.float16, "r"))  # rows of a memmap are memmaps, and cost more
    return clips.reshape(-1, *SHAPE).__getitem__


def _write_npy(clips: Clips, folder: Path) -> None:
    for number, clip in enumerate(clips):
        np.save(folder / f"{number:06d}.npy", clip, allow_pickle=False)


def _open_npy(folder: Path) -> Read:
    def read(clip: int) -> np.ndarray:
        found: np.ndarray = np.load(folder / f"{clip:06d}.npy", allow_pickle=False)
        return found

    return read


def _write_safetensors(clips: Clips, folder: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"latents": clips}, folder / "clips.safetensors")


def _open_safetensors(folder: Path) -> Read:
    from safetensors import safe_open

    # a view of the mapped file, where framework="numpy" and get_slice copy
    rows: np.ndarray = safe_open(folder / "clips.safetensors", framework="pt").get_tensor("latents").numpy()
    return rows.__getitem__


def _open_safetensors_anew(folder: Path) -> Read:
    from safetensors import safe_open

    def read(clip: int) -> np.ndarray:
        with safe_open(folder / "clips.safetensors", framework="pt") as file:
            found: np.ndarray = file.get_slice("latents")[clip].numpy()
        return found

    return read


def _open_zarr(folder: Path) -> Read:
    import zarr

    array = zarr.open_array(Store(folder).array_path, mode="r")

    def read(clip: int) -> np.ndarray:
        return np.asarray(array[clip])

    return read


def _open_store(folder: Path) -> Read:
    store = Store(folder)

    def read(clip: int) -> np.ndarray:
        out = np.empty(SHAPE, np.float16)
        store.read_into(clip, out)
        return out

    return read


def _raw_batches(folder: Path, order: Sequence[int], workers: int) -> Iterable[Tensor]:
    return by_number(open_raw, folder, order, workers)


def _npy_batches(folder: Path, order: Sequence[int], workers: int) -> Iterable[Tensor]:
    return by_number(_open_npy, folder, order, workers)


def _safetensors_batches(folder: Path, order: Sequence[int], workers: int) -> Iterable[Tensor]:
    return by_number(_open_safetensors, folder, order, workers)


def _safetensors_anew_batches(folder: Path, order: Sequence[int], workers: int) -> Iterable[Tensor]:
    return by_number(_open_safetensors_anew, folder, order, workers)


def _zarr_batches(folder: Path, order: Sequence[int], workers: int) -> Iterable[Tensor]:
    return by_number(_open_zarr, folder, order, workers)


def _store_batches(folder: Path, order: Sequence[int], workers: int) -> Iterable[Tensor]:
    return by_number(_open_store, folder, order, workers)


MEMMAP, VIEW, NPY = "np.memmap, one raw file", "safetensors, kept open", "npy per clip"
DATALOADER, ZARR = "torch DataLoader over RowReader", "zarr z[i]"
OWN: tuple[Source, ...] = (
    Source(MEMMAP, _write_raw, open_raw, _raw_batches),
    Source(VIEW, _write_safetensors, _open_safetensors, _safetensors_batches),
    Source("safetensors, LightningDiT", _write_safetensors, _open_safetensors_anew, _safetensors_anew_batches),
    Source(NPY, _write_npy, _open_npy, _npy_batches),
    Source(DATALOADER, write_store, None, _store_batches),  # its read alone is the RowReader's
    Source(ZARR, write_store, _open_zarr, _zarr_batches),
)
