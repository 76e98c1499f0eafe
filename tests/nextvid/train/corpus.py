"""A project whose latents are random numbers: store, trainset and corpus.yaml written by hand, in milliseconds."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import numpy as np
import torch

from nextvid.config.project import Project, open_project
from nextvid.config.recipe import ExecutionConfig, RecipeConfig
from nextvid.train.distributed import Ranks
from nextvid.train.loader import Loader, open_loader
from nextvid.train.loop import train
from nextvid.train.run import Run, open_run, plan_run, write_run
from nextvid.trainset.mask_plan import grid_of, make_plan, open_mask_plan, plan_digest
from nextvid.trainset.pixels import TrainsetPixels
from nextvid.trainset.trainset import Trainset
from storage.digest import digest
from storage.root import DataRoot
from storage.schemas import Lineage
from storage.spec import EncodingSpec
from storage.store import LatentStore
from tests.factories import publish_trainset, put_latents, table, write_project
from tests.nextvid.train.tiny import ALONE, CHANNELS, GRID, HOW, tiny_recipe

BATCHES = ("films.000000", "pictures.000000")
ROWS = {"films.000000": {4: 9, 8: 5}, "pictures.000000": {1: 7}}  # rows by frames
WEIGHTS = {"films": 0.75, "pictures": 0.25}
MEAN = np.arange(CHANNELS, dtype=np.float32)
STD = 1.0 + np.arange(CHANNELS, dtype=np.float32) / 2


def tiny_spec(height: int = GRID, channels: int = CHANNELS) -> EncodingSpec:
    """Latents of the tiny recipe's grid."""
    return EncodingSpec("0" * 32, 8 * height, "bicubic", "fp32", "mean", "float16", channels, height, height)


def make_project(folder: Path, seed: int = 0, spec: EncodingSpec | None = None) -> Project:
    """A project with one trainset, `latest`: clips of 4 and 8 frames in `films`, images in `pictures`."""
    datasets = {name: {"uri": name, "weight": w, "clips": [{"frames": 4, "fps": 4}]} for name, w in WEIGHTS.items()}
    encoding = {"autoencoder": "none", "resolution": 32}
    project = write_project(folder, datasets, root="data", encoding=encoding)
    write_trainset(project.root, spec or tiny_spec(), seed)
    return project


def write_trainset(root: DataRoot, spec: EncodingSpec, seed: int = 0) -> str:
    """Random latents around the statistics in the store, and a trainset of them all; its digest."""
    store, rng, lineage = LatentStore(root, spec), np.random.default_rng(seed), []
    mean, std = np.resize(MEAN, spec.channels), np.resize(STD, spec.channels)
    for batch, lengths in ROWS.items():
        for frames, count in lengths.items():
            rows = [bytes.fromhex(digest([seed, batch, frames, row])) for row in range(count)]
            noise = rng.standard_normal((count, *spec.row_shape(frames)))
            latents = (mean[:, None, None] + std[:, None, None] * noise).astype(np.float32)
            put_latents(store, batch, frames, dict(zip(rows, latents, strict=True)))
            lineage += [
                dict.fromkeys(("row_id", "clip_id", "shot_id", "media_id"), row)
                | {"frames": frames, "batch": batch, "dataset": batch.split(".")[0]}
                for row in rows
            ]
    return publish_trainset(store, table(Lineage, lineage, uri="/nowhere"), WEIGHTS, mean.tolist(), std.tolist())


@contextmanager
def loading(
    project: Project, recipe: RecipeConfig, ranks: Ranks = ALONE, pixels: TrainsetPixels | None = None
) -> Iterator[Loader]:
    """The loader of the latest trainset under the recipe's mask plan, which is made where it is missing."""
    make_plan(project.root, recipe)
    plan = open_mask_plan(project.root, recipe.masks, grid_of(recipe.model))
    with open_loader(project.root, Trainset.open(project.root), recipe, plan, ranks, pixels) as loader:
        yield loader


def begin(
    project: Project,
    recipe: RecipeConfig | None = None,
    how: ExecutionConfig = HOW,
    repeat: int = 0,
    pixels: str | None = None,
) -> Run:
    """A run with its config.json and its mask plan; `pixels` is the digest of frozen ones."""
    recipe = recipe or tiny_recipe()
    make_plan(project.root, recipe)
    plan = plan_digest(recipe.masks, grid_of(recipe.model))
    trainset = Trainset.open(project.root).digest
    run = plan_run(project.root, recipe, how, trainset, plan, repeat, (), pixels)
    write_run(run)
    return run


def carry_on(corpus: str, folder: str) -> None:
    """Train a run to its end, in a process of its own."""
    torch.set_num_threads(1)  # bits depend on their number
    with redirect_stdout(sys.stderr):  # its own is the parent's answers (tests/forked.py)
        train(open_project(corpus), open_run(Path(folder)), ALONE)
