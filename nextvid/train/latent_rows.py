"""Latents from the store into a batch, for a CPU (`HostLatents`) or a GPU (`StagedLatents`).

On a CPU the loader's threads do everything, clip by clip while it is in the cache: float16 to float32, normalise,
repeat images, fold to the model's grid. For a GPU they copy float16 into pinned memory, and the rest happens on the GPU
after one copy. Both give the same batch.

Axes: B clips, F frames; C channels, H and W cells of the store; c channels, h and w cells of the model's grid.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from einops import repeat
from jaxtyping import Float, Int
from torch import Tensor

from nextvid.model.tokens import normalise, space_to_depth
from nextvid.train.ring import Buffer, Leased, Ring, sent
from nextvid.trainset.order import IMAGE, Drawn
from nextvid.trainset.trainset import Trainset
from storage.reader import RowReader
from storage.spec import latent_of_frames


class HostLatents:
    """Normalised latents in host memory, which the step reads in place."""

    def __init__(self, reader: RowReader, trainset: Trainset, fold: int, largest: int) -> None:
        """`largest`: frames of the largest batch. `fold`: store cells per side of a cell of the model's grid."""
        spec = trainset.spec
        self._reader, self._fold, self._time_map = reader, fold, spec.time_map
        self._shape = (spec.channels * fold**2, spec.height // fold, spec.width // fold)
        self._mean, self._std = (torch.from_numpy(values) for values in (trainset.mean, trainset.std))
        self._means, self._stds = (values[:, None, None] for values in (self._mean, self._std))  # over cells
        self._memory = Leased(largest * math.prod(self._shape))

    def will_need(self, drawn: Drawn) -> None:
        """Ask the kernel to read the rows ahead."""
        _will_need(self._reader, drawn)

    def memory(self, clips: int, frames: int) -> Float[Tensor, "B F c h w"]:
        """Memory for a batch."""
        shape = (clips, frames, *self._shape)
        return self._memory.take()[: math.prod(shape)].view(shape)

    def fill(self, drawn: Drawn, memory: Float[Tensor, "B F c h w"]) -> None:
        """Read and convert rows. Runs in a thread."""
        for numbers, rows in _rows(self._reader, drawn, self._time_map):
            for number, row in zip(numbers.tolist(), rows, strict=True):
                out = memory[number]
                if self._fold > 1:
                    out.copy_(space_to_depth(normalise(row[None].float(), self._mean, self._std), self._fold)[0])
                else:
                    out.copy_(row)  # an image to every frame
                    out.sub_(self._means).div_(self._stds)  # `normalise`, in place

    def deliver(self, drawn: Drawn, memory: Float[Tensor, "B F c h w"]) -> Float[Tensor, "B F c h w"]:
        """The memory itself: the batch is complete."""
        return memory


class StagedLatents:
    """float16 rows in a pinned ring, copied to a device and normalised there."""

    def __init__(
        self, reader: RowReader, trainset: Trainset, fold: int, largest: int, buffers: int, device: torch.device
    ) -> None:
        """As HostLatents; up to `buffers` batches are filled or copied at a time."""
        self._reader, self._fold, self._device = reader, fold, device
        self._time_map = trainset.spec.time_map
        self._shape = (trainset.spec.channels, trainset.spec.height, trainset.spec.width)
        self._mean, self._std = (torch.from_numpy(values).to(device) for values in (trainset.mean, trainset.std))
        self._ring = Ring(buffers, largest * math.prod(self._shape), torch.float16, pinned=device.type == "cuda")

    def will_need(self, drawn: Drawn) -> None:
        """Ask the kernel to read the rows ahead."""
        _will_need(self._reader, drawn)

    def memory(self, clips: int, frames: int) -> tuple[Buffer, Float[Tensor, "B F C H W"]]:
        """A buffer of the ring, and its memory in the shape of a batch."""
        shape, buffer = (clips, frames, *self._shape), self._ring.take()
        return buffer, buffer.memory[: math.prod(shape)].view(shape)

    def fill(self, drawn: Drawn, memory: tuple[Buffer, Float[Tensor, "B F C H W"]]) -> None:
        """Copy rows; of an image only the first frame is written. Runs in a thread."""
        memory[0].wait()
        for numbers, rows in _rows(self._reader, drawn, self._time_map):
            if len(rows) == len(drawn) and rows[0].shape == memory[1].shape[1:]:
                torch.stack(rows, out=memory[1])  # one call: a third less time a clip than one by one
                continue
            for number, row in zip(numbers.tolist(), rows, strict=True):
                memory[1][number, : len(row)].copy_(row)

    def deliver(self, drawn: Drawn, memory: tuple[Buffer, Float[Tensor, "B F C H W"]]) -> Float[Tensor, "B F c h w"]:
        """Copy to the device, repeat images over time, normalise, fold; the buffer goes back into the ring."""
        latents = memory[1].to(self._device, non_blocking=True).float()  # a new tensor, so it may be changed in place
        copied = None
        if self._device.type == "cuda":
            copied = torch.cuda.Event()
            copied.record()
        self._ring.give(memory[0], copied)
        frames = latents.shape[1]
        images = drawn.of_frames(IMAGE)
        if frames > IMAGE and len(images):
            indices = sent(images, self._device)
            latents[indices] = repeat(latents[indices, 0], "B C H W -> B F C H W", F=frames)
        normalised = normalise(latents, self._mean, self._std)
        return space_to_depth(normalised, self._fold) if self._fold > 1 else normalised


def _will_need(reader: RowReader, drawn: Drawn) -> None:
    for frames in np.unique(drawn.frames).tolist():
        reader.will_need(frames, drawn.addresses[drawn.of_frames(frames)])


def _rows(
    reader: RowReader, drawn: Drawn, time_map: str
) -> Iterator[tuple[Int[np.ndarray, " n"], list[Float[Tensor, "F C H W"]]]]:
    """For each clip length: the clips' indices in the batch, and their stored rows.

    If the store has latent frames, each frame of a clip takes the one that covers it (docs/method.md 14, row 32).
    """
    for frames in np.unique(drawn.frames).tolist():
        numbers = drawn.of_frames(frames)
        rows = [torch.from_numpy(row) for row in reader.rows(frames, drawn.addresses[numbers])]
        if time_map != "frame":
            covering = latent_of_frames(time_map, frames)
            rows = [row[covering] for row in rows]
        yield numbers, rows
