"""The maker of `latents`: rows that a batch's store lacks are decoded, encoded, checked and committed, shard by shard.

plan.py decides which rows, pipeline.py encodes the shards of a part on one device, checks.py reports. Several devices
have a process each, and the shards of every part are dealt out among them; since each shard is written once, a process
that dies costs what it was working on. Killed anywhere, the next call finishes the part that was begun, row for row
the same.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from functools import cache
from multiprocessing.queues import SimpleQueue as Queue
from multiprocessing.util import Finalize
from typing import NamedTuple

from nextvid.config.project import Project
from nextvid.encode.cap import settle_cap
from nextvid.encode.checks import Report, publish_outcome, publish_refused
from nextvid.encode.pipeline import Advance, Pipeline, Tell, pipeline, shares
from nextvid.encode.pixels import PixelWriter
from nextvid.encode.plan import BatchPlan, accepted_spec, open_parts, pixel_spec, plan_encode
from nextvid.encode.preview import preview_png
from nextvid.encode.shard import RefusedShardError
from nextvid.machine import device_of, die_with, leased_devices
from nextvid.making.outcome import Outcome
from nextvid.making.progress import OnProgress, Progress, noting, silent
from nextvid.video.sandbox import Spawn
from storage.atomic import publish_bytes
from storage.errors import StoreError
from storage.limits import KILLED
from storage.part import LatentPart
from storage.spec import EncodingSpec
from storage.store import LatentStore
from storage.tables import require_checks

Encode = Callable[[LatentPart], Report]


class Share(NamedTuple):
    """What a process needs to know of the work."""

    project: Project
    batch: str
    spec: EncodingSpec


def make_latents(project: Project, batch: str, on_progress: OnProgress = silent) -> Outcome:
    """Encode what a batch lacks in the accepted spec, with its pixels if asked for; publish its checks and a picture.

    Raises UpstreamError without checked clips, RefusedShardError where a shard is refused: then nothing of it is
    committed, and the published checks name it.
    """
    began = time.perf_counter()
    require_checks(project.root.checks("clips", batch), "clips")
    store = LatentStore(project.root, accepted_spec(project))
    store.create()
    settle_cap(project, store, batch)
    plan = plan_encode(project, batch, store.spec)
    machine, name, report = project.corpus.execution, f"latents {batch}", Report()
    if plan.rows.height or any(store.unfinished(batch, frames) for frames in store.frames_of(batch)):
        try:
            with (
                leased_devices(machine.devices, machine.device, name, noting(on_progress, name)) as devices,
                encoding_on(
                    devices, Share(project, batch, plan.spec), _paced(plan, len(devices), on_progress)
                ) as encode,
            ):
                for part in open_parts(project, batch, store):
                    report += encode(part)
        except RefusedShardError as error:
            publish_refused(project, plan, error)
            raise
        if report.pictures:
            publish_bytes(project.root.preview("latents", batch), preview_png(report.pictures))
    threads, _ = shares(device_of(machine.device), 1, machine.cores)
    with PixelWriter(project, batch, pixel_spec(project, plan.spec), threads) as pixels:
        report += Report(pixels=pixels.rest(report.failed))
        store.seal(batch)
        return publish_outcome(project, plan, report, pixels.plan(), time.perf_counter() - began)


def _paced(plan: BatchPlan[EncodingSpec], count: int, on_progress: OnProgress) -> Tell:
    """Turn what the pipelines of `count` devices report into progress."""
    began = time.perf_counter()
    done, busy_s = 0, 0.0

    def tell(advance: Advance) -> None:
        nonlocal done, busy_s
        done, busy_s = done + advance.rows, busy_s + advance.encode_s
        seconds = time.perf_counter() - began
        on_progress(
            Progress(f"latents {plan.batch}", done, max(done, plan.rows.height), seconds, busy_s, count, advance.note)
        )

    return tell


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
        pool.submit(_encode_shards, part.frames, part.number, shards[first :: len(pools)])
        for first, pool in enumerate(pools[: len(shards)])
    ]
    report, errors = Report(), list[StoreError]()
    for future in running:
        try:
            report += future.result()
        except BrokenProcessPool as error:
            raise StoreError(
                f"a process that encoded {part.batch} died; what it committed is kept: make 'latents' again; {KILLED}"
            ) from error
        except StoreError as error:
            errors.append(error)
    if errors:
        raise errors[0]
    return report


# What follows runs in the processes.

_STACK = ExitStack()
_BEGUN: list[tuple[Share, Callable[[], Pipeline]]] = []  # one


def _begin(share: Share, device: str, sharers: int, told: "Queue[Advance | None]", parent: int) -> None:
    """Once a process. The pipeline is opened by the first share of a part, so that its errors are raised there."""
    die_with(parent)
    Finalize(None, _STACK.close, exitpriority=0)  # processes of multiprocessing end without atexit
    _BEGUN.append((share, cache(lambda: _STACK.enter_context(pipeline(*share, device, sharers, told.put)))))


def _encode_shards(frames: int, number: int, shards: list[int]) -> Report:
    share, mine = _BEGUN[0]
    return mine().encode(LatentStore(share.project.root, share.spec).part(share.batch, frames, number), shards)
