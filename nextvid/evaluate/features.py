"""Rows of the latent store as encoder features: whole clips, all cells visible, frame-causal, evaluation mode.

Holds the way from committed rows to tokens: read, normalise by the trainset's statistics, repeat images, fold, encode.
Holds no probe and no choice of rows. Features of the segments of a sample stand one after the other along tokens, never
averaged (trap 31 of method.md 13).

Axes: N samples, G segments of a sample, B clips of a batch, F frames, C channels, h and w cells of the store,
T tubelets, S cells of the model, D width; L = T S tokens of a segment, N of a clip, i numbers in a token.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import polars as pl
import torch
from einops import rearrange
from jaxtyping import Float, Float16, Float32
from torch import Tensor

from nextvid.config.recipe import RecipeConfig
from nextvid.model.encoder import Encoder
from nextvid.model.tokens import denormalise, depth_to_space, latent_tokens, normalise, space_to_depth
from nextvid.train.step import autocast
from nextvid.trainset.trainset import Trainset
from storage.reader import addresses, open_reader
from storage.root import DataRoot

CLIPS_AT_ONCE = 16  # measured on the demo encoder, one thread: 6.8 ms a clip against 7.9 for 8, 8.0 for 32, 8.5 for 64


class Source(Protocol):
    """Where encoder input comes from: stored latents, or stored pixels (pixel_source.py)."""

    def tokens(self, rows: pl.DataFrame) -> Float[Tensor, "B N i"]:
        """What the encoder reads of these rows, in order."""

    def close(self) -> None:
        """Close files."""


class LatentSource:
    """Reads committed rows of one encoding spec, in any order; normalises as training does.

    `batches` are those that rows may come from. `frames` is what images are repeated to. Close it when done.
    """

    def __init__(
        self, root: DataRoot, trainset: Trainset, recipe: RecipeConfig, batches: Sequence[str], frames: int
    ) -> None:
        self._spec, self._batches, self._frames = trainset.spec, list(batches), frames
        self._reader = open_reader(root, trainset.spec, self._batches)
        self._mean, self._std = (torch.from_numpy(np.asarray(v, np.float32)) for v in (trainset.mean, trainset.std))
        self._fold = trainset.spec.width // recipe.model.grid_width
        self._tubelet = recipe.model.tubelet

    def latents(self, rows: pl.DataFrame) -> Float16[np.ndarray, "B F C h w"]:
        """Raw latents of rows, in order, as stored; images repeated. Raises DamagedError."""
        spec = self._spec
        out = np.empty((rows.height, self._frames, spec.channels, spec.height, spec.width), np.float16)
        found = addresses(rows, self._batches)
        for frames in rows["frames"].unique().to_list():
            self._reader.will_need(frames, found[(rows["frames"] == frames).to_numpy()])
        for row, frames, address in zip(out, rows["frames"], found, strict=True):
            self._reader.read_into(frames, address, row[:frames])
            if frames == 1:
                row[1:] = row[0]
        return out

    def inputs(self, rows: pl.DataFrame) -> Float[Tensor, "B F C2 h w"]:
        """Normalised latents of rows on the model's grid."""
        normalised = normalise(torch.from_numpy(self.latents(rows)).float(), self._mean, self._std)
        return space_to_depth(normalised, self._fold) if self._fold > 1 else normalised

    def tokens(self, rows: pl.DataFrame) -> Float[Tensor, "B N i"]:
        """What the encoder reads of these rows."""
        return latent_tokens(self.inputs(rows), self._tubelet)

    def pictures(self, tokens: Float[Tensor, "B F C2 h w"]) -> Float32[np.ndarray, "B F C h w"]:
        """The inverse of `inputs`: raw latents for the autoencoder's decoder."""
        unfolded = depth_to_space(tokens, self._fold) if self._fold > 1 else tokens
        return denormalise(unfolded.float().cpu(), self._mean, self._std).numpy()

    def close(self) -> None:
        """Close the reader's files."""
        self._reader.close()


@torch.inference_mode()
def encode(
    encoder: Encoder, recipe: RecipeConfig, tokens: Float[Tensor, "B N i"], device: str = "cpu"
) -> Float[Tensor, "B L D"]:
    """Features of whole clips after the encoder's final norm, float32."""
    with autocast(recipe, torch.device(device)):
        return encoder(tokens.to(device), tokens.shape[1] // recipe.model.cells).float()


def features(
    encoder: Encoder,
    recipe: RecipeConfig,
    source: Source,
    rows: pl.DataFrame,
    segments: int = 1,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Float[np.ndarray, "N G*L D"]:
    """Features of samples, in order; `rows` are sorted by (sample, segment), `segments` rows a sample."""
    pieces = []
    for first in range(0, rows.height, CLIPS_AT_ONCE):
        tokens = source.tokens(rows.slice(first, CLIPS_AT_ONCE))
        pieces.append(encode(encoder, recipe, tokens, device).cpu().numpy())
        if progress is not None:
            progress(min(first + CLIPS_AT_ONCE, rows.height), rows.height)
    return rearrange(np.concatenate(pieces), "(n g) l d -> n (g l) d", g=segments)
