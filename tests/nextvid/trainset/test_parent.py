"""A trainset that grew says which of its first draws are the old ones, and says it rightly."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from nextvid.config.project import Project
from nextvid.making.publishing import publish_latest
from nextvid.trainset import order
from nextvid.trainset.files import read_sealed, write_trainset
from nextvid.trainset.order import shared_with_parent
from nextvid.trainset.trainset import Trainset
from tests.nextvid.train.corpus import make_project
from tests.nextvid.train.tiny import tiny_recipe

ASKED = 2500  # more than two blocks


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.setattr(order, "recipe_by_name", lambda name: tiny_recipe(name, steps=(700, 3, 3, 3)))
    return make_project(tmp_path)


def _grown(project: Project, weights: Mapping[str, float], rows: Mapping[int, Mapping[str, Sequence[int]]]) -> str:
    """A trainset whose parent is the latest, with these of its rows by frames and dataset."""
    parent = Trainset.open(project.root)
    said = read_sealed(f"{project.root.pointed('trainset', parent.digest)}/trainset.json", "")
    digest = "f" * 32
    offsets: dict[str, dict[str, tuple[int, int]]] = {}
    chosen = {}
    for frames, by_dataset in rows.items():
        first, parts = 0, []
        for name, taken in sorted(by_dataset.items()):
            offsets.setdefault(f"f{frames}", {})[name] = (first, len(taken))
            parts.append(np.array(parent.rows(frames))[list(taken)])
            first += len(taken)
        chosen[frames] = np.concatenate(parts)
    changed = {"digest": digest, "parent": parent.digest, "weights": dict(weights), "offsets": offsets}
    write_trainset(project.root.pointed("trainset", digest), said | changed, chosen, [])
    publish_latest(project.root, "trainset", digest)
    return digest


Rows = Mapping[int, Mapping[str, Sequence[int]]]
OLD: Rows = {1: {"pictures": range(7)}, 4: {"films": range(9)}, 8: {"films": range(5)}}
MORE: Rows = {
    1: {"pictures": range(7)},
    4: {"films": range(9), "extra": range(3)},
    8: {"films": range(5), "extra": [0]},
}
FEWER: Rows = {1: {"pictures": range(7)}, 4: {"films": range(8)}, 8: {"films": range(5)}}


def _line(project: Project, asked: int = ASKED) -> str:
    found = shared_with_parent(project, "tiny", asked)
    assert found is not None
    return found


def _by_hand(project: Project, parent: str, child: str) -> int:
    """Draw by draw, from what `nextvid draws` prints."""
    lists = []
    for digest in (parent, child):
        publish_latest(project.root, "trainset", digest)
        lists.append([(one["dataset"], one["row"]) for one in order.listed_draws(project, "tiny", range(ASKED))])
    return next((n for n, (one, other) in enumerate(zip(*lists, strict=True)) if one != other), ASKED)


def test_a_first_trainset_has_nothing_to_compare_with(project: Project) -> None:
    assert shared_with_parent(project, "tiny", ASKED) is None


@pytest.mark.parametrize(
    ("weights", "rows"),
    [
        ({"films": 0.75, "pictures": 0.25}, OLD),
        ({"films": 0.75, "pictures": 0.25, "extra": 1e-5}, MORE),  # moves no quota
    ],
)
def test_the_same_draws(project: Project, weights: dict[str, float], rows: Rows) -> None:
    parent = Trainset.open(project.root).digest
    child = _grown(project, weights, rows)
    assert _line(project) == f"the first 2500 draws are those of the parent trainset {parent}"
    assert _by_hand(project, parent, child) == ASKED


def test_training_ends_before_what_is_asked(project: Project) -> None:
    _grown(project, {"films": 0.75, "pictures": 0.25}, OLD)
    assert _line(project, 10_000).startswith("the first 2830 draws"), "2800 of the first stage, 24 and 6 of the others"


@pytest.mark.parametrize(
    ("weights", "rows"),
    [
        ({"films": 0.5, "pictures": 0.25, "extra": 0.25}, MORE),
        ({"films": 0.75, "pictures": 0.25, "extra": 3e-4}, MORE),
        ({"films": 0.5, "pictures": 0.5}, OLD),
        ({"films": 0.75, "pictures": 0.25}, FEWER),
        ({"films": 1.0}, {4: OLD[4], 8: OLD[8]}),
    ],
)
def test_where_draws_part_agrees_with_a_comparison_draw_by_draw(
    project: Project, weights: dict[str, float], rows: Rows
) -> None:
    parent = Trainset.open(project.root).digest
    child = _grown(project, weights, rows)
    parts = _by_hand(project, parent, child)
    assert parts < ASKED
    assert _line(project) == f"from draw {parts} on they differ from those of the parent {parent}"


def test_a_parent_without_the_length_is_another_order(project: Project) -> None:
    _grown(project, {"films": 0.75}, {8: OLD[8]})
    parent = Trainset.open(project.root).digest
    said = read_sealed(f"{project.root.pointed('trainset', parent)}/trainset.json", "")
    rows = {frames: np.array(Trainset.open(project.root, said["parent"]).rows(frames)) for frames in (4, 8)}
    offsets = {"f4": {"films": [0, 9]}, "f8": {"films": [0, 5]}}
    changed = {"digest": "e" * 32, "parent": parent, "offsets": offsets}
    write_trainset(project.root.pointed("trainset", "e" * 32), said | changed, rows, [])
    publish_latest(project.root, "trainset", "e" * 32)
    assert _line(project) == f"the recipe cannot draw from the parent trainset {parent}"
