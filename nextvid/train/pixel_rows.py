"""Pixels from the store into a batch, for either device: what loader.py calls a kind of row.

Threads decode JPEGs straight into host memory that is used again and again; bytes stay bytes until the step, a quarter
of the memory, and are normalised on the device (nextvid/train/batch.py). Threads, since the decoder releases the
interpreter's lock (docs/decisions/0010, 0011). It draws nothing and decides no order; opens no video.

Axes: B clips, F frames, H W pixels.
"""

import math

import numpy as np
import torch
from einops import repeat
from jaxtyping import UInt8
from torch import Tensor

from nextvid.train.ring import Leased, Place, Ring, sent
from nextvid.trainset.order import IMAGE, Drawn
from nextvid.trainset.pixels import TrainsetPixels
from storage.pixel_reader import PixelReader

Frames = UInt8[Tensor, "B F H W 3"]


class HostPixels:
    """Frames in host memory that is the batch's own."""

    def __init__(self, reader: PixelReader, pixels: TrainsetPixels, largest: int) -> None:
        """`largest`: frames of the largest batch."""
        self._rows = _Rows(reader, pixels)
        self._memory = Leased(largest * math.prod(self._rows.shape), np.uint8)

    def will_need(self, drawn: Drawn) -> None:
        """Have them read ahead."""
        self._rows.will_need(drawn)

    def place(self, clips: int, frames: int) -> Frames:
        """Memory for a batch."""
        shape = (clips, frames, *self._rows.shape)
        return self._memory.take()[: math.prod(shape)].view(shape)

    def fill(self, drawn: Drawn, place: Frames) -> None:
        """Decode rows into their places, an image into every frame. Runs in a thread."""
        self._rows.decode(drawn, place)
        place[drawn.of_frames(IMAGE)] = place[drawn.of_frames(IMAGE), :1]

    def deliver(self, drawn: Drawn, place: Frames) -> Frames:
        """It is there already."""
        return place


class StagedPixels:
    """Frames in a pinned ring, copied to a device; images are repeated there."""

    def __init__(
        self, reader: PixelReader, pixels: TrainsetPixels, largest: int, places: int, device: torch.device
    ) -> None:
        """As HostPixels; `places` batches are filled or copied at a time."""
        self._rows, self._device = _Rows(reader, pixels), device
        self._ring = Ring(places, largest * math.prod(self._rows.shape), torch.uint8, pinned=device.type == "cuda")

    def will_need(self, drawn: Drawn) -> None:
        """Have them read ahead."""
        self._rows.will_need(drawn)

    def place(self, clips: int, frames: int) -> tuple[Place, Frames]:
        """A place of the ring, and its memory for a batch."""
        shape, place = (clips, frames, *self._rows.shape), self._ring.take()
        return place, place.memory[: math.prod(shape)].view(shape)

    def fill(self, drawn: Drawn, place: tuple[Place, Frames]) -> None:
        """Decode rows, images into the first frame of their place. Runs in a thread."""
        place[0].wait()
        self._rows.decode(drawn, place[1])

    def deliver(self, drawn: Drawn, place: tuple[Place, Frames]) -> Frames:
        """To the device, images repeated over time; the place goes back into the ring."""
        frames = torch.empty_like(place[1], device=self._device).copy_(place[1], non_blocking=True)
        copied = None
        if self._device.type == "cuda":
            copied = torch.cuda.Event()
            copied.record()
        self._ring.give(place[0], copied)
        images = drawn.of_frames(IMAGE)
        if frames.shape[1] > IMAGE and len(images):
            places = sent(images, self._device)
            frames[places] = repeat(frames[places, 0], "B H W c -> B F H W c", F=frames.shape[1])
        return frames


class _Rows:
    """What both do alike: addresses by clip length, and their decoding."""

    def __init__(self, reader: PixelReader, pixels: TrainsetPixels) -> None:
        self._reader = reader
        self._addresses = {frames: pixels.rows(frames) for frames in pixels.trainset.lengths}
        self.shape = pixels.spec.row_shape(1)[1:]  # (H, W, 3)

    def will_need(self, drawn: Drawn) -> None:
        for frames in np.unique(drawn.frames).tolist():
            self._reader.will_need(frames, self._addresses[frames][drawn.rows[drawn.of_frames(frames)]])

    def decode(self, drawn: Drawn, place: Frames) -> None:
        out = place.numpy()
        for clip, (frames, row) in enumerate(zip(drawn.frames.tolist(), drawn.rows.tolist(), strict=True)):
            self._reader.read_into(frames, self._addresses[frames][row], out[clip, :frames])
