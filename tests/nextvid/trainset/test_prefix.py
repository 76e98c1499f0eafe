"""A trainset that grew says which of its first draws are the old ones, and says it rightly."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from nextvid.config.project import Project
from nextvid.making.publishing import publish_latest
from nextvid.trainset import order, prefix
from nextvid.trainset.files import read_sealed, write_trainset
from nextvid.trainset.prefix import Prefix, shared_prefix
from nextvid.trainset.trainset import Trainset
from tests.nextvid.train.corpus import make_project
from tests.nextvid.train.tiny import tiny_recipe

ASKED = 2500  # more than two blocks


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    for module in (order, prefix):
        monkeypatch.setattr(module, "recipe_by_name", lambda name: tiny_recipe(name, steps=(700, 3, 3, 3)))
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


def _found(project: Project, asked: int = ASKED) -> Prefix:
    found = shared_prefix(project, "tiny", asked)
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
    assert shared_prefix(project, "tiny", ASKED) is None


def test_the_same_rows_and_weights_are_the_same_draws(project: Project) -> None:
    _grown(project, {"films": 0.75, "pictures": 0.25}, OLD)
    found = _found(project)
    assert (found.same, found.reasons) == (ASKED, ())
    assert "the first 2500 draws are those of" in found.text()


def test_training_ends_before_what_is_asked(project: Project) -> None:
    _grown(project, {"films": 0.75, "pictures": 0.25}, OLD)
    found = _found(project, 10_000)
    assert (found.same, found.asked) == (2830, 2830), "2800 of the first stage, 24 and 6 of the others"


def test_weights_count_in_proportion(project: Project) -> None:
    """A trainset's weights add up to one, so that a dataset more changes all of them."""
    _grown(project, {"films": 0.6, "pictures": 0.2, "extra": 0.2}, MORE)
    said = [reason for reason in _found(project).reasons if "weight" in reason]
    assert said == []


def test_a_dataset_more_with_a_weight_that_moves_no_quota_leaves_the_prefix(project: Project) -> None:
    _grown(project, {"films": 0.75, "pictures": 0.25, "extra": 1e-5}, MORE)
    found = _found(project)
    assert found.same == ASKED
    assert "dataset 'extra' is new" in found.reasons


@pytest.mark.parametrize(
    ("weights", "rows", "reason"),
    [
        ({"films": 0.5, "pictures": 0.25, "extra": 0.25}, MORE, "dataset 'extra' is new"),
        ({"films": 0.75, "pictures": 0.25, "extra": 3e-4}, MORE, "dataset 'extra' is new"),
        ({"films": 0.5, "pictures": 0.5}, OLD, "dataset 'films' has weight 0.5, 0.75 before"),
        ({"films": 0.75, "pictures": 0.25}, FEWER, "dataset 'films' has 8 rows of 4 frames, 9 before"),
    ],
)
def test_what_moves_the_draws_is_named_where_they_part(
    project: Project, weights: dict[str, float], rows: "Rows", reason: str
) -> None:
    parent = Trainset.open(project.root).digest
    child = _grown(project, weights, rows)
    found = _found(project)
    assert found.same < ASKED
    assert reason in found.reasons
    assert f"from draw {found.same} on" in found.text()
    assert reason in found.text()
    assert found.same == _by_hand(project, parent, child)


def test_a_dataset_that_is_gone_is_named(project: Project) -> None:
    _grown(project, {"films": 1.0}, {4: OLD[4], 8: OLD[8]})
    found = _found(project)
    assert found.same < ASKED
    assert "dataset 'pictures' is gone" in found.reasons


def test_a_parent_without_the_length_is_another_order(project: Project) -> None:
    _grown(project, {"films": 0.75}, {8: OLD[8]})
    parent = Trainset.open(project.root).digest
    said = read_sealed(f"{project.root.pointed('trainset', parent)}/trainset.json", "")
    rows = {frames: np.array(Trainset.open(project.root, said["parent"]).rows(frames)) for frames in (4, 8)}
    offsets = {"f4": {"films": [0, 9]}, "f8": {"films": [0, 5]}}
    changed = {"digest": "e" * 32, "parent": parent, "offsets": offsets}
    write_trainset(project.root.pointed("trainset", "e" * 32), said | changed, rows, [])
    publish_latest(project.root, "trainset", "e" * 32)
    found = _found(project)
    assert found.same == 0
    assert found.reasons == ("dataset 'films' has 9 rows of 4 frames, 0 before",)
