"""How a batch's shots are distributed: motion, lengths and light beside the thresholds, as PNG.

Holds drawing with matplotlib alone, so that curation can import it without torch. Decides nothing.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, BAR, LIMIT = "#808893", "#3b82c4", "#c9504f"  # as in curves.py: between black and white paper
DPI = 110
BINS = 40


@dataclass(frozen=True)
class Histogram:
    """Values of one score, the thresholds that it is held to, and whether its axis is logarithmic."""

    title: str
    values: Iterable[float]
    limits: tuple[float | None, float | None] = (None, None)
    log: bool = False


def histograms_png(histograms: Sequence[Histogram], counts: Mapping[str, int]) -> bytes:
    """One panel a score, and bars of what became of the shots: `counts` by verdict."""
    columns = 3
    rows = -(-(len(histograms) + 1) // columns)
    figure = Figure(figsize=(9.4, 2.5 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flatten())
    for panel, histogram in zip(panels, histograms, strict=False):
        _draw(panel, histogram)
    verdicts = panels[len(histograms)]
    names = sorted(counts, key=lambda name: counts[name])
    verdicts.barh(names, [counts[name] for name in names], color=BAR)
    _quiet(verdicts, "shots by verdict of pretraining")
    for panel in panels[len(histograms) + 1 :]:
        panel.set_axis_off()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def _draw(axes: Axes, histogram: Histogram) -> None:
    values = np.fromiter(histogram.values, np.float64)
    values = values[np.isfinite(values)]
    if histogram.log and len(values):
        least = max(float(values.max()) * 1e-4, 1e-3)  # what is below stands in the first bar
        values = np.maximum(values, least)
        axes.hist(values, bins=np.geomspace(least, max(float(values.max()), 2 * least), BINS).tolist(), color=BAR)
        axes.set_xscale("log")
    elif len(values):
        axes.hist(values, bins=BINS, color=BAR)
    for limit in histogram.limits:
        if limit is not None:
            axes.axvline(limit, color=LIMIT, linewidth=1.2, linestyle="dashed")
    _quiet(axes, f"{histogram.title} (n = {len(values):,})")


def _quiet(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=9, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(colors=INK, labelsize=7)
