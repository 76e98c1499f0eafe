"""Frozen encoders to probe, and those of a run; and stored latents, read in any order, for scenes.

Encoders see whole clips, all cells, in evaluation mode. Three of a run are compared: the averaged one (EMA), the online
one and a random twin with the recipe, input and seed of the run, because random features of different initialisations
and inputs differ by more than training gains (.15 to .47 accuracy: docs/demo.md).

Axes: B clips of a batch, F frames, C channels, h and w cells of the store, H W pixels, D width, L tokens of a clip.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
import torch
from jaxtyping import Float, Float16, Float32, UInt8
from torch import Tensor, nn

from nextvid.config.recipe import RecipeConfig
from nextvid.model.encoder import Encoder
from nextvid.model.nextvid import NExTVid
from nextvid.model.reference import reference_encoder
from nextvid.model.tokens import (
    denormalise,
    depth_to_space,
    latent_tokens,
    normalise,
    pixel_tokens,
    pixel_values,
    space_to_depth,
)
from nextvid.train import checkpoint
from nextvid.train.loader import RowKind
from nextvid.train.run import Run, find_checkpoint
from nextvid.train.step import autocast, build_model
from nextvid.trainset.order import fold
from nextvid.trainset.trainset import Trainset
from storage.errors import RefusedError
from storage.reader import addresses, open_reader
from storage.root import DataRoot

EncoderName = Literal["ema", "online", "random"]
Input = Float[Tensor, "B F C h w"] | UInt8[Tensor, "B F H W 3"]


@dataclass(frozen=True)
class Parts:
    """The network of an encoder, and what it calls its list of blocks and its last norm: what fine-tuning trains."""

    module: nn.Module
    blocks: str
    norm: str


@dataclass(frozen=True)
class FrozenEncoder:
    """A frozen encoder to probe, a run's or another's: what it reads, and how features are made of it.

    `encode` gets a batch on the device that the encoder is on: latents, normalised by the trainset's statistics and
    folded by `fold`, or pixels as stored, RGB bytes. An image is repeated to `frames`. Of the L tokens that it returns,
    each of the `levels` (docs/method.md 9) has an equal part, and in it each of the `times`, in their order. Gradients
    reach the weights of its `parts` where they ask for them; a floor has none.
    """

    name: str
    reads: RowKind
    frames: int  # of the clips that it is given
    width: int
    times: int
    encode: Callable[[Input], Float[Tensor, "B L D"]]
    levels: int = 1
    fold: int = 1  # store cells per side of a cell of the model's grid
    parts: Parts | None = None


@dataclass(frozen=True)
class Networks:
    """The networks of a run at one checkpoint, frozen, in evaluation mode."""

    model: NExTVid
    encoders: Mapping[EncoderName, Encoder]
    checkpoint: Path


def load_networks(run: Run, device: str = "cpu", path: Path | None = None) -> Networks:
    """The networks of a run's checkpoint, the newest unless named, on a device."""
    model = build_model(run.recipe)
    random = reference_encoder(model.encoder)
    ema = reference_encoder(model.encoder)
    path = path or find_checkpoint(run)
    checkpoint.load(path, run.identity, model, ema)
    frozen = model.eval().requires_grad_(False).to(device)
    return Networks(frozen, {"ema": ema.to(device), "online": frozen.encoder, "random": random.to(device)}, path)


def run_encoders(
    networks: Networks, trainset: Trainset, frames: int, levels: Sequence[int] = ()
) -> list[FrozenEncoder]:
    """A run's encoders on clips of `frames` frames. `levels`: blocks whose outputs are taken, by index; else the last.

    Raises RefusedError where the latents have another shape than the model.
    """
    recipe = networks.model.recipe
    return [frozen(name, encoder, recipe, trainset, frames, levels) for name, encoder in networks.encoders.items()]


def frozen(
    name: str, encoder: Encoder, recipe: RecipeConfig, trainset: Trainset, frames: int, levels: Sequence[int] = ()
) -> FrozenEncoder:
    """An encoder of a recipe, as `run_encoders` gives them."""
    reads: RowKind = recipe.model.encoder.input
    return FrozenEncoder(
        name,
        reads,
        frames,
        recipe.model.encoder.width,
        frames // recipe.model.tubelet,
        partial(encode, encoder, recipe, levels=tuple(levels)),
        max(1, len(levels)),
        fold(trainset, recipe) if reads == "latents" else 1,
        Parts(encoder, "blocks", "norm"),
    )


def level_blocks(depth: int, levels: int) -> tuple[int, ...]:
    """Blocks, by index, whose outputs a probe reads: the last, and others at V-JEPA 2's distance (docs/method.md 9).

    Raises RefusedError where the encoder has fewer blocks.
    """
    if levels > depth:
        raise RefusedError(f"the benchmark reads {levels} levels of an encoder that has {depth} blocks: lower 'levels'")
    step = min(2 if depth == 24 else max(1, depth // 8), depth // levels)  # L, H and G: 2, 4 and 5
    return tuple(depth - 1 - step * level for level in reversed(range(levels)))


def encode(
    encoder: Encoder, recipe: RecipeConfig, given: Input, levels: tuple[int, ...] = ()
) -> Float[Tensor, "B L D"]:
    """Features of whole clips after the encoder's final norm, float32; of several levels one after the other."""
    model = recipe.model
    if model.encoder.input == "latents":
        tokens = latent_tokens(given, model.tubelet)
    else:
        tokens = pixel_tokens(pixel_values(given), model.patch, model.tubelet)
    tubelets = tokens.shape[1] // model.cells
    with autocast(recipe, given.device):
        if levels:
            return torch.cat(encoder.levels(tokens, tubelets, levels), dim=1).float()
        return encoder(tokens, tubelets).float()


class LatentSource:
    """Committed rows of one encoding spec, in any order, normalised as in training: for a few clips.

    `batches` are those that rows may come from. Images are repeated to `frames`. Close it when done.
    """

    def __init__(
        self, root: DataRoot, trainset: Trainset, recipe: RecipeConfig, batches: Sequence[str], frames: int
    ) -> None:
        self._spec, self._batches, self._frames = trainset.spec, list(batches), frames
        self._reader = open_reader(root, trainset.spec, self._batches)
        self._mean, self._std = (torch.from_numpy(np.asarray(v, np.float32)) for v in (trainset.mean, trainset.std))
        self._fold = trainset.spec.width // recipe.model.grid_width

    def latents(self, rows: pl.DataFrame) -> Float16[np.ndarray, "B F C h w"]:
        """Raw latents of rows, in order, as stored; images repeated. Raises DamagedError."""
        spec = self._spec
        out = np.empty((rows.height, self._frames, spec.channels, spec.height, spec.width), np.float16)
        for row, frames, address in zip(out, rows["frames"].to_list(), addresses(rows, self._batches), strict=True):
            self._reader.read_into(frames, address, row[:frames])
            if frames == 1:
                row[1:] = row[0]
        return out

    def inputs(self, rows: pl.DataFrame) -> Float[Tensor, "B F C2 h w"]:
        """Normalised latents of rows on the model's grid."""
        normalised = normalise(torch.from_numpy(self.latents(rows)).float(), self._mean, self._std)
        return space_to_depth(normalised, self._fold) if self._fold > 1 else normalised

    def pictures(self, tokens: Float[Tensor, "B F C2 h w"]) -> Float32[np.ndarray, "B F C h w"]:
        """The inverse of `inputs`: raw latents for the autoencoder's decoder."""
        unfolded = depth_to_space(tokens, self._fold) if self._fold > 1 else tokens
        return denormalise(unfolded.float().cpu(), self._mean, self._std).numpy()

    def close(self) -> None:
        """Close the reader's files."""
        self._reader.close()
