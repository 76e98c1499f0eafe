"""Rows of the pixel store as encoder input, for probes of recipes that were trained on pixels.

The counterpart of LatentSource (features.py): committed rows in any order, images repeated, as training sees them.
Clips that probes learn from are varied by `Augmented`; those that they are judged on never are. Opens no video.

Axes: B clips, F frames, H W pixels, N tokens, i numbers in a token.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import polars as pl
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from nextvid.config.recipe import RecipeConfig
from nextvid.evaluate.augment import Kind, augmented
from nextvid.model.tokens import pixel_tokens, pixel_values
from storage.pixel_reader import PixelReader, pixel_addresses
from storage.pixels import PixelSpec, PixelStore
from storage.root import DataRoot


class PixelSource:
    """Reads committed rows of one pixel spec. `batches`, `frames` and closing are as LatentSource has them."""

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
        lengths, addresses = rows["frames"].to_numpy(), pixel_addresses(stored, self._batches)
        for frames in np.unique(lengths).tolist():
            self._reader.will_need(frames, addresses[lengths == frames])
        for row, frames, address in zip(out, lengths.tolist(), addresses, strict=True):
            self._reader.read_into(frames, address, row[:frames])
            if frames == 1:
                row[1:] = row[0]
        return out

    def tokens(self, rows: pl.DataFrame) -> Float[Tensor, "B N i"]:
        """What the encoder reads of these rows."""
        return self.tokens_of(self.pixels(rows))

    def tokens_of(self, pixels: UInt8[np.ndarray, "B F H W 3"]) -> Float[Tensor, "B N i"]:
        """What the encoder reads of these frames."""
        return pixel_tokens(pixel_values(torch.from_numpy(pixels)), self._model.patch, self._model.tubelet)

    def close(self) -> None:
        """Close the reader's files."""
        self._reader.close()


class Augmented:
    """The same rows as an epoch of training sees them (augment.py). The source stays whose it is."""

    def __init__(self, source: PixelSource, kind: Kind, seed: int, epoch: int) -> None:
        self._source, self._kind, self._seed, self._epoch = source, kind, seed, epoch

    def tokens(self, rows: pl.DataFrame) -> Float[Tensor, "B N i"]:
        """What the encoder reads of these rows in this epoch."""

        def vary(clip: UInt8[np.ndarray, "F H W 3"], row: bytes) -> UInt8[np.ndarray, "F H W 3"]:
            return augmented(clip, self._kind, self._seed, self._epoch, row)

        with ThreadPoolExecutor() as threads:  # PIL works without the interpreter's lock
            varied = list(threads.map(vary, self._source.pixels(rows), rows["row_id"]))
        return self._source.tokens_of(np.stack(varied))

    def close(self) -> None:
        """Nothing of its own is open."""
