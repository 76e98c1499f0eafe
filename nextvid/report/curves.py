"""Training curves of a run from its events, as PNG with a see-through background.

Holds drawing and what is drawn: losses by strategy, learning rates, gradient norms, effective rank. Colours are chosen
to read on white and on black paper. Reads no files; what events hold is said in nextvid/train/loop.py.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nextvid.pictures import COLOURS, INK, png, quiet
from nextvid.train.diagnose import ALARM_AFTER, ALARM_RATIO

Event = dict[str, Any]
Curve = tuple[str, Sequence[float], Sequence[float]]  # name, x, y


def curves_png(events: Sequence[Event]) -> bytes:
    """Four panels over optimiser steps. Values that were no numbers ("nan") leave gaps."""
    steps = [event for event in events if event["kind"] == "step"]
    looks = [event for event in events if event["kind"] == "diagnostics"]
    figure = Figure(figsize=(9.4, 5.6), layout="constrained")
    losses, rates, norms, ranks = figure.subplots(2, 2).flatten()
    _panel(losses, "losses, by mask strategy", _nested(steps, "loss"))
    _panel(rates, "learning rate", _flat(steps, ("lr", "decoder_lr"), ("encoder, predictor", "decoder")))
    _panel(norms, "gradient norm before clipping, by module", _nested(steps, "norm"), log=True)
    names = ("effective_rank", "online_effective_rank")
    _panel(ranks, "effective rank of features", _flat(looks, names, ("EMA", "online")))
    _alarm(ranks, looks, max((event["step"] for event in events), default=0))
    for panel in (losses, rates, norms, ranks):
        _stages(panel, [event["step"] for event in events if event["kind"] == "stage"][1:])
    return png(figure)


def _panel(axes: Axes, title: str, curves: Iterable[Curve], log: bool = False) -> None:
    for (name, x, y), colour in zip(curves, COLOURS, strict=False):
        axes.plot(x, y, color=colour, linewidth=1.3, label=name)
    quiet(axes, title)
    if log:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.grid(axis="y", color=INK, alpha=0.18, linewidth=0.6)
    if axes.lines:
        axes.legend(fontsize=8, frameon=False, labelcolor=INK)


def _nested(events: Sequence[Event], key: str) -> list[Curve]:
    """Curves of a mapping inside events, one a name."""
    names = sorted({name for event in events for name in event.get(key, {})})
    return [
        (name.replace("/", ", "), *_points([(e["step"], e[key][name]) for e in events if name in e.get(key, {})]))
        for name in names
    ]


def _flat(events: Sequence[Event], keys: Sequence[str], names: Sequence[str]) -> list[Curve]:
    return [
        (name, *_points([(event["step"], event[key]) for event in events if key in event]))
        for key, name in zip(keys, names, strict=True)
    ]


def _points(pairs: Sequence[tuple[int, Any]]) -> tuple[list[float], list[float]]:
    return [float(step) for step, _ in pairs], [float(value) for _, value in pairs]  # float("nan") is a gap


def _stages(axes: Axes, starts: Sequence[int]) -> None:
    for start in starts:
        axes.axvline(start, color=INK, alpha=0.35, linewidth=0.7, linestyle=(0, (2, 3)))


def _alarm(axes: Axes, looks: Sequence[Event], steps: int) -> None:
    """The line that features must stay above, from where it counts."""
    if looks:
        level = ALARM_RATIO * float(looks[0]["effective_rank"])
        axes.plot([ALARM_AFTER * steps, steps], [level, level], color=COLOURS[4], linewidth=0.9, linestyle="--")
        axes.annotate("alarm", (steps, level), color=COLOURS[4], fontsize=8, ha="right", va="bottom")
