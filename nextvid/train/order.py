"""Which row and which masks a draw number means: a pure function of the seed and that number (design, 5 "Order").

Clips of a stage are the dataset's images first, then its clips of the stage's length. Draw numbers run on across
stages, so ranks, workers, micro-batches and resumption change nothing. It reads addresses and mask bits, no latents.

Axes: B clips, n visible cells, L visible tokens.
"""

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from nextvid.config import RecipeConfig
from nextvid.corpus.project import Project
from nextvid.corpus.trainset import Trainset
from nextvid.model.masks import bucket_entry, flat_ids, step_bucket
from nextvid.recipes import recipe as recipe_by_name
from nextvid.train.mask_plan import OpenedPlan
from nextvid.train.optim import stage_at
from storage.draws import Draws, mask_entry
from storage.errors import RefusedError
from storage.reader import row_id
from storage.root import DataRoot
from storage.withdrawn import withdrawn_rows

IMAGE = 1  # stored frames of an image


@dataclass(frozen=True)
class Drawn:
    """One drawn clip: its dataset, the stored frames of its row (1: an image), and the row's address."""

    draw: int
    dataset: str
    frames: int
    address: np.void


class Order:
    """Draws of a recipe on a trainset, by clip length. Raises RefusedError where a dataset lacks a length."""

    def __init__(self, trainset: Trainset, recipe: RecipeConfig) -> None:
        self._rows = {frames: trainset.rows(frames) for frames in _held(trainset, recipe)}
        self._offsets = {frames: trainset.offsets(frames) for frames in self._rows}
        self._draws: dict[int, Draws] = {}
        for frames in recipe.clip_lengths:
            sizes = {name: self._images(name) + self._clips(name, frames) for name in trainset.weights}
            lacking = sorted(name for name, size in sizes.items() if size == 0)
            if lacking:
                raise RefusedError(
                    f"trainset {trainset.digest} has no clips of {frames} frames and no images of "
                    f"{', '.join(lacking)}, which recipe {recipe.name} draws from: add a clip policy to corpus.yaml"
                )
            self._draws[frames] = Draws(recipe.seed, trainset.weights, sizes)

    def drawn(self, frames: int, first: int, count: int) -> list[Drawn]:
        """Draws first..first+count-1 of a stage whose clips have `frames` frames."""
        draws = self._draws[frames]
        datasets, rows = draws.range(first, count)
        return [
            self._at(first + index, draws.datasets[int(dataset)], frames, int(row))
            for index, (dataset, row) in enumerate(zip(datasets, rows, strict=True))
        ]

    def refuse_withdrawn(self, root: DataRoot, trainset: Trainset) -> None:
        """Raise RefusedError if one of the rows was withdrawn; a binary search a dataset, so cheap at any size."""
        for wanted in withdrawn_rows(root):
            for frames, offsets in self._offsets.items():
                for first, count in offsets.values():
                    rows = self._rows[frames][first : first + count]
                    place = bisect.bisect_left(rows, wanted, key=row_id)
                    if place < count and row_id(rows[place]) == wanted:
                        raise RefusedError(
                            f"trainset {trainset.digest} holds row {wanted.hex()}, which was withdrawn: make the "
                            "trainset again and train on the new one"
                        )

    def _images(self, dataset: str) -> int:
        return self._offsets.get(IMAGE, {}).get(dataset, (0, 0))[1]

    def _clips(self, dataset: str, frames: int) -> int:
        return self._offsets.get(frames, {}).get(dataset, (0, 0))[1] if frames != IMAGE else 0

    def _at(self, draw: int, dataset: str, frames: int, row: int) -> Drawn:
        images = self._images(dataset)
        stored, inside = (IMAGE, row) if row < images else (frames, row - images)
        first, _ = self._offsets[stored][dataset]
        return Drawn(draw, dataset, stored, self._rows[stored][first + inside])


class Masks:
    """Visible ids of drawn clips, by strategy, for every way of thinning."""

    def __init__(self, recipe: RecipeConfig, plan: OpenedPlan) -> None:
        self._recipe, self._plan = recipe, plan
        self._cells = {name: plan.cells(name) for name in plan.kept}

    def visible(self, step: int, draws: Sequence[int]) -> list[Int[np.ndarray, "B L"]]:
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
                found.append(flat_ids(strategy, *grid, tubelets, key, step, list(draws)))
                continue
            if masks.keep == "fixed":
                kept = self._cells[strategy.name][[self.entry(index, draw) for draw in draws]]
            else:
                raw = self._plan.raw[strategy.name]
                bucket = step_bucket(raw, key, step)
                kept = np.stack([bucket_entry(raw, bucket, key, draw) for draw in draws])
            found.append(in_every_tubelet(kept, tubelets, cells))
        return found

    def entry(self, strategy: int, draw: int) -> int:
        """Entry of a `fixed` plan that a draw takes."""
        return mask_entry(self._recipe.seed, strategy, draw, self._recipe.masks.entries)


def in_every_tubelet(kept: Int[np.ndarray, "B n"], tubelets: int, cells: int) -> Int[np.ndarray, "B L"]:
    """The same cells in every tubelet as flat ids, in the order t, cell: nextvid.model.tokens.tube_ids in numpy."""
    starts = cells * np.arange(tubelets)
    return (starts[None, :, None] + kept[:, None, :]).reshape(len(kept), -1)


def first_draws(project: Project, recipe: str, count: int) -> Iterator[dict[str, int | str]]:
    """The first draws of a recipe on the newest trainset: row and mask entries, without latents, plan or device."""
    config = recipe_by_name(recipe)
    order = Order(Trainset.open(project.root), config)
    entries = config.masks.strategies if config.masks.keep == "fixed" else ()
    for drawn in order.drawn(config.stages[0].frames, 0, count):
        found: dict[str, int | str] = {"draw": drawn.draw, "dataset": drawn.dataset, "frames": drawn.frames}
        found["row"] = row_id(drawn.address).hex()
        for index, strategy in enumerate(entries):
            found[f"mask_{strategy.name}"] = mask_entry(config.seed, index, drawn.draw, config.masks.entries)
        yield found


def _held(trainset: Trainset, recipe: RecipeConfig) -> list[int]:
    """Lengths to open: those of the stages, and images if there are any."""
    return sorted({*recipe.clip_lengths, *([IMAGE] if IMAGE in trainset.lengths else [])})
