"""Several devices on one machine: a process each, and every part's shards dealt out among them.

Holds the processes and what they tell their parent; what each does is the pipeline of one device. Nothing else is
shared: shards are written once each, whoever asks for one, so a process that dies costs what it had in hand and the
next call finishes it. Processes end with their parent, however that ends.
"""

import copy
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from functools import cache
from multiprocessing.queues import SimpleQueue as Queue
from multiprocessing.util import Finalize
from typing import NamedTuple

import torch

from nextvid.config.corpus import EncodingConfig
from nextvid.config.project import Project
from nextvid.encode.checks import Trips
from nextvid.encode.pipeline import Pipeline, Telling, pipeline
from nextvid.encode.shard import Batch
from nextvid.machine import die_with
from nextvid.video.sandbox import Spawn
from storage.errors import ConfigError, StoreError
from storage.latents import EncodingSpec, LatentPart, LatentStore

Encode = Callable[[LatentPart], None]
Told = Batch | str | None  # a batch, a note, or the end


class Share(NamedTuple):
    """What one process needs to know."""

    project: Project
    batch: str
    spec: EncodingSpec


def devices(encoding: EncodingConfig) -> list[str]:
    """The devices that encode here, one a process: `cuda:0`, ... or `cpu`, as encoding.device and .devices say.

    Raises ConfigError where there are not so many.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() and encoding.device != "cpu" else 0
    if encoding.device == "cuda" and not gpus:
        raise ConfigError("encoding.device is 'cuda', but torch sees no GPU here: use 'auto' or 'cpu'")
    if gpus and encoding.devices > gpus:
        raise ConfigError(f"encoding.devices is {encoding.devices}, but there are {gpus} GPUs here; 0 takes them all")
    return (
        [f"cuda:{number}" for number in range(encoding.devices or gpus)] if gpus else ["cpu"] * max(1, encoding.devices)
    )


@contextmanager
def encoding_on(names: Sequence[str], share: Share, trips: Trips, telling: Telling) -> Iterator[Encode]:
    """Give a function that encodes a part's open shards on these devices; `trips` counts all of them."""
    if len(names) == 1:
        with pipeline(*share, trips, telling, names[0]) as one:
            yield lambda part: one.encode(part, range(part.shards))
        return
    context = Spawn()
    free, told = context.SimpleQueue(), context.SimpleQueue()
    for name in names:
        free.put(name)
    listener = threading.Thread(target=_listen, args=(told, telling), name="telling")
    listener.start()
    try:
        with ProcessPoolExecutor(len(names), context, _open, (share, free, told, os.getpid(), len(names))) as pool:
            yield lambda part: _deal(pool, part, len(names), trips)
    finally:
        told.put(None)
        listener.join()


def _deal(pool: ProcessPoolExecutor, part: LatentPart, processes: int, trips: Trips) -> None:
    """Encode a part: every process its share. Raises what one of them raised, once all have stopped."""
    shards = [number for number in range(part.shards) if not part.committed(number)]
    hands = [shards[first::processes] for first in range(processes)]
    running = [pool.submit(_encode, part.frames, part.number, hand) for hand in hands if hand]
    errors = []
    for future in running:
        try:
            trips.join(future.result())
        except BrokenProcessPool as error:
            raise StoreError(
                f"a process that encoded {part.batch} died ({error}); what it committed stands: make 'latents' again"
            ) from error
        except StoreError as error:
            errors.append(error)
    if errors:
        raise errors[0]


# What follows runs in the processes.

_STACK = ExitStack()
_OPENED: list[tuple[Share, Callable[[], Pipeline]]] = []
_TRIPS = Trips()


def _open(share: Share, free: "Queue[str]", told: "Queue[Told]", parent: int, sharers: int) -> None:
    """Once a process: what the first share of a part needs. Loading waits for it, since errors are told from there."""
    die_with(parent)
    Finalize(None, _STACK.close, exitpriority=0)  # processes of multiprocessing end without atexit
    telling = Telling(told.put, told.put)
    device = free.get()
    mine = cache(lambda: _STACK.enter_context(pipeline(*share, _TRIPS, telling, device, sharers)))
    _OPENED.append((share, mine))


def _encode(frames: int, number: int, shards: list[int]) -> Trips:
    share, mine = _OPENED[0]
    _TRIPS.clear()
    mine().encode(LatentStore(share.project.root, share.spec).part(share.batch, frames, number), shards)
    return copy.deepcopy(_TRIPS)  # it is pickled later, by another thread


def _listen(told: "Queue[Told]", telling: Telling) -> None:
    while (what := told.get()) is not None:
        if isinstance(what, str):
            telling.note(what)
        else:
            telling.batch(what)
