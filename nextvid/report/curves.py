"""Curves of accuracy: of a run over the clips that it had seen (Fig. 4a), of several over the encoder's size (Fig. 4b).

Both join scores on the same rows only. Colours are readable on white and on black.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nextvid.lineage.compare import Reached
from nextvid.pictures import COLOURS, INK, png, quiet

Scored = tuple[int, Mapping[str, Any]]  # clips that the run had seen, score.json
WIDTH, HEIGHT, COLUMNS = 4.7, 3.0, 2  # inches of a panel, panels side by side


def over_clips_png(scores: Mapping[str, Sequence[Scored]], names: Mapping[str, str]) -> bytes:
    """A panel for each benchmark: accuracy of each encoder by clips seen, with its standard error; PNG bytes.

    `names` are the encoders' words in a legend. The random initialisation has seen none: it is a level.
    """
    figure, panels = _panels(len(scores))
    for axes, (benchmark, found) in zip(panels, scores.items(), strict=True):
        quiet(axes, f"{benchmark}: accuracy over clips seen")
        for (encoder, words), colour in zip(names.items(), COLOURS, strict=False):
            own = [(clips, record["encoders"][encoder]) for clips, record in found if encoder in record["encoders"]]
            if encoder == "random" and own:
                axes.axhline(own[-1][1]["accuracy"], color=INK, linewidth=0.9, linestyle="--", label=words)
            elif own:
                x, y = [clips for clips, _ in own], [each["accuracy"] for _, each in own]
                errors = [each["standard_error"] for _, each in own]
                axes.errorbar(x, y, errors, color=colour, linewidth=1.3, marker="o", markersize=3, label=words)
        axes.legend(fontsize=8, frameon=False, labelcolor=INK)
    return png(figure)


def over_size_png(reached: Sequence[Reached]) -> bytes:
    """A panel for each benchmark that two runs or more were scored on: accuracy by parameters; PNG bytes.

    A picture without panels where there is none.
    """
    names = sorted({name for run in reached for name in run.accuracy})
    shared = [name for name in names if sum(name in run.accuracy for run in reached) > 1]
    figure, panels = _panels(len(shared))
    for axes, name in zip(panels, shared, strict=True):
        quiet(axes, f"{name}: accuracy over parameters of the encoder, M")
        own = sorted((run.parameters / 1e6, run.accuracy[name], run.recipe) for run in reached if name in run.accuracy)
        axes.plot([x for x, _, _ in own], [y for _, y, _ in own], color=COLOURS[0], linewidth=1.3, marker="o")
        axes.set_xscale("log")
        axes.margins(x=0.15, y=0.15)
        for x, y, recipe in own:
            axes.annotate(recipe, (x, y), (0, 5), textcoords="offset points", color=INK, fontsize=7, ha="center")
    return png(figure)


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    rows = max(1, -(-count // COLUMNS))
    figure = Figure(figsize=(COLUMNS * WIDTH, rows * HEIGHT), layout="constrained")
    panels = figure.subplots(rows, COLUMNS, squeeze=False).flatten().tolist()
    for axes in panels[count:]:
        axes.set_axis_off()
    return figure, panels[:count]
