"""The plan on disk is what the sampler drew, its checks can fail, and damage is noticed."""

import io
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nextvid.config.recipe import ModelConfig, RecipeConfig
from nextvid.config.recipes import recipe
from nextvid.model.masks import draw_plan
from nextvid.trainset import mask_plan
from nextvid.trainset.mask_plan import grid_of, make_plan, open_mask_plan, plan_digest, thinning_statistic
from storage import atomic
from storage.errors import DamagedError, UpstreamError
from storage.root import DataRoot
from tests.factories import flip, unchanged
from tests.nextvid.train.tiny import Keep, tiny_recipe


@pytest.fixture
def root(tmp_path: Path) -> DataRoot:
    return DataRoot.open(str(tmp_path))


def _open(root: DataRoot, config: RecipeConfig) -> mask_plan.OpenedPlan:
    return open_mask_plan(root, config.masks, grid_of(config.model))


def test_what_is_opened_is_what_was_drawn(root: DataRoot) -> None:
    config = tiny_recipe()
    outcome = make_plan(root, config)
    assert outcome.made
    assert outcome.passed
    assert outcome.digest == plan_digest(config.masks, (4, 4))
    opened = _open(root, config)
    for strategy in draw_plan(config.masks, 4, 4).strategies:
        assert np.array_equal(opened.raw[strategy.name], strategy.raw)
        assert strategy.kept is not None
        assert np.array_equal(opened.kept[strategy.name], strategy.kept)
    assert opened.cells("short").shape == (256, 10)
    picture = Image.open(io.BytesIO(atomic.read_bytes(outcome.pictures["mask gallery"])))
    assert len(picture.getcolors(1 << 20) or []) >= 4


def test_making_again_writes_nothing_and_reports_the_same_checks(root: DataRoot) -> None:
    first = make_plan(root, tiny_recipe())
    with unchanged(root.url):
        second = make_plan(root, tiny_recipe())
        assert not second.made
    assert [(check.name, check.passed) for check in second.checks] == [(c.name, c.passed) for c in first.checks]
    assert second.numbers == first.numbers


@pytest.mark.parametrize("keep", ["bucket", "flat", "all"])
def test_every_way_of_thinning_has_a_plan_and_a_digest(root: DataRoot, keep: Keep) -> None:
    config = tiny_recipe(keep=keep)
    outcome = make_plan(root, config)
    assert outcome.passed
    assert outcome.digest != plan_digest(tiny_recipe().masks, (4, 4))
    opened = _open(root, config)
    assert (len(opened.raw), len(opened.kept)) == ((2, 0) if keep == "bucket" else (0, 0))


def test_the_papers_plan_passes_in_seconds(root: DataRoot) -> None:
    started = time.process_time()
    outcome = make_plan(root, recipe("nextvid_l"))
    assert time.process_time() - started < 20  # 2 x 65,536 entries; measured 2 s
    assert outcome.passed
    assert outcome.rows == 2 << 16
    numbers = {check.name: check.numbers for check in outcome.checks}
    assert numbers["raw_statistics"]["paper_geometry"] == 1
    assert 0 < float(numbers["raw_statistics"]["worst_of_tolerance"]) <= 1
    assert outcome.numbers["short_visible_mean"] == pytest.approx(98, abs=1.5)  # 97.3, entries below the budget redrawn


def test_a_biased_thinning_is_found(root: DataRoot) -> None:
    config = recipe("nextvid_l")
    plan = draw_plan(config.masks, 16, 16)
    raw = {strategy.name: strategy.raw for strategy in plan.strategies}
    prefix = {}
    for name, budget in (("short", 60), ("long", 15)):  # bottom rows dropped, as a prefix of the list would
        prefix[name] = raw[name] & (np.cumsum(raw[name], axis=1) <= budget)
    biased = mask_plan.OpenedPlan("0" * 32, config.masks, (16, 16), raw, prefix)
    statistic, bound = thinning_statistic(biased)
    assert statistic > 100 * bound
    names = {check.name: check.passed for check in mask_plan._checks(biased, config)}
    assert names == {
        "budgets_exact": True, "tubes_constant": True, "thinning_uniform": False, "raw_statistics": True,
    }  # fmt: skip


def test_a_cell_that_was_never_visible_is_found() -> None:
    config = tiny_recipe()
    plan = draw_plan(config.masks, 4, 4)
    raw = {strategy.name: strategy.raw for strategy in plan.strategies}
    kept = {strategy.name: strategy.kept.copy() for strategy in plan.strategies if strategy.kept is not None}
    hidden = np.flatnonzero(~raw["short"][7])[0]
    kept["short"][7, hidden] = True
    checks = mask_plan._checks(mask_plan.OpenedPlan("0" * 32, config.masks, (4, 4), raw, kept), config)
    assert {check.name for check in checks if not check.passed} == {
        "budgets_exact", "tubes_constant", "thinning_uniform",
    }  # fmt: skip


def test_a_changed_byte_is_an_error(root: DataRoot) -> None:
    config = tiny_recipe()
    outcome = make_plan(root, config)
    assert outcome.digest
    path = Path(root.pointed("mask_plan", outcome.digest)) / "long.npy"
    flip(path)
    with pytest.raises(DamagedError, match=r"long\.npy"):
        _open(root, config)


def test_a_changed_plan_is_not_up_to_date(root: DataRoot) -> None:
    digest = make_plan(root, tiny_recipe()).digest
    plan = Path(root.pointed("mask_plan", str(digest)), "plan.json")
    kept = plan.read_text()
    for changed in (kept.replace('"visible_mean": ', '"visible_mean": 1', 1), kept.replace('"seed": 0', '"seed": 1')):
        assert changed != kept
        plan.write_text(changed)
        with pytest.raises(DamagedError, match=r"plan\.json .*; remove the folder .*mask_plan/"):
            make_plan(root, tiny_recipe())
    plan.write_text(kept)
    flip(plan.with_name("long.npy"))
    with pytest.raises(DamagedError, match=r"long\.npy: bytes differ from plan\.json"):
        make_plan(root, tiny_recipe())


def test_a_plan_that_was_not_made_is_upstream(root: DataRoot) -> None:
    with pytest.raises(UpstreamError):
        _open(root, tiny_recipe())


def test_digest_depends_on_masks_and_grid_alone() -> None:
    a = tiny_recipe()
    b = a.model_copy(update={"name": "other", "seed": 5})
    assert plan_digest(a.masks, grid_of(a.model)) == plan_digest(b.masks, grid_of(b.model))
    other = ModelConfig(grid_height=2, grid_width=8)
    assert plan_digest(a.masks, grid_of(other)) != plan_digest(a.masks, grid_of(a.model))
