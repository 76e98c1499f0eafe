"""Several devices on one machine: a process each, and the shards of every part dealt out among them.

Shards are written once each, so a process that dies costs what it was working on, and the next call finishes that.
Processes end with their parent, however it ends.
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from functools import cache
from multiprocessing.queues import SimpleQueue as Queue
from multiprocessing.util import Finalize
from typing import NamedTuple

import torch

from nextvid.config.corpus import MachineConfig
from nextvid.config.project import Project
from nextvid.encode.checks import Report
from nextvid.encode.pipeline import Advance, Pipeline, Tell, pipeline
from nextvid.machine import device_of, die_with
from nextvid.video.sandbox import Spawn
from storage.errors import ConfigError, StoreError
from storage.latents import EncodingSpec, LatentPart, LatentStore

Encode = Callable[[LatentPart], Report]


class Share(NamedTuple):
    """What a process needs to know of the work."""

    project: Project
    batch: str
    spec: EncodingSpec


def devices(machine: MachineConfig) -> list[str]:
    """The devices that encode here, one a process: `cuda:0`, ... or `cpu`, as execution.device and .devices say.

    Raises ConfigError where there are not so many.
    """
    if device_of(machine.device) == "cpu":
        return ["cpu"] * max(1, machine.devices)
    gpus = torch.cuda.device_count()
    if not gpus:
        raise ConfigError("execution.device is 'cuda', but torch sees no GPU here: use 'auto' or 'cpu'")
    if machine.devices > gpus:
        raise ConfigError(f"execution.devices is {machine.devices}, but there are {gpus} GPUs here; 0 takes them all")
    return [f"cuda:{number}" for number in range(machine.devices or gpus)]


@contextmanager
def encoding_on(names: Sequence[str], share: Share, tell: Tell) -> Iterator[Encode]:
    """Give a function that encodes a part's open shards on these devices."""
    if len(names) == 1:
        with pipeline(*share, names[0], 1, tell) as one:
            yield lambda part: one.encode(part, range(part.shards))
        return
    context = Spawn()
    told = context.SimpleQueue()

    def listen() -> None:
        for advance in iter(told.get, None):
            tell(advance)

    listener = threading.Thread(target=listen, name="telling")
    listener.start()
    try:
        with ExitStack() as stack:
            pools = [
                stack.enter_context(
                    ProcessPoolExecutor(1, context, _begin, (share, name, len(names), told, os.getpid()))
                )
                for name in names
            ]
            yield lambda part: _dealt(pools, part)
    finally:
        told.put(None)
        listener.join()


def _dealt(pools: Sequence[ProcessPoolExecutor], part: LatentPart) -> Report:
    """Encode a part: every process its share. Raises what one of them raised, once all have stopped."""
    shards = [number for number in range(part.shards) if not part.committed(number)]
    running: list[Future[Report]] = [
        pool.submit(_encode, part.frames, part.number, shards[first :: len(pools)])
        for first, pool in enumerate(pools[: len(shards)])
    ]
    report, errors = Report(), list[StoreError]()
    for future in running:
        try:
            report += future.result()
        except BrokenProcessPool as error:
            raise StoreError(
                f"a process that encoded {part.batch} died ({error}); what it committed is kept: make 'latents' again"
            ) from error
        except StoreError as error:
            errors.append(error)
    if errors:
        raise errors[0]
    return report


# What follows runs in the processes.

_STACK = ExitStack()
_BEGUN: list[tuple[Share, Callable[[], Pipeline]]] = []


def _begin(share: Share, device: str, sharers: int, told: "Queue[Advance | None]", parent: int) -> None:
    """Once a process. The pipeline is opened by the first share of a part, so that its errors are raised there."""
    die_with(parent)
    Finalize(None, _STACK.close, exitpriority=0)  # processes of multiprocessing end without atexit
    _BEGUN.append((share, cache(lambda: _STACK.enter_context(pipeline(*share, device, sharers, told.put)))))


def _encode(frames: int, number: int, shards: list[int]) -> Report:
    share, mine = _BEGUN[0]
    return mine().encode(LatentStore(share.project.root, share.spec).part(share.batch, frames, number), shards)
