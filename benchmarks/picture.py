"""The loader's tables as a picture: `python -m benchmarks.picture OUT.png FILE ...`, of files that loader.py wrote.

Bars are rates over ours with 2 threads in the same run, so that pieces measured at different times can be compared;
the best number of workers of each format is drawn. Measures nothing.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import matplotlib as mpl
import tyro
from matplotlib.axes import Axes

from benchmarks.arms import LOADER
from benchmarks.loader import STILL_CACHED

PANELS = (
    ("host", "warm", "float16 batches in host memory, warm"),
    ("host", "cold", "the same, pages dropped from the cache"),
    ("step", "warm", "normalised float32 batches on the CPU, warm"),
)


def main(out: Annotated[Path, tyro.conf.Positional], files: Annotated[tuple[Path, ...], tyro.conf.Positional]) -> None:
    """Draw.

    Args:
        out: the picture to write.
        files: results of `python -m benchmarks.loader --json`.
    """
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for path in files for row in json.loads(path.read_text())["rows"]]
    figure, axes = plt.subplots(1, len(PANELS), figsize=(16, 5), layout="constrained")
    for panel, (group, state, title) in zip(axes, PANELS, strict=True):
        chosen = [row for row in rows if (row["group"], row["state"]) == (group, state)]
        _draw(panel, best_by_name([row for row in chosen if row["still_cached"] <= STILL_CACHED]), title)
    figure.savefig(out, dpi=110)


def best_by_name(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each name the row that comes closest to ours, slowest first; ours is the one with most threads."""
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        known = best.get(row["name"])
        better = known is None or row["ours_over_this"] < known["ours_over_this"]
        if row["name"] == LOADER:
            better = known is None or row["workers"] > known["workers"]
        if better:
            best[row["name"]] = row
    return sorted(best.values(), key=lambda row: float(row["ours_over_this"]), reverse=True)


def _draw(panel: Axes, rows: list[dict[str, Any]], title: str) -> None:
    rates = [1 / row["ours_over_this"] for row in rows]
    colours = ["tab:orange" if row["name"] == LOADER else "tab:blue" for row in rows]
    bars = panel.barh([f"{row['name']} ({row['workers']})" for row in rows], rates, color=colours)
    panel.bar_label(bars, [f" {rate:.2g}x, {row['clips_per_s']:.0f}/s" for rate, row in zip(rates, rows, strict=True)])
    panel.set_xlim(0, 1.6 * max(rates))
    panel.set_title(title, fontsize=10)
    panel.set_xlabel("rate over ours; in brackets workers, for ours threads", fontsize=8)
    panel.tick_params(axis="y", labelsize=8)


if __name__ == "__main__":
    tyro.cli(main)
