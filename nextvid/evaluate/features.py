"""Features of committed rows by a run's frozen encoders: stored latents or pixels in, tokens out.

Encoders see whole clips, all cells, frame-causally, in evaluation mode. Three of a run are compared: the averaged one
(EMA), the online one and a random twin with the recipe, input and seed of the run, because random features of different
initialisations and inputs differ by more than training gains (.15 to .47 accuracy: docs/demo.md). Segments of a sample
follow one another along tokens, never averaged (trap 31 of docs/method.md 13).

Axes: N samples, G segments of a sample, B clips of a batch, F frames, C channels, h and w cells of the store,
H W pixels, T tubelets, S cells of the model, D width; L = T S tokens of a segment, N of a clip, i numbers in a token.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
import torch
from einops import rearrange
from jaxtyping import Float, Float16, Float32, UInt8
from torch import Tensor

from nextvid.config.benchmarks import Augmentation
from nextvid.config.recipe import RecipeConfig
from nextvid.evaluate.augment import augmented
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
from nextvid.train.run import Run
from nextvid.train.step import autocast, build_model
from nextvid.trainset.trainset import Trainset
from storage.reader import PixelReader, RowReader, addresses, open_reader, pixel_addresses
from storage.root import DataRoot
from storage.spec import PixelSpec
from storage.store import PixelStore

EncoderName = Literal["ema", "online", "random"]
CLIPS_AT_ONCE = 16  # measured on the demo encoder, one thread: 6.8 ms a clip against 7.9 for 8, 8.0 for 32, 8.5 for 64


@dataclass(frozen=True)
class Networks:
    """The networks of a run's last checkpoint, frozen, in evaluation mode."""

    model: NExTVid
    encoders: Mapping[EncoderName, Encoder]
    checkpoint: Path


def load_networks(run: Run, device: str = "cpu") -> Networks:
    """The networks of a complete run, on a device."""
    model = build_model(run.recipe)
    random = reference_encoder(model.encoder)
    ema = reference_encoder(model.encoder)
    path = checkpoint.complete(run.checkpoints)[-1]
    checkpoint.load(path, run.identity, model, ema)
    frozen = model.eval().requires_grad_(False).to(device)
    return Networks(frozen, {"ema": ema.to(device), "online": frozen.encoder, "random": random.to(device)}, path)


class LatentSource:
    """Committed rows of one encoding spec, in any order, normalised as in training.

    `batches` are those that rows may come from. Images are repeated to `frames`. Close it when done.
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
        _read_into(self._reader, rows, addresses(rows, self._batches), out)
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


class PixelSource:
    """Committed rows of one pixel spec, in any order; `batches`, `frames` and closing as in LatentSource."""

    def __init__(
        self, root: DataRoot, spec: PixelSpec, recipe: RecipeConfig, batches: Sequence[str], frames: int
    ) -> None:
        self._spec, self._model, self._batches, self._frames = spec, recipe.model, list(batches), frames
        self._reader = PixelReader(root, spec, self._batches)
        store = PixelStore(root, spec)
        commits = pl.concat([store.commits(batch) for batch in self._batches])
        self._commits = commits.filter(pl.col("status") == "ok")

    def pixels(self, rows: pl.DataFrame) -> UInt8[np.ndarray, "B F H W 3"]:
        """Frames of rows (columns row_id, batch, frames), in order; images repeated. Raises DamagedError."""
        stored = rows.select("row_id", "batch").join(
            self._commits, on=["row_id", "batch"], how="inner", maintain_order="left"
        )
        assert stored.height == rows.height, "rows without pixels were not left out"
        out = np.empty((rows.height, *self._spec.row_shape(self._frames)), np.uint8)
        _read_into(self._reader, rows, pixel_addresses(stored, self._batches), out)
        return out

    def tokens(self, rows: pl.DataFrame) -> Float[Tensor, "B N i"]:
        """What the encoder reads of these rows."""
        return self.folded(self.pixels(rows))

    def folded(self, pixels: UInt8[np.ndarray, "B F H W 3"]) -> Float[Tensor, "B N i"]:
        """What the encoder reads of these frames."""
        return pixel_tokens(pixel_values(torch.from_numpy(pixels)), self._model.patch, self._model.tubelet)

    def close(self) -> None:
        """Close the reader's files."""
        self._reader.close()


@dataclass(frozen=True)
class Augmented:
    """The rows of a source as they are varied in one epoch of training probes (augment.py)."""

    source: PixelSource
    kind: Augmentation
    seed: int
    epoch: int

    def tokens(self, rows: pl.DataFrame) -> Float[Tensor, "B N i"]:
        """What the encoder reads of these rows in this epoch."""

        def vary(clip: UInt8[np.ndarray, "F H W 3"], row: bytes) -> UInt8[np.ndarray, "F H W 3"]:
            return augmented(clip, self.kind, self.seed, self.epoch, row)

        with ThreadPoolExecutor() as threads:  # PIL releases the interpreter's lock
            varied = list(threads.map(vary, self.source.pixels(rows), rows["row_id"]))
        return self.source.folded(np.stack(varied))


Source = LatentSource | PixelSource | Augmented  # where encoder input comes from


def _read_into(reader: RowReader | PixelReader, rows: pl.DataFrame, places: np.ndarray, out: np.ndarray) -> None:
    """Read rows (column `frames`) at their addresses into `out`, announced by length; images are repeated."""
    lengths = rows["frames"].to_numpy()
    for frames in np.unique(lengths).tolist():
        reader.will_need(frames, places[lengths == frames])
    for row, frames, address in zip(out, lengths.tolist(), places, strict=True):
        reader.read_into(frames, address, row[:frames])
        if frames == 1:
            row[1:] = row[0]


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
) -> Float[np.ndarray, "N G*L D"]:
    """Features of samples, in order; `rows` are sorted by (sample, segment), `segments` rows a sample."""
    pieces = []
    for first in range(0, rows.height, CLIPS_AT_ONCE):
        tokens = source.tokens(rows.slice(first, CLIPS_AT_ONCE))
        pieces.append(encode(encoder, recipe, tokens, device).cpu().numpy())
    return rearrange(np.concatenate(pieces), "(n g) l d -> n (g l) d", g=segments)
