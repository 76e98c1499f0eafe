"""The report's sections on training and on generated frames: curves of the run's events, first and last values, PSNR.

Curves are drawn from events.jsonl (nextvid/train/events.py), in colours that are readable on white and on black;
generated frames are shown as `samples` stored them.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nextvid.pictures import COLOURS, INK, plot_text, png, quiet
from nextvid.report.page import Block, Picture, Section, Table, Text
from nextvid.train.diagnose import ALARM_AFTER, ALARM_RATIO, collapsed
from nextvid.train.events import Event
from nextvid.train.run import Run
from storage import atomic

Curve = tuple[str, Sequence[float], Sequence[float]]  # name, x, y
SCORED = " Accuracies are of a few train clips, each answered by those of other files: no test clip was read."


def training_section(run: Run, events: Sequence[Event]) -> Section:
    """Training curves with first and last values, and a caveat for skipped steps or alarms."""
    path = f"{run.folder}/events.jsonl"
    diagnostics = [event for event in events if event["kind"] == "diagnostics"]
    steps = [event for event in events if event["kind"] == "step"]
    scored = any(event["kind"] == "scores" for event in events)
    blocks: list[Block] = [
        Picture(
            "curves",
            curves_png(events),
            "Over optimiser steps; colours of the ground are the stages." + (SCORED if scored else ""),
            (path,),
            plain=True,
        )
    ]
    rows = [
        (f"{kind}, {name}", f"{float(steps[0]['loss'][f'{kind}/{name}']):.3f}", f"{float(value):.3f}")
        for kind, name, value in (
            (*key.split("/", 1), value) for key, value in (steps[-1]["loss"].items() if steps else ())
        )
    ]
    names = {"effective_rank": "effective rank, EMA", "online_effective_rank": "effective rank, online"}
    rows += [
        (title, f"{float(diagnostics[0][key]):.1f}", f"{float(diagnostics[-1][key]):.1f}")
        for key, title in names.items()
        if diagnostics and key in diagnostics[-1]
    ]
    caption = "First and last value logged. Without learning, alignment is about 1 and flow about 2."
    blocks.append(Table(("", "first", "last"), tuple(rows), "lrr", caption, (path,)))
    if skipped := sum(event["kind"] == "skipped" for event in events):
        words = f"{skipped} steps without a finite gradient, or whose loss leaped, were skipped."
        blocks.append(Text(words, "caveat", (path,)))
    if alarms := sum(event["kind"] == "alarm" for event in events):
        blocks.append(Text(f"The alarm for collapsed features was raised {alarms} times.", "caveat", (path,)))
    ranks = [float(event["effective_rank"]) for event in diagnostics]
    if ranks and collapsed(ranks[-1], ranks[0], run.recipe.steps, run.recipe.steps):
        words = f"The features collapsed: at the end their effective rank is {ranks[-1]:.1f}, and was {ranks[0]:.1f}."
        blocks.append(Text(f"{words} Scores are those of a collapsed encoder.", "caveat", (path,)))
    return Section("Training", tuple(blocks))


def samples_section(folder: str, record: Mapping[str, Any]) -> Section:
    """Generated frames, and their PSNR beside that of copying the last frame; `record` is samples.json."""
    path = f"{folder}/samples.json"
    captions = {
        "masked": "Masked generation: the visible cells of real tubelets go in, the next tubelet comes out.",
        "autoregressive": "Autoregressive generation: tubelet 0 goes in, every other tubelet is generated, one by one.",
    }
    blocks: list[Block] = []
    for kind, caption in captions.items():
        picture = f"{folder}/{kind}.png"
        shown = (
            f"{caption} {record['ode_steps']} Euler steps, seed {record['seed']}; clips chosen by row id, not by eye."
        )
        blocks.append(Picture(kind, atomic.read_bytes(picture), shown, (picture,)))
    splits = " and ".join(f"split {name}" for name in sorted({clip["split"] for clip in record["clips"]}))
    rows = tuple(
        (
            f"{kind}, {name.replace('_', ' ')}",
            f"{found['psnr_db']:.2f}",
            f"{found['one_step_psnr_db']:.2f}",
            f"{found['copy_last_psnr_db']:.2f}",
            f"{found['one_step_latent_mse']:.3f}",
            f"{found['copy_last_latent_mse']:.3f}",
        )
        for kind in captions
        for name, found in record[kind].items()
    )
    head = (
        "",
        "generated, dB",
        "one-step mean, dB",
        "copy of the last frame, dB",
        "one-step latent MSE",
        "copy latent MSE",
    )
    caption = (
        f"PSNR against the autoencoder's own reconstruction over {len(record['clips'])} clips of "
        f"{splits}. A sample is not meant to have the highest PSNR: the mean of all futures has it, and is a blur."
    )
    blocks.append(Table(head, rows, "lrrrrr", caption, (path,)))
    return Section("Generated frames", tuple(blocks))


def curves_png(events: Sequence[Event]) -> bytes:
    """Losses, learning rates, gradient norms, effective ranks and scores over optimiser steps; NaN leaves a gap.

    PNG bytes. Without scores there are no panels for them.
    """
    steps, diagnostics, scored = (
        [event for event in events if event["kind"] == kind] for kind in ("step", "diagnostics", "scores")
    )
    rows = 3 if scored else 2
    figure = Figure(figsize=(9.4, 2.8 * rows), layout="constrained")
    losses, rates, norms, ranks, *accuracies = figure.subplots(rows, 2).flatten()
    _panel(losses, "losses, by mask strategy", _nested(steps, "loss"))
    _panel(rates, "learning rate", _flat(steps, ("lr", "decoder_lr"), ("encoder, predictor", "decoder")))
    _panel(norms, "gradient norm before clipping, by module", _nested(steps, "norm"), log=True)
    names = ("effective_rank", "online_effective_rank")
    _panel(ranks, "effective rank of features", _flat(diagnostics, names, ("EMA", "online")))
    for axes, way, title in zip(accuracies, ("linear", "knn"), ("linear probe", "k-NN"), strict=False):
        curves: dict[str, Curve] = {}
        for name, x, y in _nested(scored, "accuracy"):  # sorted: `knn`, then `knn_by_change`, which replaces it
            benchmark, what = name.split(", ")
            if what.startswith(way):
                curves[benchmark] = benchmark, x, y
        _panel(axes, f"accuracy on train clips, {title}", list(curves.values()))
    if diagnostics:  # the level that effective rank must stay above, from the step at which it is checked
        last, level = max(event["step"] for event in events), ALARM_RATIO * float(diagnostics[0]["effective_rank"])
        ranks.plot([ALARM_AFTER * last, last], [level, level], color=COLOURS[4], linewidth=0.9, linestyle="--")
        ranks.annotate("alarm", (last, level), color=COLOURS[4], fontsize=8, ha="right", va="bottom")
    _mark_stages((losses, rates, norms, ranks, *accuracies), events)
    return png(figure)


def _mark_stages(panels: Sequence[Axes], events: Sequence[Event]) -> None:
    """Shade each stage as the paper's Fig. 6 does, and name it in the first panel, above its curves and legend."""
    stages = {event["step"]: event for event in events if event["kind"] == "stage"}  # a resumed run repeats one
    ends = [*list(stages)[1:], max((event["step"] for event in events), default=0)]
    named = panels[0]
    named.set_ylim(top=1.15 * named.get_ylim()[1])
    if (legend := named.get_legend()) is not None:
        legend.set_loc("upper right")
        legend.set_bbox_to_anchor((1, 0.91))
    for (start, event), end, colour in zip(stages.items(), ends, COLOURS, strict=False):
        for panel in panels:
            panel.axvspan(start, end, color=colour, alpha=0.09, linewidth=0)
        name = plot_text(str(event.get("name", "")).replace("_", " "))
        place = named.get_xaxis_transform()
        named.text((start + end) / 2, 0.98, name, transform=place, fontsize=7, color=INK, ha="center", va="top")


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
    """One curve for each name in the mapping `key` of the events."""
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
