"""Host memory of batches that is used again and again, since fresh pages cost more than the copy into them.

`Ring`, for batches that a GPU copies: a fixed number of buffers, pinned, each written again only after the copy out of
it has ended. `Leased`, for batches that the step reads in place on a CPU: memory returns when nothing refers to it any
more, so a batch that is kept is never overwritten. `sent` copies small arrays to a device.
"""

import collections
import weakref
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class Copied(Protocol):
    """The end of a copy: what a torch.cuda.Event can tell."""

    def synchronize(self) -> None:
        """Wait until the copy has ended."""

    def query(self) -> bool:
        """Whether the copy has ended."""


@dataclass(eq=False)
class Buffer:
    """Flat memory of a ring, and the end of the last copy out of it."""

    memory: Tensor
    copied: Copied | None = None

    def wait(self) -> None:
        """Wait until it may be written."""
        if self.copied is not None:
            self.copied.synchronize()


class Ring:
    """A fixed number of buffers, allocated at once. No more than that number may be taken and not given back."""

    def __init__(self, buffers: int, numbers: int, dtype: torch.dtype, pinned: bool) -> None:
        self._free = collections.deque(
            Buffer(torch.empty(numbers, dtype=dtype, pin_memory=pinned)) for _ in range(buffers)
        )

    def take(self) -> Buffer:
        """The buffer given back last whose copy has ended (likeliest in a cache); if none has ended, the oldest."""
        for buffer in reversed(self._free):
            if buffer.copied is None or buffer.copied.query():
                self._free.remove(buffer)
                return buffer
        return self._free.popleft()

    def give(self, buffer: Buffer, copied: Copied | None) -> None:
        """Put a buffer back; `copied` is the end of the copy out of it, None if that has ended."""
        buffer.copied = copied
        self._free.append(buffer)


def sent(numbers: np.ndarray, device: torch.device) -> Tensor:
    """A small array on a device, without waiting for the device's queued work.

    A copy from pageable memory would wait for the stream, so for the last step. torch keeps pinned memory until it is
    copied.
    """
    host = torch.from_numpy(numbers)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


class Leased:
    """Memory of one size that returns when its user drops it."""

    def __init__(self, numbers: int, dtype: "type[np.float32] | type[np.uint8]" = np.float32) -> None:
        self._numbers, self._dtype = numbers, dtype
        self._free: collections.deque[np.ndarray] = collections.deque()  # appended to by whichever thread lets go

    def take(self) -> Tensor:
        """Flat memory with arbitrary values; new memory if all is in use."""
        try:
            base = self._free.pop()  # the one used last is the likeliest to be in a cache
        except IndexError:
            base = np.empty(self._numbers, self._dtype)
        lease = base[:]
        weakref.finalize(lease, self._free.append, base)
        return torch.from_numpy(lease)
