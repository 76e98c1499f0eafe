"""Ranges of objects, asked for ahead of their use: how single rows of a store are read where no copy of it is kept.

A group of ranges is announced and asked for at once, one request each; a reader of one waits for its answer, and asks
again, alone and a bounded number of times, where none came or its bytes are wrong. What is announced and
never read is dropped in the end. Threads may share one.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from storage import remote
from storage.digest import crc32c
from storage.errors import DamagedError
from storage.part import OTHER_BYTES

AT_ONCE = 8  # our choice: groups asked for at a time; s3fs sends 10 requests each
AHEAD_BYTES = 1 << 28  # our choice: announced and not read; 4 batches of 256 rows of 262 KB

Range = tuple[str, int, int]  # path, start and size in bytes


class Ranges:
    """Reads ranges; `announce` only saves time."""

    def __init__(self) -> None:
        self._ahead: OrderedDict[Range, Future[bytes | None]] = OrderedDict()
        self._ahead_bytes = 0
        self._guard = threading.Lock()
        self._pool = ThreadPoolExecutor(AT_ONCE, "ranges")

    def announce(self, ranges: Iterable[Range]) -> None:
        """Ask for these now; waits for nothing."""
        with self._guard:
            new = [place for place in dict.fromkeys(ranges) if place not in self._ahead]
            if not new:
                return
            asked = self._pool.submit(_ask, new)
            for number, place in enumerate(new):
                self._ahead[place] = _item(asked, number)
                self._ahead_bytes += place[2]
            while self._ahead_bytes > AHEAD_BYTES and len(self._ahead) > len(new):
                dropped, _ = self._ahead.popitem(last=False)
                self._ahead_bytes -= dropped[2]

    def read(self, wanted: Range, crc: int, damaged: Callable[[str], DamagedError]) -> bytes:
        """Bytes of a range with this crc32c.

        Raises what `damaged` makes of the fault: there is no object, or every answer is short or holds other bytes.
        """

        def fault(data: bytes) -> str | None:
            return None if crc32c(data) == crc else OTHER_BYTES

        with self._guard:
            asked = self._ahead.pop(wanted, None)
            self._ahead_bytes -= 0 if asked is None else wanted[2]
        data = None if asked is None else asked.result()
        if data is not None and fault(data) is None:
            return data
        path, start, size_bytes = wanted
        try:
            return remote.read_exactly(path, size_bytes, start=start, fault=fault)
        except FileNotFoundError as error:
            raise damaged("there is no such file") from error
        except DamagedError as error:
            raise damaged(str(error).removeprefix(f"{path}: ")) from error

    def close(self) -> None:
        """Drop what was announced, wait for what is under way."""
        with self._guard:
            self._ahead.clear()
            self._ahead_bytes = 0
        self._pool.shutdown(wait=True, cancel_futures=True)


def _ask(places: Sequence[Range]) -> list[bytes | None]:
    """All at once; None for what came back short or not at all, which is asked for again."""
    found = remote.read_ranges(
        [path for path, _, _ in places],
        [start for _, start, _ in places],
        [start + size_bytes for _, start, size_bytes in places],
    )
    pairs = zip(found, places, strict=True)
    return [data if isinstance(data, bytes) and len(data) == place[2] else None for data, place in pairs]


def _item(asked: Future[list[bytes | None]], number: int) -> Future[bytes | None]:
    """One of the answers to a group of questions."""
    item: Future[bytes | None] = Future()

    def done(group: Future[list[bytes | None]]) -> None:
        failed = group.cancelled() or group.exception() is not None
        item.set_result(None if failed else group.result()[number])  # asked again alone, which explains what fails

    asked.add_done_callback(done)
    return item
