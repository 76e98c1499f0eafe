"""The order of training: the row and the masks of each draw, a pure function of the seed and the draw's number.

Draws are numbered through all stages, so ranks, workers, micro-batches and resuming change nothing. In a stage a
dataset's images come first, then its clips of the stage's length. Reads addresses and mask bits, no latents.

Axes: B clips, n visible cells, L visible tokens.
"""

import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Int

from nextvid.config.project import Project
from nextvid.config.recipe import RecipeConfig
from nextvid.config.stages import draws_before, stage_at
from nextvid.model.masks import Buckets, bucket_entries, flat_ids, step_bucket
from nextvid.trainset.mask_plan import OpenedPlan
from nextvid.trainset.trainset import Trainset
from storage.draws import BLOCK, Draws, mask_entries
from storage.errors import RefusedError
from storage.reader import ADDRESS, row_id

IMAGE = 1  # stored frames of an image


@dataclass(frozen=True)
class Drawn:
    """The rows of consecutive draws and their addresses."""

    first: int  # number of the first draw
    names: tuple[str, ...]  # datasets of the trainset, sorted
    datasets: Int[np.ndarray, " B"]  # indices in `names`
    frames: Int[np.ndarray, " B"]  # stored frames of the row: 1 for an image
    rows: Int[np.ndarray, " B"]  # index among the trainset's rows of that many frames, of latents and of pixels
    addresses: np.ndarray  # ADDRESS [B] of the latents in the store

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def draws(self) -> range:
        """Numbers of the draws."""
        return range(self.first, self.first + len(self))

    @cached_property
    def by_frames(self) -> list[tuple[int, Int[np.ndarray, " n"], np.ndarray]]:
        """Each number of stored frames, and the indices and addresses of the clips that have it."""
        if len(self) and (self.frames == self.frames[0]).all():
            return [(int(self.frames[0]), np.arange(len(self)), self.addresses)]
        lengths = [(frames, self.of_frames(frames)) for frames in np.unique(self.frames).tolist()]
        return [(frames, numbers, self.addresses[numbers]) for frames, numbers in lengths]

    def of_frames(self, frames: int) -> Int[np.ndarray, " n"]:
        """Indices of the clips that are stored with so many frames."""
        return np.flatnonzero(self.frames == frames)


class Order:
    """The draws of a recipe on a trainset. Raises RefusedError where a dataset has no row for a stage."""

    def __init__(self, trainset: Trainset, recipe: RecipeConfig) -> None:
        self.lengths = sorted({*recipe.clip_lengths, *([IMAGE] if IMAGE in trainset.lengths else [])})
        stored = {frames: trainset.rows(frames) for frames in self.lengths}
        for rows in stored.values():
            if isinstance(rows.base, mmap.mmap):
                # rows of draws are far apart: a cold read takes 0.08 ms, 0.5 with read-ahead
                rows.base.madvise(mmap.MADV_RANDOM)
        self._rows = {frames: np.asarray(rows) for frames, rows in stored.items()}  # a memmap costs more for each draw
        self._offsets = {frames: trainset.offsets(frames) for frames in self._rows}
        self._draws: dict[int, Draws] = {}
        # by clip length: images of each dataset, and what makes a draw's row the place of an image, and of a clip
        self._shifts: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        for frames in recipe.clip_lengths:
            sizes = {name: sum(self._count(length, name) for length in {IMAGE, frames}) for name in trainset.weights}
            lacking = sorted(name for name, size in sizes.items() if size == 0)
            if lacking:
                raise RefusedError(
                    f"trainset {trainset.digest} has no clips of {frames} frames and no images of "
                    f"{', '.join(lacking)}, which recipe {recipe.name} draws from: add clips of {frames} frames "
                    "in corpus.yaml, or longer videos"
                )
            draws = self._draws[frames] = Draws(recipe.seed, trainset.weights, sizes)
            images = np.array([self._count(IMAGE, name) for name in draws.datasets])
            of_image, of_clip = (
                np.array([self._offsets.get(length, {}).get(name, (0, 0))[0] for name in draws.datasets])
                for length in (IMAGE, frames)
            )
            self._shifts[frames] = images, of_image, of_clip - images

    def drawn(self, frames: int, first: int, count: int) -> Drawn:
        """Draws first..first+count-1 of a stage whose clips have `frames` frames."""
        draws = self._draws[frames]
        datasets, rows = draws.range(first, count)
        images, of_image, of_clip = self._shifts[frames]
        are_images = rows < images[datasets]
        stored = np.where(are_images, IMAGE, frames)
        places = rows + np.where(are_images, of_image[datasets], of_clip[datasets])
        if not are_images.any():
            return Drawn(first, draws.datasets, datasets, stored, places, self._rows[frames][places])
        addresses = np.empty(count, ADDRESS)
        for length in (IMAGE, frames):
            of_length = stored == length
            addresses[of_length] = self._rows[length][places[of_length]]
        return Drawn(first, draws.datasets, datasets, stored, places, addresses)

    def _count(self, frames: int, dataset: str) -> int:
        return self._offsets.get(frames, {}).get(dataset, (0, 0))[1]


class Masks:
    """Visible ids of drawn clips, by strategy, for every way of thinning."""

    def __init__(self, recipe: RecipeConfig, plan: OpenedPlan) -> None:
        self._recipe = recipe
        self._cells = {name: plan.cells(name) for name in plan.kept}
        self._buckets = {name: Buckets.of(raw) for name, raw in plan.raw.items() if recipe.masks.keep == "bucket"}

    def visible(self, step: int, draws: range) -> list[Int[np.ndarray, "B L"]]:
        """Sorted flat ids over all tubelets of the step's stage, int64, one array a strategy."""
        recipe, cells = self._recipe, self._recipe.model.cells
        masks = recipe.masks
        tubelets = recipe.stages[stage_at(recipe.stages, step)[0]].frames // recipe.model.tubelet
        if masks.keep == "all":
            return [np.broadcast_to(np.arange(tubelets * cells), (len(draws), tubelets * cells)).copy()]
        found = []
        for index, strategy in enumerate(masks.strategies):
            key = (masks.seed, index)
            if masks.keep == "flat":
                grid = recipe.model.grid_height, recipe.model.grid_width
                found.append(flat_ids(strategy, *grid, tubelets, key, step, draws))
                continue
            if masks.keep == "fixed":
                kept = self._cells[strategy.name][self.entries(index, draws)]
            else:
                buckets = self._buckets[strategy.name]
                kept = bucket_entries(buckets, step_bucket(buckets, key, step), key, draws)
            found.append(in_every_tubelet(kept, tubelets, cells))
        return found

    def entries(self, strategy: int, draws: range) -> Int[np.ndarray, " B"]:
        """The entries of a `fixed` plan for these draws."""
        return mask_entries(self._recipe.seed, strategy, draws.start, len(draws), self._recipe.masks.entries)


def in_every_tubelet(kept: Int[np.ndarray, "B n"], tubelets: int, cells: int) -> Int[np.ndarray, "B L"]:
    """The same cells in every tubelet as flat ids, in the order t, cell: nextvid.model.tokens.tube_ids in numpy."""
    starts = cells * np.arange(tubelets)
    return (starts[None, :, None] + kept[:, None, :]).reshape(len(kept), -1)


def pieces(recipe: RecipeConfig, draws: range) -> Iterator[tuple[int, range]]:
    """(frames, draws): training's draws in pieces that end with a stage and every BLOCK draws; none after the last."""
    first = 0
    for stage in recipe.stages:
        stop = first + stage.steps * stage.batch
        for start in range(max(first, draws.start), min(stop, draws.stop), BLOCK):
            yield stage.frames, range(start, min(start + BLOCK, stop, draws.stop))
        first = stop


def listed_draws(project: Project, recipe: str, draws: range) -> Iterator[dict[str, int | str]]:
    """Draws of a recipe on the newest trainset, with row and mask entries; reads no latents and no mask plan.

    Mask entries of a `fixed` plan only: other masks depend on the step. Draws after the end of training are left out.
    """
    config = project.recipe(recipe)
    order, masks = Order(Trainset.open(project.root), config), config.masks
    strategies = masks.strategies if masks.keep == "fixed" else ()
    for frames, piece in pieces(config, draws):
        drawn = order.drawn(frames, piece.start, len(piece))
        entries = {
            f"mask_{strategy.name}": mask_entries(config.seed, index, piece.start, len(piece), masks.entries).tolist()
            for index, strategy in enumerate(strategies)
        }
        for n, draw in enumerate(drawn.draws):
            found: dict[str, int | str] = {"draw": draw, "dataset": drawn.names[drawn.datasets[n]]}
            found |= {"frames": int(drawn.frames[n]), "row": row_id(drawn.addresses[n]).hex()}
            yield found | {name: numbers[n] for name, numbers in entries.items()}


def shared_with_parent(project: Project, recipe: str, count: int) -> str | None:
    """A line that says how many of a recipe's first draws take the same rows on the newest trainset as on its parent.

    Where they differ it says why. None where the trainset has no parent.
    """
    now, config = Trainset.open(project.root), project.recipe(recipe)
    if now.parent is None or now.parent == now.digest:
        return None
    before, asked = Trainset.open(project.root, now.parent), min(count, draws_before(config.stages, config.steps))
    why = "; ".join(_differences(before, now)) or "datasets have other rows"
    try:
        orders = Order(before, config), Order(now, config)
    except RefusedError:  # the parent lacks a length or a dataset's rows
        return f"the recipe cannot draw from the parent trainset {now.parent}: {why}"
    for frames, piece in pieces(config, range(asked)):
        old, new = (order.drawn(frames, piece.start, len(piece)) for order in orders)
        same = (np.array(old.names)[old.datasets] == np.array(new.names)[new.datasets]) & (old.frames == new.frames)
        same &= (old.addresses["row_id"] == new.addresses["row_id"]).all(axis=1)
        if not same.all():
            first = piece.start + int(np.argmin(same))
            return f"from draw {first} on they differ from those of the parent {now.parent}: {why}"
    return f"the first {asked} draws are those of the parent trainset {now.parent}"


def _differences(before: Trainset, now: Trainset) -> Iterator[str]:
    """What differs between two trainsets of what draws follow from; of weights, their proportions."""
    common = before.weights.keys() & now.weights.keys()
    scale = sum(before.weights[name] for name in common) / (sum(now.weights[name] for name in common) or 1.0)
    for name in sorted(before.weights.keys() | now.weights.keys()):
        if name not in common:
            yield f"dataset '{name}' is {'gone' if name in before.weights else 'new'}"
            continue
        if not math.isclose(before.weights[name], scale * now.weights[name]):
            yield f"dataset '{name}' has weight {now.weights[name]:.6g}, {before.weights[name]:.6g} before"
        for frames in sorted({*before.lengths, *now.lengths}):
            held = (trainset.offsets(frames) if frames in trainset.lengths else {} for trainset in (before, now))
            old, new = (offsets.get(name, (0, 0))[1] for offsets in held)
            if old != new:
                yield f"dataset '{name}' has {new} rows of {frames} frames, {old} before"


def refuse_unfit(trainset: Trainset, recipe: RecipeConfig) -> None:
    """Raise RefusedError where a dataset has no row for a stage, or the latents have another shape than the model."""
    Order(trainset, recipe)
    if recipe.reads_latents:
        fold(trainset, recipe)


def fold(trainset: Trainset, recipe: RecipeConfig) -> int:
    """How many cells of a latent make one cell of the model's grid, per side. Raises RefusedError where none fit."""
    spec, model = trainset.spec, recipe.model
    fold = max(1, spec.height // model.grid_height)
    stored = (spec.channels, spec.height, spec.width)
    needed = (model.frame_channels // fold**2, model.grid_height * fold, model.grid_width * fold)
    if stored != needed or model.frame_channels % fold**2:
        raise RefusedError(
            f"recipe {recipe.name} wants {model.frame_channels} channels on a grid of {model.grid_height} x "
            f"{model.grid_width}, and the latents are {spec.channels} channels of {spec.height} x {spec.width} "
            f"(encoding of {spec.resolution} pixels): choose another recipe, resolution or autoencoder"
        )
    return fold
