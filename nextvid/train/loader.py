"""From the latent store to tensors of a batch: rows copied into a ring of reused buffers, ahead of the step.

Threads of this process fill buffers from memory maps; statistics, folding and the repetition of images happen on the
device after one copy (design, 5). What is drawn is decided elsewhere (order.py). It keeps no state of its own: batches
from any step on are the same batches. Opens no video.

Axes: B clips, F frames, C channels of the store, h and w its cells.
"""

import collections
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor

from nextvid.config import RecipeConfig
from nextvid.corpus.trainset import Trainset
from nextvid.model.tokens import normalise, space_to_depth
from nextvid.recipes import RECIPES
from nextvid.train.batch import Batch
from nextvid.train.distributed import Ranks
from nextvid.train.mask_plan import OpenedPlan
from nextvid.train.optim import draws_before, stage_at
from nextvid.train.order import Drawn, Masks, Order, first_draws
from storage.errors import RefusedError
from storage.reader import RowReader
from storage.root import DataRoot

__all__ = ["READ_AHEAD", "Loader", "first_draws", "open_loader"]

READ_AHEAD = 4  # batches in flight: our choice; covers a step's jitter at 70 MB a batch of 32 clips (research: store)


@dataclass
class _Buffer:
    """One place of the ring: float16 for the largest share, and the end of the last copy out of it."""

    memory: Tensor
    copied: torch.cuda.Event | None = None


class Loader:
    """Batches of one rank. Use `open_loader`, which closes it."""

    def __init__(
        self, trainset: Trainset, recipe: RecipeConfig, order: Order, masks: Masks, reader: RowReader, ranks: Ranks
    ) -> None:
        self._spec, self._recipe, self._order, self._masks = trainset.spec, recipe, order, masks
        self._reader, self._ranks, self._device = reader, ranks, ranks.device
        self._fold = _fold(trainset, recipe)
        self._mean, self._std = (
            torch.from_numpy(np.array(values, np.float32)).to(ranks.device) for values in (trainset.mean, trainset.std)
        )
        for stage in recipe.stages:
            if stage.batch % ranks.count:
                raise RefusedError(f"stage {stage.name}: batch {stage.batch} is not divisible by {ranks.count} ranks")

    def batches(self, first_step: int, threads: int = 1) -> Iterator[Batch]:
        """Batches of steps first_step..last, in order, read ahead by threads."""
        stages = self._recipe.stages
        largest = max(stage.batch // self._ranks.count * stage.frames for stage in stages)
        ring = collections.deque(self._buffer(largest) for _ in range(READ_AHEAD + 1))
        ahead: collections.deque[tuple[int, list[Drawn], _Buffer, Future[None]]] = collections.deque()
        with ThreadPoolExecutor(threads, thread_name_prefix="loader") as pool:
            for step in range(first_step, self._recipe.steps + READ_AHEAD):
                if step < self._recipe.steps:
                    drawn, buffer = self._share(step), ring.popleft()
                    self._announce(drawn)
                    ahead.append((step, drawn, buffer, pool.submit(self._fill, step, drawn, buffer)))
                if len(ahead) > READ_AHEAD or (step >= self._recipe.steps and ahead):
                    ready, drawn, buffer, filled = ahead.popleft()
                    began = time.perf_counter()
                    filled.result()
                    waited_s = time.perf_counter() - began
                    batch = self._batch(ready, drawn, buffer, waited_s)
                    ring.append(buffer)
                    yield batch

    def clips(self, draws: range) -> Batch:
        """Clips of the first stage by draw number, without masks: the fixed set of the diagnostics."""
        frames = self._recipe.stages[0].frames
        drawn = self._order.drawn(frames, draws.start, len(draws))
        buffer = self._buffer(len(drawn) * frames)
        self._fill(0, drawn, buffer)
        return Batch(0, tuple(draws), self._on_device(self._view(0, len(drawn), buffer), drawn), visible=[])

    def _share(self, step: int) -> list[Drawn]:
        """This rank's contiguous share of the step's draws."""
        stage = self._recipe.stages[stage_at(self._recipe.stages, step)[0]]
        share = stage.batch // self._ranks.count
        first = draws_before(self._recipe.stages, step) + self._ranks.rank * share
        return self._order.drawn(stage.frames, first, share)

    def _announce(self, drawn: Sequence[Drawn]) -> None:
        for frames in {clip.frames for clip in drawn}:
            self._reader.will_need(frames, np.array([clip.address for clip in drawn if clip.frames == frames]))

    def _fill(self, step: int, drawn: Sequence[Drawn], buffer: _Buffer) -> None:
        """Copy rows into the buffer, images into the first frame of their place. Runs in a thread."""
        if buffer.copied is not None:
            buffer.copied.synchronize()
        places = self._view(step, len(drawn), buffer).numpy()
        for place, clip in zip(places, drawn, strict=True):
            self._reader.read_into(clip.frames, clip.address, place[: clip.frames])

    def _view(self, step: int, clips: int, buffer: _Buffer) -> Float[Tensor, "B F C h w"]:
        frames = self._recipe.stages[stage_at(self._recipe.stages, step)[0]].frames
        shape = (clips, frames, self._spec.channels, self._spec.height, self._spec.width)
        return buffer.memory[: math.prod(shape)].view(shape)

    def _batch(self, step: int, drawn: list[Drawn], buffer: _Buffer, waited_s: float) -> Batch:
        numbers = tuple(clip.draw for clip in drawn)
        latents = self._on_device(self._view(step, len(drawn), buffer), drawn)
        if self._device.type == "cuda":
            buffer.copied = torch.cuda.Event()
            buffer.copied.record()
        ids = [torch.from_numpy(ids).to(self._device) for ids in self._masks.visible(step, numbers)]
        return Batch(step, numbers, latents, ids, waited_s=waited_s)

    def _on_device(self, stored: Tensor, drawn: Sequence[Drawn]) -> Tensor:
        """Copy, repeat images over time, normalise, fold to the model's grid."""
        frames = stored.shape[1]
        latents = stored.to(self._device, non_blocking=True).float()  # a new tensor: float16 is never used as it is
        images = [place for place, clip in enumerate(drawn) if clip.frames < frames]
        if images:
            latents[images] = repeat(latents[images, 0], "B C h w -> B F C h w", F=frames)
        normalised = normalise(latents, self._mean, self._std)
        return space_to_depth(normalised, self._fold) if self._fold > 1 else normalised

    def _buffer(self, frames: int) -> _Buffer:
        numbers = frames * self._spec.channels * self._spec.height * self._spec.width
        return _Buffer(torch.empty(numbers, dtype=torch.float16, pin_memory=self._device.type == "cuda"))


@contextmanager
def open_loader(
    root: DataRoot, trainset: Trainset, recipe: RecipeConfig, plan: OpenedPlan, ranks: Ranks
) -> Iterator[Loader]:
    """The loader of one rank. Raises RefusedError where trainset and recipe do not fit, or a row was withdrawn."""
    order = Order(trainset, recipe)
    order.refuse_withdrawn(root, trainset)
    reader = RowReader(root, trainset.spec, trainset.batches)
    try:
        yield Loader(trainset, recipe, order, Masks(recipe, plan), reader, ranks)
    finally:
        reader.close()


def _fold(trainset: Trainset, recipe: RecipeConfig) -> int:
    """Cells of the store per cell and side of the model's grid; refuses what does not fit."""
    spec, model = trainset.spec, recipe.model
    if model.encoder.input == "pixels" or recipe.losses.target != "latents":
        twin = f"{recipe.name}_latent"
        remedy = f"train {twin}" if twin in RECIPES else "choose a recipe that reads and predicts latents"
        raise RefusedError(
            f"recipe {recipe.name} reads {model.encoder.input} and predicts {recipe.losses.target}, and the trainset "
            f"holds latents only: {remedy}"
        )
    fold = max(1, spec.height // model.grid_height)
    stored = (spec.channels, spec.height, spec.width)
    wanted = (model.frame_channels // fold**2, model.grid_height * fold, model.grid_width * fold)
    if stored != wanted or model.frame_channels % fold**2:
        raise RefusedError(
            f"recipe {recipe.name} wants {model.frame_channels} channels on a grid of {model.grid_height} x "
            f"{model.grid_width}, and the latents are {spec.channels} channels of {spec.height} x {spec.width} "
            f"(encoding of {spec.resolution} pixels): choose another recipe, resolution or autoencoder"
        )
    return fold
