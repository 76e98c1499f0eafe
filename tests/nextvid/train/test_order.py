"""The order of training as a person asks for it: `first_draws` and its cuts against the slow references."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from nextvid.corpus.trainset import Trainset
from nextvid.train import order
from nextvid.train.order import IMAGE, Order, first_draws
from storage.draws import Draws, mask_entry
from storage.reader import row_id
from tests.nextvid.train.corpus import WEIGHTS, make_project
from tests.nextvid.train.tiny import tiny_recipe


def test_the_first_thousand_draws_need_row_tables_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No latents, no mask plan, no device; each draw as Draws.at and mask_entry give it, one by one."""
    project, recipe = make_project(tmp_path), tiny_recipe()
    trainset = Trainset.open(project.root)
    shutil.rmtree(project.root.spec_folder(trainset.spec.digest()))
    monkeypatch.setattr(order, "recipe_by_name", tiny_recipe)
    draws = Draws(recipe.seed, WEIGHTS, {"films": 9, "pictures": 7})
    found = list(first_draws(project, "tiny", 1000))
    assert [one["draw"] for one in found] == list(range(1000))
    for one in found[::7]:
        number = int(one["draw"])
        dataset, row = draws.at(number)
        assert one["dataset"] == draws.datasets[dataset]
        frames = IMAGE if one["dataset"] == "pictures" else 4
        assert one["frames"] == frames
        assert one["row"] == row_id(trainset.rows(frames)[row]).hex()
        for index, strategy in enumerate(recipe.masks.strategies):
            assert one[f"mask_{strategy.name}"] == mask_entry(recipe.seed, index, number, recipe.masks.entries)


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
