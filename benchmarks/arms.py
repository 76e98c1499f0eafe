"""What benchmarks/loader.py puts in its tables: our read path and loader, other formats, and decoding on the fly.

Each arm is opened outside the clock. Within a group all of them end with the same thing: `read` with one clip after the
other copied into one array, in the order of our draws; `host` with float16 batches in this process's memory, as a
device takes them; `step` with float32 batches, normalised, as a step on the CPU takes them. Consumers keep a batch
until the next is there, as a step does. Worker processes start with the first pass and live on. It measures nothing.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.clips import BATCH, CHANNELS, SHAPE, Clips, InHostMemory, Store, random_clips, write_store
from benchmarks.decoding import decoded_batches, write_video
from benchmarks.sources import Read, Source
from storage.atomic import exists, staged_folder

READ, LOADER = "RowReader", "Loader, thread ring"
CONVERSION, DECORD = "no reading: conversion alone", "decord on the fly, V-JEPA 2 style"
DECODED = 64  # clips of the decoding arm a pass: 0.1 s of a core each
OUR_THREADS = (0, 2)  # 2 is what targets compare; 0: all in the consumer's, as others have it without workers


@dataclass(frozen=True)
class Arm:
    """One line of a table: `prepare` opens it outside the clock and gives the work of one pass over the clips."""

    group: str
    name: str
    folder: Path
    workers: int  # processes for others, threads for ours
    clips: int  # a pass
    prepare: Callable[[], Callable[[], None]]


def arms(
    clips: Callable[[], Clips], count: int, sources: Sequence[Source], base: Path, workers: Sequence[int]
) -> Iterator[Arm]:
    """Write each format that is not in `base` already, and give its arms; those of one file share it."""
    ours = _written("store", write_store, clips, base)
    steps = count // BATCH
    yield Arm("read", READ, ours, 0, count, partial(_reading_ours, ours, steps))
    for threads in OUR_THREADS:
        yield Arm("host", LOADER, ours, threads, count, partial(_loading, ours, steps, threads, True))
        yield Arm("step", LOADER, ours, threads, count, partial(_loading, ours, steps, threads, False))
    yield Arm("step", CONVERSION, base / "nothing", 0, count, partial(_converting, steps))
    for source in sources:
        name = source.write.__name__.removeprefix("_write_")
        folder = _written(name, source.write, clips, base)
        if source.opened is not None:
            reading = partial(_reading_other, source.opened, folder, ours, steps)
            yield Arm("read", source.name, folder, 0, count, reading)
        for number in workers:
            for group in ("host", "step"):
                batches = partial(_batches, source, folder, number, ours, steps, group == "step")
                yield Arm(group, source.name, folder, number, count, batches)


def decord_arms(base: Path, workers: Sequence[int]) -> Iterator[Arm]:
    """Decoding on the fly: pixels of as many frames, float32 and normalised, without what a frozen encoder costs."""
    folder = base / "video"
    if not exists(f"{folder}/video.mp4"):
        with staged_folder(str(folder)) as temporary:
            write_video(temporary)
    for number in workers:
        yield Arm("step", DECORD, folder, number, DECODED, partial(_decoding, folder / "video.mp4", number))


def _written(name: str, writes: Callable[[Clips, Path], None], clips: Callable[[], Clips], base: Path) -> Path:
    folder = base / name.removeprefix("write_")
    if not folder.exists():
        with staged_folder(str(folder)) as temporary:
            writes(clips(), temporary)
    return folder


def _reading_ours(folder: Path, steps: int) -> Callable[[], None]:
    store = Store(folder)
    return _reading(store.read_into, store.order(steps))


def _reading_other(opened: Callable[[Path], Read], folder: Path, ours: Path, steps: int) -> Callable[[], None]:
    read = opened(folder)
    return _reading(lambda clip, out: np.copyto(out, read(clip)), Store(ours).order(steps))


def _reading(read_into: Callable[[int, np.ndarray], None], order: list[int]) -> Callable[[], None]:
    out = np.empty(SHAPE, np.float16)

    def work() -> None:
        for clip in order:
            read_into(clip, out)

    return work


def _loading(folder: Path, steps: int, threads: int, host: bool) -> Callable[[], None]:
    """Work: the trainer's loader once through its steps, masks included."""
    store = Store(folder)
    loader = store.loader(steps, InHostMemory if host else None)

    def work() -> None:
        seen = 0
        for batch in loader.batches(0, threads):
            assert batch.latents is not None
            seen += len(batch.latents)
        assert seen == steps * BATCH, f"{seen} clips"

    return work


def _batches(source: Source, folder: Path, workers: int, ours: Path, steps: int, converted: bool) -> Callable[[], None]:
    """Work: batches of another format, as many as ours."""
    order = Store(ours).order(steps)
    batches, consume = source.batches(folder, order, workers), _Consumer(converted)
    return lambda: consume(batches, len(order))


def _converting(steps: int) -> Callable[[], None]:
    """Work: what others do after reading, on one batch in memory."""
    batch, consume = torch.from_numpy(random_clips(BATCH)), _Consumer(converted=True)
    return lambda: consume((batch for _ in range(steps)), steps * BATCH)


def _decoding(path: Path, workers: int) -> Callable[[], None]:
    def work() -> None:
        assert sum(len(batch) for batch in decoded_batches(path, DECODED, workers)) == DECODED

    return work


class _Consumer:
    """What a trainer does with others' batches before the model sees them: keep one until the next is there.

    `converted`: to float32 and normalised, in memory that is used again, as ours is.
    """

    def __init__(self, converted: bool) -> None:
        self._ready = torch.empty(BATCH, *SHAPE) if converted else None
        self._mean, self._std = torch.zeros(CHANNELS, 1, 1), torch.ones(CHANNELS, 1, 1)

    def __call__(self, batches: Iterable[torch.Tensor], wanted: int) -> None:
        seen = 0
        for batch in batches:
            assert batch.dtype == torch.float16, f"{batch.dtype}"
            kept = batch if self._ready is None else self._converted(self._ready[: len(batch)], batch)
            seen += len(kept)
        assert seen == wanted, f"{seen} clips of {wanted}"

    def _converted(self, out: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        return out.copy_(batch).sub_(self._mean).div_(self._std)  # `normalise`, in place
