"""The trainer's own batches for training code of others: an iterable that stops and goes on where it was.

Order, masks and rows of a step follow from trainset, recipe and mask plan alone, so its state is the next step.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import IterableDataset

from nextvid.config.overrides import apply_overrides
from nextvid.config.project import open_project
from nextvid.train.distributed import Ranks
from nextvid.train.loader import Batch, open_loader
from nextvid.trainset.mask_plan import grid_of, make_plan, open_mask_plan
from nextvid.trainset.order import refuse_unfit
from nextvid.trainset.pixels import freeze_pixels
from nextvid.trainset.trainset import Trainset
from storage.errors import ConfigError, RefusedError


class TrainingBatches(IterableDataset[Batch]):
    """Batches of a recipe from `step` on, to its last step. `training_batches` makes it.

    Memory of a batch is used again once nobody holds the batch.
    """

    def __init__(self, corpus: Path, recipe: str, overrides: Sequence[str], trainset: str | None, ranks: Ranks) -> None:
        self._project = open_project(corpus)
        self.recipe = apply_overrides(self._project.recipe(recipe), overrides)
        self._trainset = Trainset.open(self._project.root, trainset)
        refuse_unfit(self._trainset, self.recipe)
        make_plan(self._project.root, self.recipe)
        self._ranks = ranks
        self.step = 0

    def __len__(self) -> int:
        """Batches that are left."""
        return self.recipe.steps - self.step

    def __iter__(self) -> Iterator[Batch]:
        """Raises what `open_loader` does."""
        root, recipe = self._project.root, self.recipe
        plan = open_mask_plan(root, recipe.masks, grid_of(recipe.model))
        pixels = freeze_pixels(self._project, self._trainset, recipe) if recipe.reads_pixels else None
        with (
            open_loader(root, self._trainset, recipe, plan, self._ranks, pixels) as loader,
            closing(loader.batches(self.step)) as batches,
        ):
            for batch in batches:
                self.step = batch.step + 1
                yield batch

    def state_dict(self) -> dict[str, Any]:
        """The step that follows the last batch that was handed out, and what it counts in."""
        return {"step": self.step, "recipe": self.recipe.digest(), "trainset": self._trainset.digest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on at a state's step. Raises RefusedError for a state of another recipe or trainset."""
        own = self.state_dict()
        for name in ("recipe", "trainset"):
            if state[name] != own[name]:
                raise RefusedError(f"the state is of {name} {state[name]}, these batches are of {own[name]}")
        self.step = int(state["step"])


def training_batches(
    corpus: str | Path,
    recipe: str,
    overrides: Sequence[str] = (),
    *,
    trainset: str | None = None,
    rank: int = 0,
    ranks: int = 1,
    device: str = "cpu",
) -> TrainingBatches:
    """The batches that `nextvid make pretrain` trains on, on `device`, in the same order, with their masks.

    Args:
        corpus: path of corpus.yaml.
        recipe: name of a recipe.
        overrides: changes of it, such as "seed=1".
        trainset: digest; the newest if left out.
        rank: which of `ranks` processes asks; each gets its share of every batch.
        ranks: how many processes there are.
        device: of torch.

    Raises ConfigError, RefusedError or UpstreamError for a request that cannot be met.
    """
    if not 0 <= rank < ranks:
        raise ConfigError(f"rank {rank} of {ranks}: ranks count from 0")
    return TrainingBatches(Path(corpus), recipe, overrides, trainset, Ranks(rank, ranks, torch.device(device)))
