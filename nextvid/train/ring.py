"""Host memory of batches, used again and again, since fresh pages cost more than the copy into them.

Two kinds, one for each way out. A `Ring` has a fixed number of places, pinned where a GPU copies from them: a place is
written again only after the event behind its last copy. `Leased` memory goes to the consumer itself, who reads it in
place (CPU): it comes back when nothing refers to it any more, so a batch that is kept is never overwritten. Neither
knows what is stored. What is small goes to a device by `sent`.
"""

import collections
import weakref
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class Copied(Protocol):
    """The end of a copy, as torch.cuda.Event has it."""

    def synchronize(self) -> None:
        """Wait until it is over."""

    def query(self) -> bool:
        """Whether it is over."""


@dataclass(eq=False)
class Place:
    """One piece of a ring, flat, and the end of the last copy out of it."""

    memory: Tensor
    copied: Copied | None = None

    def wait(self) -> None:
        """Until it may be written."""
        if self.copied is not None:
            self.copied.synchronize()


class Ring:
    """A fixed number of places, allocated when the first is taken. Who takes one gives it back before another round."""

    def __init__(self, places: int, numbers: int, dtype: torch.dtype, pinned: bool) -> None:
        self._free = collections.deque(
            Place(torch.empty(numbers, dtype=dtype, pin_memory=pinned)) for _ in range(places)
        )

    def take(self) -> Place:
        """The place given back last whose copy is over, as it is likeliest to be in a cache; else the oldest."""
        for place in reversed(self._free):
            if place.copied is None or place.copied.query():
                self._free.remove(place)
                return place
        return self._free.popleft()

    def give(self, place: Place, copied: Copied | None) -> None:
        """Back into the ring; `copied` marks the end of the copy out of it, None where it is over."""
        place.copied = copied
        self._free.append(place)


def sent(numbers: np.ndarray, device: torch.device) -> Tensor:
    """A small array on a device, without waiting for what the device has still to do.

    A copy from ordinary memory waits for the stream, last step included. torch keeps pinned memory until it is copied.
    """
    host = torch.from_numpy(numbers)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


class Leased:
    """Memory of one size that returns by itself."""

    def __init__(self, numbers: int, dtype: "type[np.float32] | type[np.uint8]" = np.float32) -> None:
        self._numbers, self._dtype = numbers, dtype
        self._free: collections.deque[np.ndarray] = collections.deque()  # appended to by whichever thread lets go

    def take(self) -> Tensor:
        """Flat memory with the values of its last use, new where all is in use."""
        try:
            base = self._free.pop()  # the one used last is the likeliest to be in a cache
        except IndexError:
            base = np.empty(self._numbers, self._dtype)
        lease = base[:]
        weakref.finalize(lease, self._free.append, base)
        return torch.from_numpy(lease)
