"""Our read path and loader against other ways to read the same clips: `python -m benchmarks.loader [--quick]`.

`read` is random access alone: clips in the order of the draws, each copied into one reused array; targets in design 11.
`loader` is what a training step gets: float32 batches, normalised; on a CPU that conversion is a good part of it. Ours
fills a ring of buffers in `max(1, workers)` threads and draws the mask ids as well; the others allocate each batch and
draw none. Warm means a pass before the clock; cold, pages dropped from the cache of this system. Ours checks a row's
crc32c on its first touch, which only cold rows pay. Workers are processes for others, threads for ours: with 0 workers
others have one thread and ours has two.
"""

import gc
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro

from benchmarks.clips import BATCH, CHANNELS, CLIP_BYTES, SHAPE, Clips, Store, random_clips, write_store
from benchmarks.measure import Took, evict, machine, median_ratio, show, timed, write
from benchmarks.peers import found_peers
from benchmarks.sources import DATALOADER, MEMMAP, OWN, ZARR, Read, Source
from nextvid.model.tokens import normalise

QUICK_CLIPS, CLIPS = 256, 4000  # 4000: research store; 256 is 67 MB a format, one shard
QUICK_TURNS, TURNS = 2, 5
STILL_CACHED = 0.05  # share of pages above which a cold turn is not called one; our choice
READ_PASSES = 16  # of the two arms that the target of random reads compares: one pass over 256 clips takes 3 ms
WARM_PASSES = 4  # over the clips in a warm turn of `loader`: the ring's first use of its memory is start-up, not rate
READ, LOADER = "RowReader", "Loader, thread ring"
CONVERSION = "no reading: conversion alone"
RANDOM_READ_TARGET, LOADER_TARGET, COLD_TARGET = 0.9, 2.0, 1.3  # design 11
WARM, COLD = "warm", "cold"


@dataclass(frozen=True)
class Arm:
    """One line of the table: `prepare` opens it outside the clock and gives the work."""

    group: str
    name: str
    folder: Path
    workers: int
    prepare: Callable[[int], Callable[[], None]]  # of the number of passes over the clips


@dataclass
class Line:
    """An arm under one state of the page cache, with a measurement a turn."""

    arm: Arm
    state: str
    took: list[Took] = field(default_factory=list)
    stayed: float = 0.0  # largest share of its pages that a cold turn found in the cache


def main(
    quick: bool = False,
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
    clips: int | None = None,
    workers: tuple[int, ...] | None = None,
    folder: Path | None = None,
) -> None:
    """Measure, print two tables, and with --json write what README.md documents.

    Args:
        quick: 256 clips, 2 turns and no worker processes, in under a minute.
        json: file for the results.
        clips: how many, instead of 4000 (256 with --quick); at least 32.
        workers: numbers of workers to try, instead of 0 and 2 (0 with --quick).
        folder: where to write the clips, 262 KB each and format; default: a temporary folder, removed at the end.
    """
    torch.set_num_threads(1)  # both sides alike: arithmetic is not what is measured
    count = max(BATCH, clips or (QUICK_CLIPS if quick else CLIPS)) // BATCH * BATCH
    sources, absent = found_peers()
    with _folder(folder) as base:
        data = random_clips(count)
        lines = [
            Line(arm, state)
            for arm in _arms(data, (*OWN, *sources), base, workers or ((0,) if quick else (0, 2)))
            for state in (WARM, COLD)
        ]
        lines.sort(key=lambda line: (line.arm.group != "read", line.state, line.arm.name not in (READ, MEMMAP)))
        del data
        for turn in range(QUICK_TURNS if quick else TURNS):
            for line in lines if turn % 2 == 0 else reversed(lines):  # no arm always follows the same one
                line.took.append(_measure(line))
    found = _results(lines, count, quick, absent)
    _print(found)
    write(json, found)


@contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="nextvid-loader-", dir=given) as name:
        yield Path(name)


def _arms(clips: Clips, sources: tuple[Source, ...], base: Path, workers: tuple[int, ...]) -> Iterator[Arm]:
    """Write each format and give its arms; the two that read our store share one."""
    steps = len(clips) // BATCH  # not the clips: the arms outlive them
    ours = base / "store"
    ours.mkdir()
    write_store(clips, ours)

    yield Arm("read", READ, ours, 0, partial(_reading_ours, ours, steps))
    for count in workers:
        yield Arm("loader", LOADER, ours, count, partial(_loading, ours, steps, count))
        yield Arm("loader", CONVERSION, base / "none", count, partial(_converting, steps))
    for number, source in enumerate(sources):
        folder = ours
        if source.write is not write_store:
            folder = base / str(number)
            folder.mkdir()
            source.write(clips, folder)
        if source.opened is not None:
            yield Arm("read", source.name, folder, 0, partial(_reading_other, source.opened, folder, ours, steps))
        for count in workers:
            yield Arm("loader", source.name, folder, count, partial(_batches, source, folder, count, ours, steps))


def _reading_ours(folder: Path, steps: int, passes: int) -> Callable[[], None]:
    store = Store(folder)
    return _reading(store.read_into, store.order(steps * passes))


def _reading_other(
    opened: Callable[[Path], Read], folder: Path, ours: Path, steps: int, passes: int
) -> Callable[[], None]:
    """Work: another format's clips in the order of our draws, each copied as ours are."""
    read = opened(folder)
    return _reading(lambda clip, out: np.copyto(out, read(clip)), Store(ours).order(steps * passes))


def _reading(read_into: Callable[[int, np.ndarray], None], order: list[int]) -> Callable[[], None]:
    """Work: every clip in the order of the draws, into one array."""
    out = np.empty(SHAPE, np.float16)

    def work() -> None:
        for clip in order:
            read_into(clip, out)

    return work


def _loading(folder: Path, steps: int, workers: int, passes: int) -> Callable[[], None]:
    """Work: the trainer's loader, once through its steps."""
    loader = Store(folder).loader(steps * passes)

    def work() -> None:
        seen = 0
        for batch in loader.batches(0, threads=max(1, workers)):
            seen += len(batch.draws)
        assert seen == steps * passes * BATCH, f"{seen} clips"

    return work


def _batches(source: Source, folder: Path, workers: int, ours: Path, steps: int, passes: int) -> Callable[[], None]:
    """Work: batches of another format, as many as ours."""
    order = Store(ours).order(steps * passes)
    return lambda: _consume(source.batches(folder, order, workers), len(order))


def _converting(steps: int, passes: int) -> Callable[[], None]:
    """Work: what all arms do after reading, on one batch that lies in memory: no loader on a CPU is faster."""
    batch = torch.from_numpy(random_clips(BATCH))
    return lambda: _consume((batch for _ in range(steps * passes)), steps * passes * BATCH)


def _consume(batches: Iterator[torch.Tensor], wanted: int) -> None:
    """What the trainer does with a batch before the model sees it."""
    mean, std = torch.zeros(CHANNELS), torch.ones(CHANNELS)
    seen = 0
    for batch in batches:
        assert batch.dtype == torch.float16, f"{batch.dtype}"
        latents = normalise(batch.float(), mean, std)  # kept until the next one is there, as a step does
        seen += len(latents)
    assert seen == wanted, f"{seen} clips of {wanted}"


def _passes(line: Line) -> int:
    if line.state == COLD:
        return 1
    if line.arm.group == "loader":
        return WARM_PASSES
    return READ_PASSES if line.arm.name in (READ, MEMMAP) else 1


def _measure(line: Line) -> Took:
    work = line.arm.prepare(_passes(line))
    if line.state == WARM:
        work()
    else:
        gc.collect()  # memory maps of the arm before would hold pages
        line.stayed = max(line.stayed, evict(line.arm.folder))
    return timed(work)


def _results(lines: list[Line], clips: int, quick: bool, absent: list[dict[str, str]]) -> dict[str, Any]:
    ours = {
        (line.arm.group, line.state, line.arm.workers): _rates(line, clips * _passes(line))
        for line in lines
        if line.arm.name in (READ, LOADER)
    }
    rows = []
    for line in lines:
        rates = _rates(line, clips * _passes(line))
        mine = ours[line.arm.group, line.state, line.arm.workers]
        rows.append(
            {
                "group": line.arm.group,
                "state": line.state,
                "workers": line.arm.workers,
                "name": line.arm.name,
                "clips_per_s": statistics.median(rates),
                "cpu_s_per_1000": sorted(took.cpu_s for took in line.took)[len(rates) // 2]
                / (clips * _passes(line))
                * 1000,
                "ours_over_this": median_ratio(mine, rates),
                "still_cached": line.stayed,
            }
        )
    return {
        "benchmark": "loader",
        "quick": quick,
        "machine": machine() | {"torch": torch.__version__},
        "clips": clips,
        "clip_bytes": CLIP_BYTES,
        "batch": BATCH,
        "rows": rows,
        "absent": absent,
        "targets": _targets(rows),
    }


def _rates(line: Line, clips: int) -> list[float]:
    return [clips / took.wall_s for took in line.took]


def _targets(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Design 11: what was reached, in the least favourable number of workers."""
    memmap = [row for row in rows if (row["group"], row["state"], row["name"]) == ("read", WARM, MEMMAP)]
    found = {"random_read_over_memmap": (memmap[0]["ours_over_this"], RANDOM_READ_TARGET)}
    not_others = (LOADER, CONVERSION, DATALOADER, ZARR)  # the last two read our store
    for state, wanted in ((WARM, LOADER_TARGET), (COLD, COLD_TARGET)):
        peers = [
            row["ours_over_this"]
            for row in rows
            if row["group"] == "loader" and row["state"] == state and row["name"] not in not_others
        ]
        found[f"loader_{state}_over_best_other"] = (min(peers), wanted)
    return {
        name: {"measured": measured, "at_least": wanted, "met": measured >= wanted}
        for name, (measured, wanted) in found.items()
    }


def _print(found: dict[str, Any]) -> None:
    keys = ("clips_per_s", "cpu_s_per_1000", "ours_over_this")
    columns = ("", "cache", "workers", "clips/s", "CPU s a 1000", "ours / this")
    for group in ("read", "loader"):
        rows = sorted((row for row in found["rows"] if row["group"] == group), key=lambda row: row["ours_over_this"])
        lines = [[row["name"], row["state"], row["workers"], *(row[key] for key in keys)] for row in rows]
        for line, row in zip(lines, rows, strict=True):
            line[1] = row["state"] if row["still_cached"] <= STILL_CACHED else f"{row['still_cached']:.0%} cached"
        show(f"{group}, {found['clips']} clips of {CLIP_BYTES} bytes", columns, lines)
    for peer in found["absent"]:
        print(f"absent: {peer['name']} ({peer['reason']})")
    for name, target in found["targets"].items():
        verdict = "met" if target["met"] else "MISSED"
        print(f"{name}: {target['measured']:.2f}, wanted >= {target['at_least']}: {verdict}")


if __name__ == "__main__":
    tyro.cli(main)
