"""Stored clips that generation starts from, their reconstructions, and the PSNR of generated frames beside copying.

PSNR is against the autoencoder's own reconstruction of the same clip, over tubelets 1..T-1, so that the autoencoder's
error is in no number. Encoders of pixels read that reconstruction too, as they do of generated tubelets.

Axes: B clips, F frames, C channels, h and w cells of the grid, R pixels a side, N tokens, i numbers in a token.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from einops import rearrange
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from nextvid.config.project import Project
from nextvid.config.recipe import RecipeConfig
from nextvid.encode.autoencoders import Autoencoder
from nextvid.encode.roundtrip import psnr_db
from nextvid.evaluate.features import LatentSource
from nextvid.making.batches import dataset_of
from nextvid.model.tokens import depth_to_space, latent_tokens, pixel_bytes, pixel_tokens, pixel_values, space_to_depth
from nextvid.train.run import Run
from nextvid.trainset.trainset import Trainset
from storage import tables
from storage.errors import RefusedError, UpstreamError
from storage.schemas import Clips
from storage.store import LatentStore

CLIPS = 16  # clips that numbers are taken over: our choice


@dataclass(frozen=True)
class Scene:
    """Clips that generation starts from, and their reconstructions, which its results are compared with."""

    recipe: RecipeConfig
    rows: pl.DataFrame
    targets: Float[Tensor, "B F C h w"]  # normalised as in training
    source: LatentSource
    autoencoder: Autoencoder
    truth: UInt8[np.ndarray, "B F R R 3"]  # reconstructions

    def tokens(self) -> Float[Tensor, "B N i"]:
        """What the encoder reads of whole clips."""
        model = self.recipe.model
        if model.encoder.input == "latents":
            return latent_tokens(self.targets, model.tubelet)
        pixels = pixel_values(torch.from_numpy(self.truth).to(self.targets.device))
        return pixel_tokens(pixels, model.patch, model.tubelet)

    def decode(self, targets: Float[Tensor, "B F C h w"]) -> UInt8[Tensor, "B F R R 3"]:
        """Frames of normalised targets, on their device."""
        if self.recipe.losses.target == "pixels":
            return pixel_bytes(depth_to_space(targets, self.recipe.model.patch))
        return torch.from_numpy(decoded(self.autoencoder, self.source.pictures(targets))).to(targets.device)

    def frames(self, targets: Float[Tensor, "B F C h w"]) -> UInt8[np.ndarray, "B F R R 3"]:
        """Frames of normalised targets, for pictures and PSNR."""
        return self.decode(targets).cpu().numpy()


def decoded(autoencoder: Autoencoder, latents: Float32[np.ndarray, "B F C h w"]) -> UInt8[np.ndarray, "B F R R 3"]:
    """Frames of raw latents."""
    flat = autoencoder.decode(rearrange(latents, "b f c h w -> (b f) c h w"))
    return rearrange(flat, "(b f) ... -> b f ...", b=len(latents))


@dataclass(frozen=True)
class Generated:
    """Frames of one way to generate, and its numbers."""

    frames: UInt8[np.ndarray, "B F R R 3"]  # tubelet 0 is the given one
    numbers: Mapping[str, float]


def choose_clips(project: Project, trainset: Trainset, frames: int, most: int = CLIPS) -> pl.DataFrame:
    """Committed clips of a length with their addresses: of test files, else of any, the first by row id."""
    batches = [name for name in project.root.batches("clips") if dataset_of(name) in trainset.weights]
    clips = tables.read_tables(project.root, "clips", batches, Clips)
    of_length = clips.filter((pl.col("status") == "ok") & (pl.col("frames") == frames))
    store = LatentStore(project.root, trainset.spec)
    commits = pl.concat([store.commits(batch, frames) for batch in batches]) if batches else pl.DataFrame()
    if commits.is_empty() or of_length.is_empty():
        raise UpstreamError(f"no clip of {frames} frames is encoded: make 'latents' first")
    addresses = commits.filter(pl.col("status") == "ok").select("row_id", "batch", "part", "shard", "slot", "crc32c")
    stored = of_length.join(addresses, on=["row_id", "batch"]).unique("row_id", keep="first")
    return stored.sort(pl.col("split") != "test", "row_id").head(most)


def open_scene(project: Project, run: Run, trainset: Trainset, device: str) -> Scene:
    """Clips of the run's length with their reconstructions.

    Raises RefusedError for another autoencoder, and for targets that cannot be decoded to pictures.
    """
    recipe, encoding = run.recipe, project.corpus.encoding
    if recipe.losses.target not in ("latents", "pixels"):
        raise RefusedError(
            f"recipe {recipe.name} predicts {recipe.losses.target}, which cannot be decoded to pictures: samples "
            "need a recipe whose losses.target is 'latents' or 'pixels'"
        )
    autoencoder = Autoencoder.load(encoding.autoencoder, device, encoding.precision)
    if autoencoder.digest != trainset.spec.autoencoder:
        raise RefusedError(
            f"run {run.id} was trained on latents of autoencoder {trainset.spec.autoencoder}, but "
            f"{encoding.autoencoder} has {autoencoder.digest}: restore the weights of that autoencoder"
        )
    frames = recipe.clip_lengths[0]
    rows = choose_clips(project, trainset, frames)
    source = LatentSource(project.root, trainset, recipe, rows["batch"].unique().sort().to_list(), frames)
    truth = decoded(autoencoder, source.latents(rows).astype(np.float32))
    if recipe.losses.target == "pixels":
        targets = space_to_depth(pixel_values(torch.from_numpy(truth)), recipe.model.patch)
    else:
        targets = source.inputs(rows)
    return Scene(recipe, rows, targets.to(device), source, autoencoder, truth)


def compared(
    scene: Scene, generated: Float[Tensor, "B F C h w"], mean: Float[Tensor, "B F C h w"], copied: np.ndarray
) -> Generated:
    """Numbers over tubelets 1..T-1, as `generated` and `mean` have them; `copied` are the frames to copy."""
    truth, tubelet = scene.truth, scene.recipe.model.tubelet
    later = slice(tubelet, None)
    target, copy = scene.targets[:, later], scene.targets[:, torch.from_numpy(copied)][:, later]
    frames = scene.frames(generated)
    return Generated(
        np.concatenate([truth[:, :tubelet], frames], axis=1),
        {
            "psnr_db": psnr_db(frames, truth[:, later]),
            "one_step_psnr_db": psnr_db(scene.frames(mean), truth[:, later]),
            "copy_last_psnr_db": psnr_db(truth[:, copied][:, later], truth[:, later]),
            "one_step_latent_mse": float((mean - target).square().mean()),
            "copy_last_latent_mse": float((copy - target).square().mean()),
        },
    )
