"""How far a trainset's draws are those of its parent, and why they part where they do.

The n-th draw of a dataset takes the same row whatever else is in the mixture, as long as the dataset itself has the
same rows; which dataset a draw falls on follows from quotas by blocks (storage/draws.py). So a dataset more leaves the
old prefix as it was up to the first block in which its weight moves a quota. Reads row tables only.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import isclose

import numpy as np

from nextvid.config.project import Project
from nextvid.config.recipes import recipe as recipe_by_name
from nextvid.config.stages import draws_before
from nextvid.trainset.order import Drawn, Order, pieces
from nextvid.trainset.trainset import Trainset
from storage.errors import RefusedError


@dataclass(frozen=True)
class Prefix:
    """`same` of the first `asked` draws take the same rows of the same datasets; `reasons` say what differs."""

    parent: str
    same: int
    asked: int
    reasons: tuple[str, ...]

    def text(self) -> str:
        """One line for people."""
        if self.same == self.asked:
            return f"the first {self.asked} draws are those of the parent trainset {self.parent}"
        why = "; ".join(self.reasons) or "the recipe cannot draw from the parent"
        return f"from draw {self.same} on they are not those of the parent trainset {self.parent}: {why}"


def shared_prefix(project: Project, recipe: str, count: int) -> Prefix | None:
    """The newest trainset against its parent, over the first draws of a recipe; None where it has no parent."""
    now = Trainset.open(project.root)
    if now.parent is None or now.parent == now.digest:
        return None
    config, before = recipe_by_name(recipe), Trainset.open(project.root, now.parent)
    reasons = tuple(_differences(before, now))
    asked = min(count, draws_before(config.stages, config.steps))
    try:
        orders = Order(before, config), Order(now, config)
    except RefusedError:  # the parent lacks a length or a dataset's rows
        return Prefix(now.parent, 0, asked, reasons)
    for frames, piece in pieces(config, range(asked)):
        alike = _alike(*(order.drawn(frames, piece.start, len(piece)) for order in orders))
        if alike < len(piece):
            return Prefix(now.parent, piece.start + alike, asked, reasons)
    return Prefix(now.parent, asked, asked, reasons)


def _alike(one: Drawn, other: Drawn) -> int:
    """Leading draws that take the same row of the same dataset."""
    names = np.array(one.names)[one.datasets] == np.array(other.names)[other.datasets]
    rows = (one.addresses["row_id"] == other.addresses["row_id"]).all(axis=1)
    differing = np.flatnonzero(~(names & rows & (one.frames == other.frames)))
    return int(differing[0]) if len(differing) else len(one)


def _differences(before: Trainset, now: Trainset) -> Iterator[str]:
    """What differs between two trainsets of what the order hangs on; of weights, those to each other."""
    common = before.weights.keys() & now.weights.keys()
    scale = sum(before.weights[name] for name in common) / (sum(now.weights[name] for name in common) or 1.0)
    for name in sorted(before.weights.keys() | now.weights.keys()):
        if name not in before.weights:
            yield f"dataset '{name}' is new"
        elif name not in now.weights:
            yield f"dataset '{name}' is gone"
        elif not isclose(before.weights[name], scale * now.weights[name]):
            yield f"dataset '{name}' has weight {now.weights[name]:.6g}, {before.weights[name]:.6g} before"
        for frames in sorted({*before.lengths, *now.lengths}):
            counts = [_count(trainset, frames, name) for trainset in (now, before)]
            if counts[0] != counts[1] and name in before.weights and name in now.weights:
                yield f"dataset '{name}' has {counts[0]} rows of {frames} frames, {counts[1]} before"


def _count(trainset: Trainset, frames: int, dataset: str) -> int:
    return trainset.offsets(frames).get(dataset, (0, 0))[1] if frames in trainset.lengths else 0
