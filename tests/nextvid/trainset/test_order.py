"""The order of training as a person asks for it: `listed_draws` and its cuts against the slow references."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextvid.trainset import order
from nextvid.trainset.order import IMAGE, Order, listed_draws, pieces
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
    monkeypatch.setattr(order, "recipe_by_name", lambda name: recipe)
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
