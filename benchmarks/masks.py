"""What each way of thinning masks costs a rank a step: `python -m benchmarks.masks [--quick] [--json FILE]`.

The trainer's loader without threads over random latents of the VA-VAE's shape, 32 clips a step, all in the page cache:
draws, masks of both strategies and rows in host memory. The arms are the recipe's `masks.keep`, in turns, CPU seconds.
"""

import statistics
import tempfile
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks.clips import BATCH, Store, random_clips, write_store
from benchmarks.measure import machine, median_ratio, show, timed, write
from nextvid.train.loader import Filled, Loader

ARMS = ("fixed", "bucket", "flat")
AT_MOST = {"bucket": 2.0, "flat": 3.0}  # times the CPU time of `fixed`: our aims
ENTRIES = 1 << 16  # the paper recipes'
QUICK_STEPS, STEPS = 20, 100
QUICK_TURNS, TURNS = 3, 7
CLIPS = 256


def main(quick: bool = False, json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None) -> None:
    """Measure, print a table, and with --json write what README.md documents.

    Args:
        quick: 3 turns of 20 steps, in under a minute.
        json: file for the results.
    """
    steps, turns = (QUICK_STEPS, QUICK_TURNS) if quick else (STEPS, TURNS)
    inputs: dict[str, list[float]] = {arm: [] for arm in ARMS}
    masks: dict[str, list[float]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory() as folder:
        write_store(random_clips(CLIPS), Path(folder))
        store = Store(Path(folder))
        loaders = {
            arm: store.loader(steps + 1, overrides=(f"masks.keep={arm}", f"masks.entries={ENTRIES}")) for arm in ARMS
        }
        for turn in range(turns):
            for arm in ARMS if turn % 2 == 0 else reversed(ARMS):
                whole, alone = _step_s(loaders[arm], steps)
                inputs[arm].append(whole)
                masks[arm].append(alone)
    ratios = {arm: median_ratio(inputs[arm], inputs["fixed"]) for arm in ARMS}
    targets = {
        f"{arm}_over_fixed": {"measured": ratios[arm], "at_most": most, "met": ratios[arm] <= most}
        for arm, most in AT_MOST.items()
    }
    rows = [
        {
            "name": arm,
            "masks_ms": 1e3 * statistics.median(masks[arm]),
            "input_ms": 1e3 * statistics.median(inputs[arm]),
            "of_fixed": ratios[arm],
        }
        for arm in ARMS
    ]
    show(
        f"CPU time of a rank-step's input, {BATCH} clips",
        ("", "masks ms", "all input ms", "over fixed"),
        [[*row.values()] for row in rows],
    )
    for name, said in targets.items():
        print(f"{name}: {said['measured']:.2f}, wanted <= {said['at_most']}: {'met' if said['met'] else 'MISSED'}")
    found: dict[str, Any] = {"benchmark": "masks", "quick": quick, "machine": machine(), "steps": steps, "turns": turns}
    write(json, found | {"rows": rows, "targets": targets})


def _step_s(loader: Loader, steps: int) -> tuple[float, float]:
    """CPU seconds of a step's input, the first step left out, and of its masks alone."""
    filled = loader.filled(0, threads=0)
    first: Filled = next(filled)

    def read() -> None:
        for _ in range(steps):
            next(filled)

    def draw() -> None:
        for step in range(1, steps + 1):
            loader.masks.visible(step, range(BATCH * step, BATCH * (step + 1)))

    assert len(first.drawn) == BATCH
    return timed(read).cpu_s / steps, timed(draw).cpu_s / steps


if __name__ == "__main__":
    tyro.cli(main)
