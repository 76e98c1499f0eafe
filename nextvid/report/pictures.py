"""The report's sections of pictures: training curves, generated frames, and previews that makers left behind.

Holds which pictures are shown and their captions. Draws curves only (curves.py); all others are read as they are.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from nextvid.config.project import Project
from nextvid.making.batches import dataset_of
from nextvid.report.blocks import Block, Picture, Section, Table, Text
from nextvid.report.curves import curves_png
from nextvid.train.run import Run
from nextvid.trainset.trainset import Trainset
from storage import atomic

Event = dict[str, Any]


def training_section(run: Run, events: Sequence[Event]) -> Section:
    """Curves, and where the run ended."""
    path = f"{run.folder}/events.jsonl"
    looks = [event for event in events if event["kind"] == "diagnostics"]
    steps = [event for event in events if event["kind"] == "step"]
    blocks: list[Block] = [
        Picture(
            "curves", curves_png(events), "Over optimiser steps; dotted lines are stage edges.", (path,), plain=True
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
        (title, f"{float(looks[0][key]):.1f}", f"{float(looks[-1][key]):.1f}")
        for key, title in names.items()
        if looks and key in looks[-1]
    ]
    caption = "First and last value logged. Without learning, alignment is about 1 and flow about 2."
    blocks.append(Table(("", "first", "last"), tuple(rows), "lrr", caption, (path,)))
    if skipped := sum(event["kind"] == "skipped" for event in events):
        blocks.append(Text(f"{skipped} steps without a finite gradient were skipped.", "caveat", (path,)))
    if alarms := sum(event["kind"] == "alarm" for event in events):
        blocks.append(Text(f"The collapse alarm sounded {alarms} times.", "caveat", (path,)))
    return Section("Training", tuple(blocks))


def samples_section(folder: str, said: Mapping[str, Any]) -> Section:
    """Generated frames, with PSNR beside copying."""
    path = f"{folder}/samples.json"
    captions = {
        "masked": "Masked generation: the visible cells of real tubelets go in, the next tubelet comes out.",
        "autoregressive": "Autoregressive generation: tubelet 0 goes in, every other tubelet is generated, one by one.",
    }
    blocks: list[Block] = []
    for kind, caption in captions.items():
        picture = f"{folder}/{kind}.png"
        shown = f"{caption} {said['ode_steps']} Euler steps, seed {said['seed']}; clips chosen by row id, none picked."
        blocks.append(Picture(kind, atomic.read_bytes(picture), shown, (picture,)))
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
        for name, found in said[kind].items()
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
        f"PSNR against the autoencoder's own reconstruction over {len(said['clips'])} clips of "
        f"{_splits(said['clips'])}. A sample is not meant to win this: the mean of all futures does, and is a blur."
    )
    blocks.append(Table(head, rows, "lrrrrr", caption, (path,)))
    return Section("Generated frames", tuple(blocks))


def previews_section(project: Project, trainset: Trainset, run: Run) -> Section | None:
    """What the corpus looks like: one batch a dataset, and the mask plan. None where no maker left a picture."""
    blocks: list[Block] = []
    for dataset in trainset.weights:
        batch = next(name for name in trainset.batches if dataset_of(name) == dataset)
        for noun, what, caption in _PREVIEWS:
            path = project.root.preview(noun, batch, what)
            if atomic.exists(path):
                name = "_".join(part for part in (noun, what, dataset) if part)
                blocks.append(Picture(name, atomic.read_bytes(path), f"{batch}: {caption}", (path,)))
    gallery = f"{project.root.pointed('mask_plan', run.mask_plan)}/gallery.png"
    if atomic.exists(gallery):
        caption = (
            "Mask plan, its first entries: bright cells are kept, grey ones were thinned out, dark ones are masked."
        )
        blocks.append(Picture("mask_plan", atomic.read_bytes(gallery), caption, (gallery,)))
    return Section("What it looks like", tuple(blocks)) if blocks else None


_PREVIEWS: tuple[tuple[Literal["shots", "clips", "latents"], Literal["", "scores"], str], ...] = (
    ("shots", "", "shots, with what began them and by how many grey levels"),
    ("clips", "", "shots that pretraining left out, by reason"),
    ("clips", "scores", "scores and lengths of all shots; dashed lines are thresholds"),
    ("latents", "", "source, what the autoencoder makes of the stored latents, and their difference"),
)


def _splits(clips: Sequence[Mapping[str, str]]) -> str:
    return " and ".join(f"split {name}" for name in sorted({clip["split"] for clip in clips}))
