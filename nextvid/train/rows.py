"""Rows of the store into a batch: how latents and pixels are read, and the memory that they are read into.

For a CPU (`Hosted`) the loader's threads do everything, clip by clip while it is in the cache: latents become float32,
normalised, on the model's grid; images are repeated over time. For a GPU (`Staged`) they read rows as the store has
them, and the rest happens on the GPU after one copy. Both give the same batch.

JPEGs are decoded straight into that memory, in parallel because the decoder releases Python's interpreter lock
(docs/decisions/0010, 0011). Memory is used again and again, since fresh pages cost more than the copy into them.

Axes: B clips, F frames; `stored` is the shape of a frame in the store: C channels, H and W cells of latents, or H and W
pixels and 3 colours; `shape` is that of a frame in the batch, whose latents are on the model's grid.
"""

import collections
import math
import weakref
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from nextvid.model.tokens import normalise, space_to_depth
from nextvid.trainset.order import IMAGE, Drawn
from nextvid.trainset.trainset import Trainset
from storage.reader import PixelReader, RowReader
from storage.spec import PixelSpec, latent_of_frames

LINE_BYTES = 64  # of a cache line on x86-64 and most ARM


class Latents:
    """Rows of the latent store. All but `finish` run in threads, several batches at once.

    A stored frame of an int8 store is its values (C H W bytes), then the row's scales (C float32): a device gets these
    bytes and multiplies there.
    """

    dtype = np.float32

    def __init__(self, reader: RowReader, trainset: Trainset, fold: int, device: torch.device) -> None:
        """`fold`: store cells per side of a cell of the model's grid. `device`: where rows are normalised."""
        spec = trainset.spec
        self._reader, self._fold, self._time_map = reader, fold, spec.time_map
        self._frame = spec.channels, spec.height, spec.width
        self._scaled = spec.storage == "int8"
        self.stored_type = torch.uint8 if self._scaled else torch.float16
        self.stored = (math.prod(self._frame) + 4 * spec.channels,) if self._scaled else self._frame
        self.shape = (spec.channels * fold**2, spec.height // fold, spec.width // fold)
        self._mean, self._std = (torch.from_numpy(v).to(device) for v in (trainset.mean, trainset.std))
        self._means, self._stds = (values[:, None, None] for values in (self._mean, self._std))  # over cells

    def will_need(self, drawn: Drawn) -> None:
        """Ask the kernel to read the rows ahead."""
        for frames, _, addresses in drawn.by_frames:
            self._reader.will_need(frames, addresses)

    def fill(self, drawn: Drawn, memory: Float[Tensor, "B F *shape"]) -> None:
        """Read rows as the batch has them, an image into every frame; each is converted while it is in the cache."""
        for out, row in zip(memory.unbind(), self._rows(drawn), strict=True):
            if self._fold > 1:
                out.copy_(space_to_depth(normalise(row[None].float(), self._mean, self._std), self._fold)[0])
            else:
                out.copy_(row)  # an image to every frame
                out.sub_(self._means).div_(self._stds)  # `normalise`, in place

    def read(self, drawn: Drawn, memory: Shaped[Tensor, "B F *stored"]) -> None:
        """Read rows as the store has them, an image into the first frame alone."""
        if self._scaled:
            size, filled = math.prod(self._frame), memory.numpy()
            for frames, numbers, addresses in drawn.by_frames:
                covering = slice(None) if self._time_map == "frame" else latent_of_frames(self._time_map, frames)
                for number, packed in zip(numbers, self._reader.packed(frames, addresses), strict=True):
                    filled[number, :frames, :size] = packed[: -4 * self._frame[0]].reshape(-1, size)[covering]
                    filled[number, :frames, size:] = packed[-4 * self._frame[0] :]
            return
        rows = self._rows(drawn)
        if [frames for frames, _, _ in drawn.by_frames] == [memory.shape[1]]:
            torch.stack(rows, out=memory)  # a third less time than one by one
            return
        for out, row in zip(memory.unbind(), rows, strict=True):
            out[: len(row)].copy_(row)

    def finish(self, frames: Shaped[Tensor, "B F *stored"]) -> Float[Tensor, "B F *shape"]:
        """Frames as the batch has them, from frames as the store has them."""
        if self._scaled:
            values, scales = frames.split([math.prod(self._frame), 4 * self._frame[0]], dim=-1)
            scales = rearrange(scales.contiguous().view(torch.float32), "b f c -> b f c 1 1")
            frames = (values.view(torch.int8).unflatten(-1, self._frame) * scales).half()  # as `RowReader.rows`
        normalised = normalise(frames.float(), self._mean, self._std)
        return space_to_depth(normalised, self._fold) if self._fold > 1 else normalised

    def _rows(self, drawn: Drawn) -> list[Float[Tensor, "F *stored"]]:
        """The stored row of each clip.

        If the store has latent frames, each frame of a clip takes the one that covers it (docs/method.md 14, row 32).
        """
        found: dict[int, Tensor] = {}
        for frames, numbers, addresses in drawn.by_frames:
            rows = [torch.from_numpy(row) for row in self._reader.rows(frames, addresses)]
            if self._time_map != "frame":
                covering = latent_of_frames(self._time_map, frames)
                rows = [row[covering] for row in rows]
            found.update(zip(numbers.tolist(), rows, strict=True))
        return [found[number] for number in range(len(drawn))]


class Pixels:
    """Rows of the pixel store, JPEGs, with the methods of `Latents`. Batch and store have the same frames."""

    stored_type, dtype = torch.uint8, np.uint8

    def __init__(self, reader: PixelReader, spec: PixelSpec, addresses: Mapping[int, np.ndarray]) -> None:
        """`addresses`: PIXEL_ADDRESS of all rows, by frames; `Drawn.rows` counts them."""
        self._reader, self._addresses = reader, addresses
        self.stored = self.shape = spec.row_shape(1)[1:]

    def will_need(self, drawn: Drawn) -> None:
        """Ask the kernel to read the rows ahead."""
        for frames, numbers, _ in drawn.by_frames:
            self._reader.will_need(frames, self._addresses[frames][drawn.rows[numbers]])

    def fill(self, drawn: Drawn, memory: UInt8[Tensor, "B F H W 3"]) -> None:
        """Decode rows, an image into every frame."""
        self.read(drawn, memory)
        memory[drawn.of_frames(IMAGE)] = memory[drawn.of_frames(IMAGE), :1]

    def read(self, drawn: Drawn, memory: UInt8[Tensor, "B F H W 3"]) -> None:
        """Decode rows."""
        out = memory.numpy()
        for clip, (frames, row) in enumerate(zip(drawn.frames.tolist(), drawn.rows.tolist(), strict=True)):
            self._reader.read_into(frames, self._addresses[frames][row], out[clip, :frames])

    def finish(self, frames: UInt8[Tensor, "B F H W 3"]) -> UInt8[Tensor, "B F H W 3"]:
        """The frames themselves."""
        return frames


Kind = Latents | Pixels


@dataclass(eq=False)
class Buffer:
    """Flat memory of a ring, and the end of the last copy out of it."""

    memory: Tensor
    copied: torch.cuda.Event | None = None


class Ring:
    """A fixed number of buffers, allocated at once. No more than that number may be taken and not given back."""

    def __init__(self, buffers: int, numbers: int, dtype: torch.dtype, pinned: bool) -> None:
        self._free = collections.deque(
            Buffer(
                torch.empty(numbers, dtype=dtype, pin_memory=True)
                if pinned
                else torch.from_numpy(_lines(numbers * dtype.itemsize)).view(dtype)
            )
            for _ in range(buffers)
        )

    def take(self) -> Buffer:
        """The buffer given back last whose copy has ended (likeliest in a cache); if none has ended, the oldest."""
        for buffer in reversed(self._free):
            if buffer.copied is None or buffer.copied.query():
                self._free.remove(buffer)
                return buffer
        return self._free.popleft()

    def give(self, buffer: Buffer, copied: torch.cuda.Event | None) -> None:
        """Put a buffer back; `copied` is the end of the copy out of it, None if that has ended."""
        buffer.copied = copied
        self._free.append(buffer)


def _lines(size_bytes: int) -> UInt8[np.ndarray, " bytes"]:
    """Memory that begins a cache line, in the large pages that numpy asks for.

    numpy's own begins 16 bytes into a page. A batch for a step on the CPU then took a tenth more CPU time.
    """
    found = np.empty(size_bytes + LINE_BYTES, np.uint8)
    return found[-found.ctypes.data % LINE_BYTES :][:size_bytes]


class Leased:
    """Memory of one size that returns when nothing refers to it any more: a batch that is kept is never overwritten."""

    def __init__(self, numbers: int, dtype: type[np.float32] | type[np.uint8] = np.float32) -> None:
        self._numbers, self._dtype = numbers, dtype
        self._free: collections.deque[np.ndarray] = collections.deque()  # appended to by whichever thread lets go

    def take(self) -> Tensor:
        """Flat memory with arbitrary values; new memory if all is in use."""
        try:
            base = self._free.pop()  # the one used last is the likeliest to be in a cache
        except IndexError:
            base = _lines(self._numbers * np.dtype(self._dtype).itemsize).view(self._dtype)
        lease = base[:]
        weakref.finalize(lease, self._free.append, base)
        return torch.from_numpy(lease)


class Hosted:
    """Batches in host memory, which the step reads in place."""

    def __init__(self, kind: Kind, largest: int) -> None:
        """`largest`: frames of the largest batch."""
        self._kind, self.will_need, self.fill = kind, kind.will_need, kind.fill
        self._memory = Leased(largest * math.prod(kind.shape), kind.dtype)

    def memory(self, clips: int, frames: int) -> Tensor:
        """Memory for a batch; never waits."""
        shape = (clips, frames, *self._kind.shape)
        return self._memory.take()[: math.prod(shape)].view(shape)

    def deliver(self, drawn: Drawn, memory: Tensor) -> Tensor:
        """The memory itself: the batch is complete."""
        return memory


class Staged:
    """Batches of rows as they are stored, in a pinned ring, copied to a device and converted there."""

    def __init__(self, kind: Kind, largest: int, buffers: int, device: torch.device) -> None:
        """`largest`: frames of the largest batch; up to `buffers` batches are filled or copied at a time."""
        self._kind, self._device, self.will_need = kind, device, kind.will_need
        pinned = device.type == "cuda"
        self._ring = Ring(buffers, largest * math.prod(kind.stored), kind.stored_type, pinned)
        self._stream = torch.cuda.Stream(device) if pinned else None

    def memory(self, clips: int, frames: int) -> tuple[Buffer, Tensor]:
        """A buffer of the ring, and its memory in the shape of a batch; never waits."""
        shape, buffer = (clips, frames, *self._kind.stored), self._ring.take()
        return buffer, buffer.memory[: math.prod(shape)].view(shape)

    def fill(self, drawn: Drawn, memory: tuple[Buffer, Tensor]) -> None:
        """Read rows once the last copy out of the buffer has ended. Runs in a thread."""
        if memory[0].copied is not None:
            memory[0].copied.synchronize()
        self._kind.read(drawn, memory[1])

    def deliver(self, drawn: Drawn, memory: tuple[Buffer, Tensor]) -> Tensor:
        """Copy to the device, repeat images over time, convert; the buffer goes back into the ring.

        A GPU copies on a stream of its own, while the step before is computed.
        """
        buffer, host = memory
        copied = None
        if self._stream is None:
            frames = torch.empty_like(host, device=self._device).copy_(host)
        else:
            with torch.cuda.stream(self._stream):
                frames = torch.empty_like(host, device=self._device).copy_(host, non_blocking=True)
                copied = torch.cuda.Event()
                copied.record()
            computing = torch.cuda.current_stream(self._device)
            computing.wait_event(copied)
            frames.record_stream(computing)
        self._ring.give(buffer, copied)
        images = drawn.of_frames(IMAGE)
        if frames.shape[1] > IMAGE and len(images):
            indices = sent(images, self._device)
            frames[indices] = frames[indices, :1]
        return self._kind.finish(frames)


Rows = Hosted | Staged


def sent(numbers: np.ndarray, device: torch.device) -> Tensor:
    """A small array on a device, without waiting for the device's queued work.

    A copy from pageable memory would wait for the stream, so for the last step. torch keeps pinned memory until it is
    copied.
    """
    host = torch.from_numpy(numbers)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)
