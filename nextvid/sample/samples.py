"""The asset `samples`: generated next frames of a run as pictures, with PSNR beside what copying would give.

Writes masked.png, autoregressive.png and, last, samples.json; where that stands, nothing is made again. Generation is
masked.py and autoregressive.py. PSNR is against the autoencoder's own reconstruction of the same clip, over tubelets
1..T-1, so that the autoencoder's error counts for nobody.

Axes: B clips, F frames, C channels, h and w cells of the grid, S cells, R pixels a side.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import torch
from einops import rearrange
from torch import Tensor

from nextvid.corpus.project import Project
from nextvid.corpus.trainset import Trainset
from nextvid.encode.autoencoders import Autoencoder
from nextvid.encode.frames import Decoding
from nextvid.model.flow import ODE_STEPS
from nextvid.model.nextvid import NExTVid
from nextvid.outcome import Outcome
from nextvid.probe.encoders import device_of, find_run, load_trained, refuse_pixels
from nextvid.probe.features import LatentSource
from nextvid.sample.autoregressive import generate_onward
from nextvid.sample.filmstrips import Strip, filmstrips, hide, psnr_db
from nextvid.sample.masked import generate_masked
from nextvid.train.mask_plan import grid_of, open_mask_plan
from nextvid.train.run import Run
from storage import atomic, tables
from storage.errors import RefusedError, UpstreamError
from storage.latents import LatentStore
from storage.schemas import Clips

CLIPS = 16  # clips that numbers are taken over: our choice
SHOWN = 3  # clips in a picture
SEED = 0  # of the noise that generation starts from
MASK_ENTRY = 0  # whose visible cells are shown: the plan's first


@dataclass(frozen=True)
class Scene:
    """What generation starts from, and what its results are compared with."""

    rows: pl.DataFrame
    latents: Tensor  # normalised, [B, F, C, h, w]
    source: LatentSource
    autoencoder: Autoencoder
    truth: np.ndarray  # reconstructions, [B, F, R, R, 3]

    def frames(self, latents: Tensor) -> np.ndarray:
        """Normalised latents decoded: uint8 [B, F, R, R, 3]."""
        raw = self.source.pictures(latents)
        return rearrange(
            self.autoencoder.decode(rearrange(raw, "b f c h w -> (b f) c h w")), "(b f) ... -> b f ...", b=len(raw)
        )


def make_samples(project: Project, recipe: str, run: str | None = None) -> Outcome:
    """Generate clips that the run did not train on, unless samples.json stands.

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


def choose_clips(project: Project, trainset: Trainset, frames: int, most: int = CLIPS) -> pl.DataFrame:
    """Committed clips of a length with their addresses: of test files, else of any; which ones is decided by row id."""
    batches = [name for name in project.root.batches("clips") if name.rsplit(".", 1)[0] in trainset.weights]
    clips = tables.read_tables(project.root, "clips", batches, Clips)
    wanted = clips.filter((pl.col("status") == "ok") & (pl.col("frames") == frames))
    store = LatentStore(project.root, trainset.spec)
    commits = pl.concat([store.commits(batch, frames) for batch in batches]) if batches else pl.DataFrame()
    if commits.is_empty() or wanted.is_empty():
        raise UpstreamError(f"no clip of {frames} frames is encoded: make 'latents' first")
    addresses = commits.filter(pl.col("status") == "ok").select("row_id", "batch", "part", "shard", "slot", "crc32c")
    stored = wanted.join(addresses, on=["row_id", "batch"]).unique("row_id", keep="first")
    return stored.sort(pl.col("split") != "test", "row_id").head(most)


def _make(project: Project, run: Run, folder: str) -> None:
    trainset = Trainset.open(project.root, run.trainset)
    device = device_of(project.corpus.encoding.device)
    scene = _scene(project, run, trainset, device)
    model = load_trained(run, device).model
    visible = _visible(project, run)
    masked = {name: _masked(model, scene, bits, device) for name, bits in visible.items()}
    everything = np.ones(run.recipe.model.cells, bool)
    densities = {
        "all_cells": everything,
        **({"training_cells": next(iter(visible.values()))} if run.recipe.masks.keep != "all" else {}),
    }
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


def _scene(project: Project, run: Run, trainset: Trainset, device: str) -> Scene:
    encoding = project.corpus.encoding
    autoencoder = Autoencoder.load(encoding.autoencoder, device, encoding.precision)
    if autoencoder.digest != trainset.spec.autoencoder:
        raise RefusedError(
            f"run {run.id} was trained on latents of autoencoder {trainset.spec.autoencoder}, and "
            f"{encoding.autoencoder} holds {autoencoder.digest}: put the old weights back"
        )
    frames = run.recipe.clip_lengths[0]
    rows = choose_clips(project, trainset, frames)
    source = LatentSource(project.root, trainset, run.recipe, rows["batch"].unique().sort().to_list(), frames)
    latents = source.inputs(rows).to(device)
    bare = Scene(rows, latents, source, autoencoder, np.empty(0, np.uint8))
    return Scene(rows, latents, source, autoencoder, bare.frames(latents))


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


@dataclass(frozen=True)
class Generated:
    """Frames of a way to generate, and its numbers."""

    frames: np.ndarray  # [B, F, R, R, 3]
    numbers: Mapping[str, float]


def _masked(model: NExTVid, scene: Scene, visible: np.ndarray, device: str) -> Generated:
    """Teacher forcing; copying repeats the last true frame before each tubelet."""
    cells = _cells(visible, len(scene.latents), device)
    latents = generate_masked(model, scene.latents, cells, _noise(device))
    mean = generate_masked(model, scene.latents, cells, _noise(device), steps=1)
    tubelet = model.recipe.model.tubelet
    before = np.arange(scene.latents.shape[1]) // tubelet * tubelet - 1
    return _compared(scene, latents, mean, before.clip(0), tubelet)


def _onward(model: NExTVid, scene: Scene, visible: np.ndarray, device: str) -> Generated:
    """From the first tubelet on; copying repeats the seed's last frame to the end."""
    cells = _cells(visible, len(scene.latents), device)
    tubelet = model.recipe.model.tubelet
    seed, count = scene.latents[:, :tubelet], scene.latents.shape[1] // tubelet
    latents = generate_onward(model, seed, count, cells, _noise(device))
    mean = generate_onward(model, seed, count, cells, _noise(device), steps=1)
    return _compared(scene, latents, mean, np.full(scene.latents.shape[1], tubelet - 1), tubelet)


def _compared(scene: Scene, latents: Tensor, mean: Tensor, copied: np.ndarray, tubelet: int) -> Generated:
    """Numbers over tubelets 1..T-1; `copied` is the frame that copying puts in place of each."""
    frames, truth = scene.frames(latents), scene.truth
    asked = slice(tubelet, None)
    target, copy = scene.latents[:, asked], scene.latents[:, torch.from_numpy(copied)][:, asked]
    return Generated(
        frames,
        {
            "psnr_db": psnr_db(frames[:, asked], truth[:, asked]),
            "one_step_psnr_db": psnr_db(scene.frames(mean)[:, asked], truth[:, asked]),
            "copy_last_psnr_db": psnr_db(truth[:, copied][:, asked], truth[:, asked]),
            "one_step_latent_mse": float((mean[:, asked] - target).square().mean()),
            "copy_last_latent_mse": float((copy - target).square().mean()),
        },
    )


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
    """Source, reconstruction, and for each way to generate its input (where cells are hidden) and its frames."""
    clips = []
    for index, source in enumerate(sources):
        strips = [source, Strip("reconstruction", scene.truth[index])]
        for name, found in generated.items():
            if name in visible:
                hidden = hide(scene.truth[index], visible[name], grid_of(run.recipe.model))
                strips.append(Strip(f"input,\n{name} mask", hidden))
            strips.append(
                Strip(
                    "generated" if name in visible else f"from tubelet 0,\n{name.replace('_', ' ')}",
                    found.frames[index],
                )
            )
        clips.append(strips)
    return filmstrips(clips)


def _cells(visible: np.ndarray, clips: int, device: str) -> Tensor:
    return torch.from_numpy(np.flatnonzero(visible)).to(device).expand(clips, -1)


def _noise(device: str) -> torch.Generator:
    """The same noise for everything that is compared."""
    return torch.Generator(device).manual_seed(SEED)


def picture_titles(said: Mapping[str, Any]) -> dict[str, str]:
    """What the two pictures show, for captions."""
    return {
        "masked": f"visible cells of real tubelets in, the next tubelet out; {said['ode_steps']} Euler steps",
        "autoregressive": f"tubelet 0 in, all others generated one by one; {said['ode_steps']} Euler steps",
    }
