"""Our read path and loader against other ways to read the same clips: `python -m benchmarks.loader [--quick]`.

arms.py lists what is compared. The targets are our aims: our 2 threads against the best of the others with any number
of workers, and with 2 (`..._of_2_workers`). Warm means a pass before the clock; cold, pages dropped from the
cache of this system, and worker processes that start in the first pass. Ours draws the masks too, and checks a row's
crc32c on its first touch, which only cold rows pay.
A run over part of the formats (--only) has ours in it, and a folder that is given keeps what was written, so that all
can be measured in pieces.
"""

import gc
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from benchmarks.arms import CONVERSION, DECORD, LOADER, OUR_THREADS, READ, Arm, arms, decord_arms
from benchmarks.clips import BATCH, CLIP_BYTES, random_clips
from benchmarks.measure import Took, evict, machine, median_ratio, show, shown, timed, write
from benchmarks.peers import found_peers
from benchmarks.sources import DATALOADER, MEMMAP, NPY, OWN, VIEW, ZARR

QUICK_CLIPS, CLIPS = 256, 4000  # 4000 is 1 GB a format; 256 is 67 MB a format, one shard
QUICK_TURNS, TURNS = 2, 3
STILL_CACHED = 0.05  # share of pages above which a cold turn is not called one; our choice
LIMIT_S = 900.0  # our aim: no turn is begun that would end later, so that a slow disk has fewer turns
QUICK_PASSES, PASSES = 4, 2  # over the clips in a warm turn: 4000 clips warm are 0.05 s of ours
EVICTIONS = 3  # tries: what a process of the arm before still maps cannot be dropped until it ends
WARM, COLD = "warm", "cold"
RANDOM_READ_TARGET, DECORD_TARGET = 0.9, 500.0  # our aims: over np.memmap, and CPU time of decord
LOADER_TARGETS = {WARM: 2.0, COLD: 1.3}  # our aims, over the best of the others
WHOLE_FILES = (MEMMAP, VIEW)  # one array over one file, which does nothing but copy
WHOLE_FILE_TARGET = 1.0  # our aim: to keep up with one file kept open
NOT_IN_TARGET = (LOADER, CONVERSION, DECORD, DATALOADER, ZARR, NPY, *WHOLE_FILES)  # ours, or no training format


@dataclass
class Line:
    """An arm under one state of the page cache, with a measurement a turn."""

    arm: Arm
    state: str
    passes: int
    took: list[Took] = field(default_factory=list)
    stayed: float = 0.0  # largest share of its pages that a cold turn found in the cache

    @property
    def rates(self) -> list[float]:
        """Clips a second, a turn each."""
        return [self.arm.clips * self.passes / took.wall_s for took in self.took]

    @property
    def cpu_s(self) -> float:
        """CPU seconds a clip, median over turns."""
        return statistics.median(took.cpu_s for took in self.took) / (self.arm.clips * self.passes)


def main(
    quick: bool = False,
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
    clips: int | None = None,
    workers: tuple[int, ...] | None = None,
    turns: int | None = None,
    folder: Path | None = None,
    only: tuple[str, ...] = (),
) -> None:
    """Measure, print tables, and with --json write what README.md documents.

    Args:
        quick: 256 clips, 2 turns and no worker processes for others, in under a minute.
        json: file for the results.
        clips: how many, instead of 4000 (256 with --quick); at least 32.
        workers: numbers of worker processes of others to try, instead of 0 and 2 (0 with --quick).
        turns: how many, instead of 3 (2 with --quick), which a slow disk may have no time for.
        folder: keeps the clips, 262 KB each and format, and finds them again; default: temporary, removed at the end.
        only: formats to measure beside ours, by parts of their names; default: all.
    """
    began = time.monotonic()
    torch.set_num_threads(1)  # both sides alike: arithmetic is not what is measured
    count = max(BATCH, clips or (QUICK_CLIPS if quick else CLIPS)) // BATCH * BATCH
    numbers = workers or ((0,) if quick else (0, 2))
    found, absent = found_peers()
    sources = [source for source in (*OWN, *found) if _wanted(source.name, only)]
    with _folder(folder, count) as base:
        made = cache(lambda: random_clips(count))
        all_arms = list(arms(made, count, sources, base, numbers))
        all_arms += decord_arms(base, numbers) if _wanted(DECORD, only) else []
        made.cache_clear()
        lines = [line for arm in all_arms for line in _lines(arm, quick)]
        lines.sort(key=lambda line: (line.arm.group, line.state))
        for turn in range(turns or (QUICK_TURNS if quick else TURNS)):
            turn_began = time.monotonic()
            for line in shown(lines if turn % 2 == 0 else lines[::-1], f"loader, turn {turn + 1}"):
                line.took.append(_measure(line))  # turn by turn: no arm always follows the same one
            now = time.monotonic()
            if turns is None and now + (now - turn_began) > began + LIMIT_S:
                break
    results = _results(lines, count, quick, absent)
    _print(results)
    write(json, results)


def _wanted(name: str, only: tuple[str, ...]) -> bool:
    return not only or any(part.lower() in name.lower() for part in only)


@contextmanager
def _folder(given: Path | None, clips: int) -> Iterator[Path]:
    if given is not None:
        kept = given / f"{clips}_clips"
        kept.mkdir(parents=True, exist_ok=True)
        yield kept
        return
    with tempfile.TemporaryDirectory(prefix="nextvid-loader-") as name:
        yield Path(name)


def _lines(arm: Arm, quick: bool) -> Iterator[Line]:
    """Conversion and decoding are bound by the CPU, and `step` differs from `host` by it: all these are warm only."""
    yield Line(arm, WARM, 1 if arm.name in (DECORD, ZARR) else QUICK_PASSES if quick else PASSES)  # these are slow
    if arm.group != "step":
        yield Line(arm, COLD, 1)


def _measure(line: Line) -> Took:
    gc.collect()  # ends workers and maps of the arm before
    work = line.arm.prepare()
    if line.state == WARM:
        work()
    else:
        line.stayed = max(line.stayed, _evicted(line.arm.folder))

    def passes() -> None:
        for _ in range(line.passes):
            work()

    return timed(passes)


def _evicted(folder: Path) -> float:
    """Share of the folder's pages that stayed in the cache, after a few tries."""
    for _ in range(EVICTIONS):
        stayed = evict(folder)
        if stayed <= STILL_CACHED:
            break
        gc.collect()
        time.sleep(0.5)
    return stayed


def _results(lines: list[Line], clips: int, quick: bool, absent: list[dict[str, str]]) -> dict[str, Any]:
    best = {
        (line.arm.group, line.state): line
        for line in lines
        if line.arm.name == READ or (line.arm.name == LOADER and line.arm.workers == OUR_THREADS[-1])
    }
    rows = [
        {
            "group": line.arm.group,
            "state": line.state,
            "workers": line.arm.workers,
            "name": line.arm.name,
            "clips_per_s": statistics.median(line.rates),
            "cpu_s_per_1000": 1000 * line.cpu_s,
            "ours_over_this": median_ratio(best[line.arm.group, line.state].rates, line.rates),
            "cpu_this_over_ours": line.cpu_s / best[line.arm.group, line.state].cpu_s,
            "still_cached": line.stayed,
        }
        for line in lines
    ]
    return {
        "benchmark": "loader",
        "quick": quick,
        "machine": machine() | {"torch": torch.__version__},
        "turns": len(lines[0].took),
        "clips": clips,
        "clip_bytes": CLIP_BYTES,
        "batch": BATCH,
        "rows": rows,
        "absent": absent,
        "targets": targets(rows),
    }


def targets(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Design 11: what was reached against the best of the others that are measured."""
    found = {}
    memmap = [row["ours_over_this"] for row in _of(rows, "read", WARM) if row["name"] == MEMMAP]
    if memmap:
        found["random_read_over_memmap"] = (memmap[0], RANDOM_READ_TARGET)
    for group, state in (("host", WARM), ("host", COLD), ("step", WARM)):
        of_state = _of(rows, group, state)
        ours_cold = all(row["still_cached"] <= STILL_CACHED for row in of_state if row["name"] == LOADER)
        counted = [row for row in of_state if ours_cold and row["still_cached"] <= STILL_CACHED]
        whole = [row for row in counted if row["name"] in WHOLE_FILES]
        others = [row for row in counted if row["name"] not in NOT_IN_TARGET]
        as_many = [row for row in others if row["workers"] == OUR_THREADS[-1]]
        wanted = LOADER_TARGETS[state]
        for name, some, target in (
            ("best_other", others, wanted),
            ("best_of_2_workers", as_many, wanted),
            ("whole_file", whole, WHOLE_FILE_TARGET),
        ):
            if some:
                found[f"{group}_{state}_over_{name}"] = (min(row["ours_over_this"] for row in some), target)
    decord = [row["cpu_this_over_ours"] for row in _of(rows, "step", WARM) if row["name"] == DECORD]
    if decord:
        found["decord_cpu_over_ours"] = (min(decord), DECORD_TARGET)
    return {
        name: {"measured": measured, "at_least": wanted, "met": measured >= wanted}
        for name, (measured, wanted) in found.items()
    }


def _of(rows: list[dict[str, Any]], group: str, state: str) -> list[dict[str, Any]]:
    return [row for row in rows if (row["group"], row["state"]) == (group, state)]


def _print(found: dict[str, Any]) -> None:
    keys = ("clips_per_s", "cpu_s_per_1000", "ours_over_this")
    columns = ("", "cache", "workers", "clips/s", "CPU s a 1000", "ours / this")
    for group in ("read", "host", "step"):
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
