"""Exported encoders with random weights: of latents, with or without their autoencoder, and of pixels."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL

from nextvid.config.overrides import apply_overrides
from nextvid.config.project import Project
from nextvid.encode.weights import autoencoder_digest
from nextvid.train.export import export_encoder
from nextvid.train.run import Run, plan_run
from nextvid.train.step import build_model
from nextvid.trainset.trainset import Trainset
from storage.spec import EncodingSpec
from tests.nextvid.train.corpus import make_project
from tests.nextvid.train.test_pixel_rows import PIXELS_IN
from tests.nextvid.train.tiny import CHANNELS, GRID, HOW, tiny_recipe


def tiny_run(project: Project, overrides: tuple[str, ...] = ()) -> Run:
    """A run of the tiny recipe that is never trained."""
    recipe = apply_overrides(tiny_recipe(), overrides)
    return plan_run(project.root, recipe, HOW, Trainset.open(project.root).digest, "b" * 32, 0, ())


def export(project: Project, folder: Path, autoencoder: Path | None = None, overrides: tuple[str, ...] = ()) -> Path:
    """Export an untrained encoder, as a run's end does."""
    run = tiny_run(project, overrides)
    encoding = project.corpus.encoding.model_copy(update={"autoencoder": str(autoencoder or "none")})
    corpus = project.corpus.model_copy(update={"encoding": encoding})
    torch.manual_seed(0)
    export_encoder(folder, build_model(run.recipe).encoder, Trainset.open(project.root), run, corpus)
    return folder


def export_of_pixels(folder: Path) -> Path:
    """An encoder of frames of 32 pixels a side, clips of 4 frames at 4 a second, in `folder`/encoder."""
    return export(make_project(folder), folder / "encoder", overrides=PIXELS_IN)


def export_with_autoencoder(folder: Path) -> Path:
    """An encoder of latents that carries the autoencoder of `tiny_autoencoder`, in `folder`/encoder."""
    source = tiny_autoencoder(folder / "autoencoder")
    spec = EncodingSpec(
        autoencoder_digest(source), 8 * GRID, "bicubic", "fp32", "mean", "float16", CHANNELS, GRID, GRID
    )
    return export(make_project(folder, spec=spec), folder / "encoder", source)


def tiny_autoencoder(folder: Path) -> Path:
    """Stride 8 and four channels, untrained."""
    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=4,
    ).save_pretrained(folder, safe_serialization=True)
    return folder
