"""What generation starts from and is compared with: clips of the store, their reconstructions, PSNR beside copying.

Holds the choice of clips and the numbers. Generates nothing and writes nothing. PSNR is against the autoencoder's own
reconstruction of the same clip, over tubelets 1..T-1, so that the autoencoder's error counts for nobody.

Axes: B clips, F frames, C channels, h and w cells of the grid, R pixels a side.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from einops import rearrange
from torch import Tensor

from nextvid.corpus.project import Project
from nextvid.corpus.trainset import Trainset
from nextvid.encode.autoencoders import Autoencoder
from nextvid.probe.features import LatentSource
from nextvid.sample.filmstrips import psnr_db
from nextvid.train.run import Run
from storage import tables
from storage.errors import RefusedError, UpstreamError
from storage.latents import LatentStore
from storage.schemas import Clips

CLIPS = 16  # clips that numbers are taken over: our choice


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


@dataclass(frozen=True)
class Generated:
    """Frames of a way to generate, and its numbers."""

    frames: np.ndarray  # [B, F, R, R, 3]
    numbers: Mapping[str, float]


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


def open_scene(project: Project, run: Run, trainset: Trainset, device: str) -> Scene:
    """Clips of the run's length with their reconstructions. Raises RefusedError for another autoencoder."""
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


def compared(scene: Scene, latents: Tensor, mean: Tensor, copied: np.ndarray, tubelet: int) -> Generated:
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
