"""The asset `samples`: generated next frames of a run as pictures, with PSNR beside what copying would give.

Writes masked.png, autoregressive.png and, last, samples.json; where that stands, nothing is made again. Generation is
masked.py and autoregressive.py, clips and numbers are scene.py. Holds which ways to generate are shown.

Axes: S cells.
"""

import time
from collections.abc import Mapping

import numpy as np
import polars as pl
import torch
from torch import Tensor

from nextvid.corpus.project import Project
from nextvid.corpus.trainset import Trainset
from nextvid.encode.frames import Decoding
from nextvid.model.flow import ODE_STEPS
from nextvid.model.nextvid import NExTVid
from nextvid.outcome import Outcome
from nextvid.probe.encoders import device_of, find_run, load_trained, refuse_pixels
from nextvid.sample.autoregressive import generate_onward
from nextvid.sample.filmstrips import Strip, filmstrips, hide
from nextvid.sample.masked import generate_masked
from nextvid.sample.scene import Generated, Scene, compared, open_scene
from nextvid.train.mask_plan import grid_of, open_mask_plan
from nextvid.train.run import Run
from storage import atomic
from storage.errors import RefusedError
from storage.schemas import Clips

SHOWN = 3  # clips in a picture
FADE = 4  # how much fainter the given tubelet is drawn
SEED = 0  # of the noise that generation starts from
MASK_ENTRY = 0  # whose visible cells are shown: the plan's first


def make_samples(project: Project, recipe: str, run: str | None = None) -> Outcome:
    """Generate next frames of test clips (of any, where none is encoded), unless samples.json stands.

    Raises UpstreamError where no clip is encoded, RefusedError where the autoencoder is another one.
    """
    started = time.perf_counter()
    found = find_run(project, recipe, run)
    refuse_pixels(found)
    if found.recipe.losses.flow <= 0:
        raise RefusedError(f"recipe {recipe} trains no decoder (flow weight 0): it generates nothing")
    folder = project.root.samples(recipe, found.id)
    made = not atomic.exists(f"{folder}/samples.json")
    if made:
        _make(project, found, folder)
    said = atomic.read_json(f"{folder}/samples.json")
    numbers = {
        f"{kind}_{name}_psnr_db": v["psnr_db"]
        for kind in ("masked", "autoregressive")
        for name, v in said[kind].items()
    }
    pictures = {name: f"{folder}/{name}.png" for name in ("masked", "autoregressive")}
    return Outcome(
        asset="samples",
        partition=recipe,
        made=made,
        rows=len(said["clips"]),
        size_bytes=sum(len(atomic.read_bytes(path)) for path in pictures.values()),
        seconds=time.perf_counter() - started,
        numbers={"run": found.id, **numbers},
        pictures=pictures,
    )


def _make(project: Project, run: Run, folder: str) -> None:
    trainset = Trainset.open(project.root, run.trainset)
    device = device_of(project.corpus.encoding.device)
    scene = open_scene(project, run, trainset, device)
    model = load_trained(run, device).model
    visible = _visible(project, run)
    masked = {name: _masked(model, scene, bits, device) for name, bits in visible.items()}
    densities = {"all_cells": np.ones(run.recipe.model.cells, bool)}
    if run.recipe.masks.keep != "all":
        densities["training_cells"] = next(iter(visible.values()))
    onward = {name: _onward(model, scene, bits, device) for name, bits in densities.items()}
    sources = _sources(project, trainset, scene.rows.head(SHOWN))
    atomic.publish_bytes(f"{folder}/masked.png", _picture(scene, sources, masked, visible, run))
    atomic.publish_bytes(f"{folder}/autoregressive.png", _picture(scene, sources, onward, {}, run))
    atomic.publish_json(
        f"{folder}/samples.json",
        {
            "recipe": run.recipe.name,
            "run": run.id,
            "trainset": run.trainset,
            "mask_plan": run.mask_plan,
            "autoencoder": trainset.spec.autoencoder,
            "ode_steps": ODE_STEPS,
            "seed": SEED,
            "clips": _listed(scene.rows),
            "masked": {name: found.numbers for name, found in masked.items()},
            "autoregressive": {name: found.numbers for name, found in onward.items()},
        },
    )
    scene.source.close()


def _listed(rows: pl.DataFrame) -> list[dict[str, str]]:
    return [
        {"row": row["row_id"].hex(), "media": row["media_id"].hex(), "uri": row["uri"], "split": row["split"]}
        for row in rows.iter_rows(named=True)
    ]


def _visible(project: Project, run: Run) -> dict[str, np.ndarray]:
    """Visible cells of one entry of each strategy, [S] bool; everything for the recipe without masks."""
    masks, grid = run.recipe.masks, grid_of(run.recipe.model)
    if masks.keep == "all":
        return {"all": np.ones(run.recipe.model.cells, bool)}
    plan = open_mask_plan(project.root, masks, grid)
    bits = plan.kept or plan.raw
    if not bits:
        raise RefusedError(f"masks of kind '{masks.keep}' have no drawn entries to show")
    return {name: found[MASK_ENTRY] for name, found in bits.items()}


def _masked(model: NExTVid, scene: Scene, visible: np.ndarray, device: str) -> Generated:
    """Teacher forcing; copying repeats the last true frame before each tubelet."""
    cells = _cells(visible, len(scene.latents), device)
    latents = generate_masked(model, scene.latents, cells, _noise(device))
    mean = generate_masked(model, scene.latents, cells, _noise(device), steps=1)
    tubelet = model.recipe.model.tubelet
    before = np.arange(scene.latents.shape[1]) // tubelet * tubelet - 1
    return compared(scene, latents, mean, before.clip(0), tubelet)


def _onward(model: NExTVid, scene: Scene, visible: np.ndarray, device: str) -> Generated:
    """From the first tubelet on; copying repeats the seed's last frame to the end."""
    cells = _cells(visible, len(scene.latents), device)
    tubelet = model.recipe.model.tubelet
    seed, count = scene.latents[:, :tubelet], scene.latents.shape[1] // tubelet
    latents = generate_onward(model, seed, count, cells, _noise(device))
    mean = generate_onward(model, seed, count, cells, _noise(device), steps=1)
    return compared(scene, latents, mean, np.full(scene.latents.shape[1], tubelet - 1), tubelet)


def _sources(project: Project, trainset: Trainset, rows: pl.DataFrame) -> list[Strip]:
    """The files' own frames, decoded again; an empty strip with the reason where a file is gone."""
    with Decoding(1) as decoding:
        seen = decoding.start(rows.select(Clips.column_names()), trainset.spec.resolution).collect()
    found = [seen[row] for row in rows["row_id"]]
    return [Strip("source" if s.frames is not None else f"source:\n{s.reason}", s.frames) for s in found]


def _picture(
    scene: Scene,
    sources: list[Strip],
    generated: Mapping[str, Generated],
    visible: Mapping[str, np.ndarray],
    run: Run,
) -> bytes:
    """Source, reconstruction, and for each way to generate its input (where cells are hidden) and its frames.

    The first tubelet is given, not generated: it is faded.
    """
    given = run.recipe.model.tubelet
    clips = []
    for index, source in enumerate(sources):
        strips = [source, Strip("reconstruction", scene.truth[index])]
        for name, found in generated.items():
            if name in visible:
                hidden = hide(scene.truth[index], visible[name], grid_of(run.recipe.model))
                strips.append(Strip(f"input,\n{name} mask", hidden))
            label = "generated" if name in visible else f"from tubelet 0,\n{name.replace('_', ' ')}"
            faded = found.frames[index].copy()
            faded[:given] = 255 - (255 - faded[:given]) // FADE
            strips.append(Strip(label, faded))
        clips.append(strips)
    return filmstrips(clips)


def _cells(visible: np.ndarray, clips: int, device: str) -> Tensor:
    return torch.from_numpy(np.flatnonzero(visible)).to(device).expand(clips, -1)


def _noise(device: str) -> torch.Generator:
    """The same noise for everything that is compared."""
    return torch.Generator(device).manual_seed(SEED)
