"""Writers of a small store that run in a process of their own, to be killed (tests/forked.py calls them by name)."""

import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from storage.root import DataRoot
from storage.seal import seal_part
from tests.storage.stores import BATCH, FRAMES, new_store, write

SYNC_S = 0.005  # what a disk takes to force bytes down; the test machine's may take none
PUBLISHING = ("open", "fsync", "link")  # what atomic.py asks of the system on the way to a name
NAMING = ("link", "replace", "unlink")  # what changes what others see


def write_all(url: str, said: str) -> None:
    """Write every shard of the part that is not committed; after each, its number is a line of the file `said`."""
    part = new_store(DataRoot.open(url)).part(BATCH, FRAMES, 0)
    with Path(said).open("a") as file:
        for shard in range(part.shards):
            if not part.committed(shard):
                write(part, shard)
                print(shard, file=file, flush=True)


def write_slowly(url: str, said: str) -> None:
    """As `write_all` on a disk that syncs slowly: about half of the time a name is on its way."""
    real = os.fsync

    def fsync(file: int) -> None:
        time.sleep(SYNC_S)
        real(file)

    os.fsync = fsync  # type: ignore[assignment]
    write_all(url, said)


def write_until(url: str, said: str, nth: int) -> None:
    """As `write_all`, dead at the n-th call that publishes; with 0 their number is the last line that it says."""
    calls = _die_at(nth, PUBLISHING)
    write_all(url, said)
    with Path(said).open("a") as file:
        print(calls[0], file=file)


def _die_at(nth: int, names: Sequence[str]) -> list[int]:
    """SIGKILL at the n-th of these calls of the system; how many there were so far."""
    calls = [0]

    def counted(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*args: Any, **named: Any) -> Any:
            calls[0] += 1
            if calls[0] == nth:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **named)

        return call

    for name in names:
        setattr(os, name, counted(name))
    return calls


def seal_and_sweep_until(url: str, nth: int) -> None:
    """Seal the part, free its first shard, seal it again; dead at the n-th call that changes a name."""
    part = new_store(DataRoot.open(url)).part(BATCH, FRAMES, 0)
    _die_at(nth, NAMING)
    seal_part(part)
    part.discard(0)
    seal_part(part)


def repair_until(url: str, said: str, nth: int) -> None:
    """Write the shards that have no commit and seal the part; dead at the n-th call as above."""
    _die_at(nth, NAMING)
    write_all(url, said)
    seal_part(new_store(DataRoot.open(url)).part(BATCH, FRAMES, 0))
