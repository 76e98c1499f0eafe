"""Pixels from the store into a batch, for a CPU (`HostPixels`) or a GPU (`StagedPixels`).

The loader's threads decode JPEGs straight into host memory that is used again and again. They run in parallel because
the decoder releases Python's interpreter lock (docs/decisions/0010, 0011). Bytes stay bytes until the step, a quarter
of the memory, and are normalised on the device (nextvid/train/step.py).

Axes: B clips, F frames, H W pixels.
"""

import math

import numpy as np
import torch
from einops import repeat
from jaxtyping import UInt8
from torch import Tensor

from nextvid.train.ring import Buffer, Leased, Ring, sent
from nextvid.trainset.order import IMAGE, Drawn
from nextvid.trainset.pixels import TrainsetPixels
from storage.pixel_reader import PixelReader

Frames = UInt8[Tensor, "B F H W 3"]


class HostPixels:
    """Frames in host memory, which the step reads in place."""

    def __init__(self, reader: PixelReader, pixels: TrainsetPixels, largest: int) -> None:
        """`largest`: frames of the largest batch."""
        self._rows = _Rows(reader, pixels)
        self._memory = Leased(largest * math.prod(self._rows.shape), np.uint8)

    def will_need(self, drawn: Drawn) -> None:
        """Ask the kernel to read the rows ahead."""
        self._rows.will_need(drawn)

    def memory(self, clips: int, frames: int) -> Frames:
        """Memory for a batch."""
        shape = (clips, frames, *self._rows.shape)
        return self._memory.take()[: math.prod(shape)].view(shape)

    def fill(self, drawn: Drawn, memory: Frames) -> None:
        """Decode rows, an image into every frame. Runs in a thread."""
        self._rows.decode(drawn, memory)
        memory[drawn.of_frames(IMAGE)] = memory[drawn.of_frames(IMAGE), :1]

    def deliver(self, drawn: Drawn, memory: Frames) -> Frames:
        """The memory itself: the batch is complete."""
        return memory


class StagedPixels:
    """Frames in a pinned ring, copied to a device; images are repeated there."""

    def __init__(
        self, reader: PixelReader, pixels: TrainsetPixels, largest: int, buffers: int, device: torch.device
    ) -> None:
        """As HostPixels; up to `buffers` batches are filled or copied at a time."""
        self._rows, self._device = _Rows(reader, pixels), device
        self._ring = Ring(buffers, largest * math.prod(self._rows.shape), torch.uint8, pinned=device.type == "cuda")

    def will_need(self, drawn: Drawn) -> None:
        """Ask the kernel to read the rows ahead."""
        self._rows.will_need(drawn)

    def memory(self, clips: int, frames: int) -> tuple[Buffer, Frames]:
        """A buffer of the ring, and its memory in the shape of a batch."""
        shape, buffer = (clips, frames, *self._rows.shape), self._ring.take()
        return buffer, buffer.memory[: math.prod(shape)].view(shape)

    def fill(self, drawn: Drawn, memory: tuple[Buffer, Frames]) -> None:
        """Decode rows; of an image only the first frame is written. Runs in a thread."""
        memory[0].wait()
        self._rows.decode(drawn, memory[1])

    def deliver(self, drawn: Drawn, memory: tuple[Buffer, Frames]) -> Frames:
        """Copy to the device, repeat images over time; the buffer goes back into the ring."""
        frames = torch.empty_like(memory[1], device=self._device).copy_(memory[1], non_blocking=True)
        copied = None
        if self._device.type == "cuda":
            copied = torch.cuda.Event()
            copied.record()
        self._ring.give(memory[0], copied)
        images = drawn.of_frames(IMAGE)
        if frames.shape[1] > IMAGE and len(images):
            indices = sent(images, self._device)
            frames[indices] = repeat(frames[indices, 0], "B H W c -> B F H W c", F=frames.shape[1])
        return frames


class _Rows:
    """Addresses of rows by clip length, and their decoding: shared by both ways."""

    def __init__(self, reader: PixelReader, pixels: TrainsetPixels) -> None:
        self._reader = reader
        self._addresses = {frames: pixels.rows(frames) for frames in pixels.trainset.lengths}
        self.shape = pixels.spec.row_shape(1)[1:]  # (H, W, 3)

    def will_need(self, drawn: Drawn) -> None:
        for frames in np.unique(drawn.frames).tolist():
            self._reader.will_need(frames, self._addresses[frames][drawn.rows[drawn.of_frames(frames)]])

    def decode(self, drawn: Drawn, memory: Frames) -> None:
        out = memory.numpy()
        for clip, (frames, row) in enumerate(zip(drawn.frames.tolist(), drawn.rows.tolist(), strict=True)):
            self._reader.read_into(frames, self._addresses[frames][row], out[clip, :frames])
