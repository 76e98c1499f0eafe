"""study.md and study.png: what the results on disk say of each claim, with paired differences and 95 % intervals.

Nothing is decided by hand: a difference is above or below zero where its interval is, else undecided. Axes: n seeds.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from examples.study.runs import result_file
from examples.study.tables import ARMS, DATA, FULL, TABLES, Cell, Size, Table, cells
from nextvid.pictures import COLOURS, INK, png, quiet
from storage import atomic

Result = Mapping[str, Any]
LEVEL = 0.95
HEADER = """# The study: what masks, the moving average and each part of the method do on two cores

`make study` makes this page from the results in `examples/study/results`, a file a run.
[study_plan.md](study_plan.md) holds settings, predictions and sample sizes, which were written before the runs.
The model has a million weights and sees 64 pixels: a sign that agrees with the paper is evidence for the mechanism,
not for its numbers.

Accuracy in points (%) of the frozen attentive probe on the averaged encoder; mean over seeds of training with its
{level:.0f} % interval (t), which covers initialisation, order and noise, not the choice of clips. Differences are
paired by seed. An interval that holds zero is undecided, whatever its mean. Probes of all arms learn from the same
clips and are judged on the same ones; neither k-NN nor effective rank decides anything.
"""


@dataclass(frozen=True)
class Interval:
    """A mean over n values and half the width of its interval; NaN of fewer than two values."""

    mean: float
    half: float
    n: int

    @property
    def verdict(self) -> str:
        """Which side of zero the interval is on."""
        if not abs(self.mean) > self.half:
            return "undecided"
        return "above zero" if self.mean > 0 else "below zero"


def interval(values: Sequence[float]) -> Interval:
    """Student's interval of a mean."""
    n = len(values)
    mean = float(np.mean(values)) if n else math.nan
    if n < 2:
        return Interval(mean, math.nan, n)
    spread = float(np.std(values, ddof=1)) / math.sqrt(n)
    return Interval(mean, float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * spread, n)


def paired(first: Mapping[int, float], second: Mapping[int, float]) -> dict[int, float]:
    """First minus second, for the seeds that both have."""
    return {seed: first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())}


class Results:
    """The results of a size that are on disk."""

    def __init__(self, folder: Path, size: Size) -> None:
        self.size, self.wanted = size, list(cells(size))
        self._found: dict[Cell, Result] = {
            cell: atomic.read_json(str(file))
            for cell in self.wanted
            if (file := result_file(folder, cell, size)).is_file()
        }

    def cells(self) -> set[Cell]:
        """Runs that are in."""
        return set(self._found)

    def of(self, data: str, arm: str, value: Callable[[Result], float | None]) -> dict[int, float]:
        """A number of each finished run of an arm, by seed, where the run has it."""
        numbers = {
            cell.seed: value(result) for cell, result in self._found.items() if (cell.data, cell.arm) == (data, arm)
        }
        return {seed: number for seed, number in sorted(numbers.items()) if number is not None}

    def accuracy(self, data: str, arm: str, target: str) -> dict[int, float]:
        """Accuracies in points by seed."""
        return self.of(data, arm, lambda result: 100 * result["scores"][target]["accuracy"])

    def curves(self, data: str, arm: str) -> dict[int, list[list[float]]]:
        """Step, effective rank of the averaged and of the online encoder, by seed."""
        return {
            cell.seed: result["rank"]
            for cell, result in self._found.items()
            if (cell.data, cell.arm) == (data, arm) and "rank" in result
        }

    def core_minutes(self) -> float:
        """Of all runs, without making data sets."""
        return sum(result["cpu_s"] for result in self._found.values()) / 60

    def rows(self, data: str) -> int | None:
        """Test answers that a score of this data set is the mean of."""
        return next((min(r["tested"].values()) for cell, r in self._found.items() if cell.data == data), None)


def write_page(results_folder: Path, folder: Path, size: Size) -> None:
    """Write study.md and study.png into `folder`, from the results of a size."""
    results = Results(results_folder, size)
    folder.mkdir(parents=True, exist_ok=True)
    atomic.publish_bytes(str(folder / "study.png"), _picture(results))
    atomic.publish_bytes(str(folder / "study.md"), "\n".join([*_lines(results), ""]).encode())


def _lines(results: Results) -> Iterator[str]:
    yield HEADER.format(level=100 * LEVEL)
    if results.size != FULL:
        yield "**This is the quick run: it shows that every part works. Its scores mean nothing.**\n"
    done, asked = len(results.cells()), len(results.wanted)
    unfinished = "" if done == asked else " **It is unfinished: what follows is of the runs that are in.**"
    yield f"{done} of {asked} runs are in, {results.core_minutes():.0f} core-minutes.{unfinished}\n"
    yield "![Differences by claim, and effective rank over steps](study.png)\n"
    for table in TABLES.values():
        yield from _table(results, table)
    yield "## Arms\n"
    yield "| arm | what it is |"
    yield "|---|---|"
    for name, arm in ARMS.items():
        yield f"| `{name}` | {arm.meaning} |"
    yield "\n## Data\n"
    yield "| data | what it is | test answers |"
    yield "|---|---|---|"
    for name, data in DATA.items():
        yield f"| `{name}` | {data.meaning} | {results.rows(name) or 'not run'} |"


def _table(results: Results, table: Table) -> Iterator[str]:
    wanted = {cell for cell in results.wanted if cell.data in table.data and cell.arm in table.arms}
    asked, done = len(wanted), len(wanted & results.cells())
    yield f"## {table.title}\n"
    yield f"Predicted: {table.prediction}\n"
    yield f"{done} of {asked} runs are in{'' if done == asked else ': **unfinished**'}.\n"
    if not done:
        return
    yield "| data | label | arm | accuracy | seeds | flow loss, last | effective rank, first to last | collapsed |"
    yield "|---|---|---|---|---|---|---|---|"
    for data in table.data:
        for target in DATA[data].targets:
            for arm in table.arms:
                found = interval(list(results.accuracy(data, arm, target).values()))
                if found.n:
                    training = _training(results, data, arm)
                    yield f"| {data} | {target} | `{arm}` | {_shown(found)} | {found.n} | {training} |"
    yield ""
    yield "| data | label | difference | points | by seed | seeds | verdict |"
    yield "|---|---|---|---|---|---|---|"
    for data, target, (first, second), apart in _differences(results, table):
        found, by_seed = interval(list(apart.values())), ", ".join(f"{value:+.1f}" for value in apart.values())
        yield (
            f"| {data} | {target} | `{first}` - `{second}` | {_shown(found, sign=True)} | {by_seed} | {found.n} | "
            f"{found.verdict if found.n > 1 else 'one seed'} |"
        )
    yield ""


def _differences(results: Results, table: Table) -> Iterator[tuple[str, str, tuple[str, str], dict[int, float]]]:
    """Each difference that has a seed. A floor has no seed: it is the same for all."""
    for data in table.data:
        for target in DATA[data].targets:
            for pair in table.differences:
                first, second = (results.accuracy(data, arm, target) for arm in pair)
                if ARMS[pair[1]].kind == "floor" and second:
                    second = dict.fromkeys(first, second[0])
                if apart := paired(first, second):
                    yield data, target, pair, apart


def _training(results: Results, data: str, arm: str) -> str:
    """Three cells of a row: flow loss, rank, share of collapsed runs; empty where the arm has no such number."""
    flow = list(results.of(data, arm, lambda result: result.get("flow", {}).get("last")).values())
    curves = results.curves(data, arm).values()
    ranks = [" to ".join(f"{np.mean([curve[at][1] for curve in curves]):.1f}" for at in (0, -1))] if curves else [""]
    fallen = results.of(data, arm, lambda result: result.get("collapsed"))
    share = f"{sum(map(bool, fallen.values()))} of {len(fallen)}" if fallen else ""
    return f"{np.mean(flow):.2f} | {ranks[0]} | {share}" if flow else f" | {ranks[0]} | {share}"


def _shown(found: Interval, sign: bool = False) -> str:
    mean = f"{found.mean:+.1f}" if sign else f"{found.mean:.1f}"
    return mean if math.isnan(found.half) else f"{mean} ± {found.half:.1f}"


def _picture(results: Results) -> bytes:
    """A forest of all differences, and effective rank over steps of the arms of Tab. 12."""
    from matplotlib.figure import Figure  # half a second, which runs do not need

    lines = [
        (f"{data}, {target}: {pair[0]} - {pair[1]}", apart, COLOURS[number % len(COLOURS)])
        for number, table in enumerate(TABLES.values())
        for data, target, pair, apart in _differences(results, table)
    ]
    figure = Figure(figsize=(11, max(3.2, 0.2 * len(lines) + 1)), layout="constrained")
    forest, curves = figure.subplots(1, 2, width_ratios=(2, 1))
    for row, (_, apart, colour) in enumerate(reversed(lines)):
        values, found = list(apart.values()), interval(list(apart.values()))
        forest.plot(values, [row] * len(values), ".", color=colour, alpha=0.5, markersize=4)
        if not math.isnan(found.half):
            forest.plot([found.mean - found.half, found.mean + found.half], [row, row], color=colour, linewidth=2)
        forest.plot([found.mean], [row], "|", color=colour, markersize=9)
    forest.axvline(0, color=INK, linewidth=0.8)
    forest.set_yticks(range(len(lines)), [label for label, _, _ in reversed(lines)], fontsize=6)
    quiet(forest, "difference in points, 95 % interval, one point a seed")
    forest.tick_params(axis="y", labelsize=6)
    for number, arm in enumerate(TABLES["tab12"].arms):
        for seed, curve in results.curves("stills", arm).items():
            steps, ranks = [point[0] for point in curve], [point[1] for point in curve]
            curves.plot(steps, ranks, color=COLOURS[number], linewidth=1, label=None if seed else arm)
    quiet(curves, "effective rank of the averaged encoder, stills")
    if curves.lines:
        curves.legend(frameon=False, fontsize=7, labelcolor=INK)
    return png(figure)
