"""The block sampler against a plain loop and docs/method.md 2.3's table; exact, uniform, order-free thinning."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextvid.config.recipe import ConfigError, MaskConfig, MaskStrategy
from nextvid.model.masks import (
    Buckets,
    bucket_entries,
    cells_of,
    draw_plan,
    draw_visible,
    flat_ids,
    pack,
    statistics,
    step_bucket,
    thin,
    unpack,
)

SHORT, LONG = MaskConfig().strategies  # the paper's

strategies = st.builds(
    MaskStrategy,
    name=st.just("any"),
    blocks=st.integers(1, 4),
    scale=st.floats(0.05, 0.5),
    aspect_min=st.just(0.75),
    aspect_max=st.just(1.5),
    budget=st.just(1),
)


def by_hand(strategy: MaskStrategy, height: int, width: int, uniform: np.ndarray) -> np.ndarray:
    """One entry, block by block (docs/method.md 2.2)."""
    area = int(height * width * strategy.scale)
    aspect = strategy.aspect_min + uniform[0] * (strategy.aspect_max - strategy.aspect_min)
    tall, wide = min(height, round(math.sqrt(area * aspect))), min(width, round(math.sqrt(area / aspect)))
    visible = np.ones((height, width), dtype=bool)
    for block in range(strategy.blocks):
        top = math.floor(uniform[1 + 2 * block] * (height - tall + 1))
        left = math.floor(uniform[2 + 2 * block] * (width - wide + 1))
        visible[top : top + tall, left : left + wide] = False
    return visible.flatten()


@given(strategies, st.integers(4, 9), st.integers(4, 9), st.integers(0, 1000))
def test_entries_equal_the_plain_loop(strategy: MaskStrategy, height: int, width: int, seed: int) -> None:
    drawn = draw_visible(strategy, height, width, 20, (seed, 1))
    uniform = np.random.default_rng([seed, 1, 0]).random((20, 1 + 2 * strategy.blocks))
    for entry, numbers in zip(drawn, uniform, strict=True):
        expected = by_hand(strategy, height, width, numbers)
        if expected.any():  # else redrawn
            assert np.array_equal(entry, expected)
    assert drawn.any(axis=1).all()


@given(strategies, st.integers(1, 30), st.integers(1, 30), st.integers(0, 1000))
def test_an_entry_does_not_depend_on_how_many_there_are(strategy: MaskStrategy, few: int, more: int, seed: int) -> None:
    least = 12
    long = draw_visible(strategy, 6, 6, few + more, (seed, 0), least)
    short = draw_visible(strategy, 6, 6, few, (seed, 0), least)
    assert np.array_equal(long[:few], short)
    assert np.array_equal(thin(long, least, (seed, 0))[:few], thin(short, least, (seed, 0)))


@pytest.mark.parametrize(
    ("strategy", "mean", "sd", "centre", "edge", "corner"),
    [(SHORT, 97.3, 19.4, 0.05, 0.66, 0.93), (LONG, 48.5, 17.9, 0.00, 0.36, 0.81)],
)
def test_trap_26_raw_sampler_reproduces_the_table(
    strategy: MaskStrategy, mean: float, sd: float, centre: float, edge: float, corner: float
) -> None:
    """docs/method.md 2.3, at 3 % and 0.02. Tab. 8 read as ranges would miss by far."""
    drawn = draw_visible(strategy, 16, 16, 1 << 14, (0, 0))
    found, visible = statistics(drawn), drawn.mean(axis=0).reshape(16, 16)
    assert found["mean"] == pytest.approx(mean, rel=0.03)
    assert found["sd"] == pytest.approx(sd, rel=0.03)
    assert float(visible[7:9, 7:9].mean()) == pytest.approx(centre, abs=0.02)
    assert float(visible[[0, -1], 7:9].mean()) == pytest.approx(edge, abs=0.02)
    assert float(visible[[0, 0, -1, -1], [0, -1, 0, -1]].mean()) == pytest.approx(corner, abs=0.02)


def test_trap_26_two_strategies_of_the_paper() -> None:
    assert [(s.blocks, s.scale, s.budget) for s in MaskConfig().strategies] == [(8, 0.15, 60), (2, 0.7, 15)]


def test_plan_keeps_exact_budgets_inside_what_was_visible() -> None:
    plan = draw_plan(MaskConfig(entries=2048), 16, 16)
    assert [strategy.name for strategy in plan.strategies] == ["short", "long"]
    for strategy, budget in zip(plan.strategies, (60, 15), strict=True):
        assert strategy.kept is not None
        assert (strategy.kept.sum(axis=1) == budget).all()
        assert not (strategy.kept & ~strategy.raw).any()
        assert strategy.raw.shape == (2048, 256)
    first, second = plan.strategies
    assert not np.array_equal(first.raw[0], second.raw[0])


def test_trap_25_entries_differ_and_seeds_differ() -> None:
    plans = [draw_plan(MaskConfig(entries=512, seed=seed), 16, 16) for seed in (0, 1)]
    kept = plans[0].strategies[0].kept
    assert kept is not None
    assert len(np.unique(pack(kept), axis=0)) == 512
    assert not np.array_equal(plans[0].strategies[0].raw, plans[1].strategies[0].raw)


def test_thinning_is_uniform_over_visible_cells() -> None:
    """Every visible cell is kept as often as any other: 4 of 10 in 20000 entries, five standard errors."""
    raw = np.tile(np.array([True] * 10 + [False] * 6), (20000, 1))
    share = thin(raw, 4, (0, 0)).mean(axis=0)
    assert (share[10:] == 0).all()
    assert np.abs(share[:10] - 0.4).max() < 5 * math.sqrt(0.4 * 0.6 / 20000)


def test_a_budget_that_blocks_never_leave_is_refused() -> None:
    greedy = MaskStrategy(name="greedy", blocks=1, scale=0.5, budget=60)
    with pytest.raises(ConfigError, match=r"'greedy'.*lower the budget"):
        draw_plan(MaskConfig(strategies=(greedy,), entries=4), 8, 8)


@pytest.mark.parametrize("keep", ["all", "flat"])
def test_plans_without_entries(keep: str) -> None:
    assert draw_plan(MaskConfig(keep=keep), 16, 16).strategies == ()


@given(st.integers(1, 40), st.integers(0, 5), st.integers(0, 99))
def test_packed_bits_are_row_major_little_endian(cells: int, entries: int, seed: int) -> None:
    bits = np.random.default_rng(seed).random((entries, cells)) < 0.5
    packed = pack(bits)
    assert packed.shape == (entries, -(-cells // 8))
    assert np.array_equal(unpack(packed, cells), bits)
    for entry in range(entries):
        for cell in range(cells):
            assert bool(packed[entry, cell // 8] >> (cell % 8) & 1) == bits[entry, cell]


def test_cells_ascend() -> None:
    kept = np.array([[False, True, True, False], [True, False, False, True]])
    assert cells_of(kept).tolist() == [[1, 2], [0, 3]]
    with pytest.raises(AssertionError, match="different numbers"):
        cells_of(np.array([[True, True], [True, False]]))


def test_trap_25_bucket_is_a_function_of_the_step_and_follows_the_counts() -> None:
    plan = draw_plan(MaskConfig(keep="bucket", entries=4096), 16, 16).strategies[0]
    assert plan.kept is None
    buckets = Buckets.of(plan.raw)
    steps = [step_bucket(buckets, (0, 0), step) for step in range(400)]
    assert steps == [step_bucket(buckets, (0, 0), step) for step in range(400)]
    assert {bucket % 8 for bucket in steps} == {0}
    assert np.mean(steps) == pytest.approx(float(plan.raw.sum(axis=1).mean()) - 3.5, abs=4)  # 400 of sd 19: error 1


def one_by_one(raw: np.ndarray, bucket: int, key: tuple[int, int], draw: int) -> np.ndarray:
    """The same for one draw: every entry is counted, the cells of one are sorted by random numbers."""
    members = [entry for entry, bits in enumerate(raw) if bits.sum() // 8 == bucket // 8]
    rng = np.random.default_rng([*key, 1002, draw])
    entry = raw[members[rng.integers(len(members))]]
    order: list[float] = np.asarray(rng.random(raw.shape[1])).tolist()
    return np.array(sorted(sorted(np.flatnonzero(entry).tolist(), key=order.__getitem__)[:bucket]))


def test_bucket_entries_keep_the_bucket_and_differ_by_draw() -> None:
    plan = draw_plan(MaskConfig(keep="bucket", entries=1024), 16, 16).strategies[0]
    found = bucket_entries(Buckets.of(plan.raw), 96, (0, 0), range(20))
    assert all(len(cells) == 96 and (np.diff(cells) > 0).all() for cells in found)
    assert len({tuple(cells) for cells in found}) == 20
    assert all(np.array_equal(cells, one_by_one(plan.raw, 96, (0, 0), draw)) for draw, cells in enumerate(found))
    raws = {tuple(row) for row in plan.raw.tolist()}
    inside = [any(all(row[cell] for cell in cells) for row in raws) for cells in found[:3]]
    assert all(inside)


def one_entry(strategy: MaskStrategy, key: tuple[int, ...], shape: float, least: int) -> np.ndarray:
    """Blocks of a generator of its own until enough cells are visible."""
    rng = np.random.default_rng(key)
    while True:
        entry = by_hand(strategy, 16, 16, np.array([shape, *rng.random(2 * strategy.blocks)]))
        if entry.sum() >= least:
            return entry


def test_flat_draws_each_clip_from_a_generator_of_its_own() -> None:
    shape = np.random.default_rng([7, 1, 1003, 5]).random()
    least = min(int(one_entry(LONG, (7, 1, 1004, 5, number), shape, 1).sum()) for number in range(32))
    for draw, found in enumerate(flat_ids(LONG, 16, 16, 8, (7, 1), 5, range(4))):
        entry = one_entry(LONG, (7, 1, 1005, 5, draw), shape, least)
        ids = [tubelet * 256 + cell for tubelet in range(8) for cell in np.flatnonzero(entry)]
        assert found.tolist() == ids[: least * 8]


def test_flat_is_the_ancestors_prefix_and_independent_of_the_batch() -> None:
    """Equal lengths whatever the split over ranks; sorted ids; late tubelets lose their cells (docs/method.md 2.3)."""
    draws = list(range(16))
    whole = flat_ids(SHORT, 16, 16, 8, (0, 0), 5, draws)
    halves = [flat_ids(SHORT, 16, 16, 8, (0, 0), 5, part) for part in (draws[:5], draws[5:])]
    assert np.array_equal(whole, np.concatenate(halves))
    assert (np.diff(whole, axis=1) > 0).all()
    assert whole.shape[1] % 8 == 0
    first, last = (whole < 256).sum(axis=1), (whole >= 7 * 256).sum(axis=1)
    assert (first >= whole.shape[1] // 8).all()
    assert (last == 0).mean() > 0.5
    assert flat_ids(SHORT, 16, 16, 8, (0, 0), 6, draws).shape != whole.shape or not np.array_equal(
        whole, flat_ids(SHORT, 16, 16, 8, (0, 0), 6, draws)
    )


@pytest.mark.parametrize(("index", "cells", "slack"), [(0, 60, 4), (1, 15, 2)])
def test_flat_lengths_are_those_of_a_local_batch_of_32(index: int, cells: int, slack: int) -> None:
    """docs/method.md 2.4: 60 and 15 cells at 32 clips per GPU; three standard errors of 60 steps."""
    strategy = (SHORT, LONG)[index]
    lengths = [flat_ids(strategy, 16, 16, 1, (0, index), step, [0]).shape[1] for step in range(60)]
    assert np.mean(lengths) == pytest.approx(cells, abs=slack)
