"""Draws are a function of their number, however they are cut; and how many are those of the parent trainset."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextvid.config.project import Project
from nextvid.making.publishing import publish_latest
from nextvid.trainset import order
from nextvid.trainset.files import read_sealed, write_trainset
from nextvid.trainset.order import IMAGE, Order, listed_draws, pieces, shared_with_parent
from nextvid.trainset.trainset import Trainset
from storage.draws import BLOCK, Draws, mask_entry
from storage.reader import row_id
from tests.nextvid.train.corpus import WEIGHTS, make_project
from tests.nextvid.train.tiny import tiny_recipe


def test_the_first_thousand_draws_need_row_tables_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No latents, no mask plan, no device; each draw as Draws.at and mask_entry give it, one by one."""
    project, recipe = make_project(tmp_path), tiny_recipe(steps=(240, 3, 3, 20))
    trainset = Trainset.open(project.root)
    shutil.rmtree(project.root.spec_folder(trainset.spec.digest()))
    monkeypatch.setattr("nextvid.config.project.recipe_by_name", lambda name, _: recipe)
    found = list(listed_draws(project, "tiny", range(2000)))
    assert [one["draw"] for one in found] == list(range(1024)), "984 of 4 frames, 40 of the cool-down's 8, and no more"
    assert list(listed_draws(project, "tiny", range(975, 990))) == found[975:990]
    for one in [*found[::7], *found[980:990]]:
        number = int(one["draw"])
        longer = number >= 984
        draws = Draws(recipe.seed, WEIGHTS, {"films": 5 if longer else 9, "pictures": 7})
        dataset, row = draws.at(number)
        assert one["dataset"] == draws.datasets[dataset]
        frames = IMAGE if one["dataset"] == "pictures" else 8 if longer else 4
        assert one["frames"] == frames
        assert one["row"] == row_id(trainset.rows(frames)[row]).hex()
        for index, strategy in enumerate(recipe.masks.strategies):
            assert one[f"mask_{strategy.name}"] == mask_entry(recipe.seed, index, number, recipe.masks.entries)


@given(st.lists(st.integers(0, 700), min_size=4, max_size=4).filter(any), st.integers(0, 9000), st.integers(0, 4000))
def test_pieces_are_the_draws_with_their_stage_s_length(steps: list[int], start: int, count: int) -> None:
    stages = tiny_recipe().stages
    recipe = tiny_recipe().model_copy(
        update={"stages": tuple(stage.model_copy(update={"steps": n}) for stage, n in zip(stages, steps, strict=True))}
    )
    lengths = [stage.frames for stage in recipe.stages for _ in range(stage.steps * stage.batch)]
    found = [(draw, frames) for frames, piece in pieces(recipe, range(start, start + count)) for draw in piece]
    assert found == list(enumerate(lengths))[start : start + count]
    assert all(len(piece) <= BLOCK for _, piece in pieces(recipe, range(start, start + count)))


def test_any_cut_of_the_draws_is_the_same_draws(tmp_path: Path) -> None:
    project, recipe = make_project(tmp_path), tiny_recipe()
    drawing = Order(Trainset.open(project.root), recipe)
    whole = drawing.drawn(4, 1000, 96)
    for ranks in (2, 3, 8, 96):
        share = 96 // ranks
        parts = [drawing.drawn(4, 1000 + rank * share, share) for rank in range(ranks)]
        for field in ("datasets", "frames", "rows", "addresses"):
            assert np.array_equal(np.concatenate([getattr(part, field) for part in parts]), getattr(whole, field))
        assert [number for part in parts for number in part.draws] == list(whole.draws)


def test_rows_of_the_draws_are_places_in_the_tables(tmp_path: Path) -> None:
    project, recipe = make_project(tmp_path), tiny_recipe()
    trainset = Trainset.open(project.root)
    drawn = Order(trainset, recipe).drawn(8, 0, 200)
    for frames in (IMAGE, 8):
        places = drawn.of_frames(frames)
        assert len(places) > 20
        assert np.array_equal(np.array(trainset.rows(frames))[drawn.rows[places]], drawn.addresses[places])


ASKED = 2500  # more than two blocks


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.setattr(
        "nextvid.config.project.recipe_by_name", lambda name, _: tiny_recipe(name, steps=(700, 3, 3, 3))
    )
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
OTHER: Rows = {1: {"pictures": range(7)}, 4: {"films": [1, 0, *range(2, 9)]}, 8: {"films": range(5)}}


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
    ("weights", "rows", "why"),
    [
        ({"films": 0.6, "pictures": 0.2, "extra": 0.2}, MORE, "dataset 'extra' is new"),
        ({"films": 0.75, "pictures": 0.25, "extra": 3e-4}, MORE, "dataset 'extra' is new"),
        (
            {"films": 0.5, "pictures": 0.5},
            OLD,
            "dataset 'films' has weight 0.5, 0.75 before; dataset 'pictures' has weight 0.5, 0.25 before",
        ),
        ({"films": 0.75, "pictures": 0.25}, FEWER, "dataset 'films' has 8 rows of 4 frames, 9 before"),
        ({"films": 1.0}, {4: OLD[4], 8: OLD[8]}, "dataset 'pictures' is gone"),
        ({"films": 0.75, "pictures": 0.25}, OTHER, "datasets have other rows"),
    ],
)
def test_where_draws_part_agrees_with_a_comparison_draw_by_draw(
    project: Project, weights: dict[str, float], rows: Rows, why: str
) -> None:
    parent = Trainset.open(project.root).digest
    child = _grown(project, weights, rows)
    parts = _by_hand(project, parent, child)
    assert parts < ASKED
    assert _line(project) == f"from draw {parts} on they differ from those of the parent {parent}: {why}"


def test_a_parent_without_the_length_is_another_order(project: Project) -> None:
    _grown(project, {"films": 0.75}, {8: OLD[8]})
    parent = Trainset.open(project.root).digest
    said = read_sealed(f"{project.root.pointed('trainset', parent)}/trainset.json", "")
    rows = {frames: np.array(Trainset.open(project.root, said["parent"]).rows(frames)) for frames in (4, 8)}
    offsets = {"f4": {"films": [0, 9]}, "f8": {"films": [0, 5]}}
    changed = {"digest": "e" * 32, "parent": parent, "offsets": offsets}
    write_trainset(project.root.pointed("trainset", "e" * 32), said | changed, rows, [])
    publish_latest(project.root, "trainset", "e" * 32)
    why = "dataset 'films' has 9 rows of 4 frames, 0 before"
    assert _line(project) == f"the recipe cannot draw from the parent trainset {parent}: {why}"
