"""storage/draws.py: exact quotas, bijections, and one answer however it is asked."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.draws import BLOCK, Draws, mask_entries, mask_entry, permute, permute_all, round_keys
from storage.errors import ConfigError

WEIGHTS = st.dictionaries(
    st.sampled_from(["kinetics400", "kinetics700", "imagenet1k", "ssv2", "howto100m"]),
    st.floats(0.001, 1000).map(lambda weight: float(f"{weight:.4g}")),
    min_size=1,
)


@st.composite
def some_draws(draw: st.DrawFn) -> Draws:
    weights = draw(WEIGHTS)
    sizes = {name: draw(st.integers(1, 5000) | st.integers(1, 10**9)) for name in weights}
    return Draws(draw(st.integers(0, 2**63)), weights, sizes)


@given(some_draws(), st.integers(0, 10**12), st.integers(0, 2500))
def test_range_equals_at(draws: Draws, start: int, count: int) -> None:
    datasets, rows = draws.range(start, count)
    assert datasets.shape == rows.shape == (count,)
    for n in range(0, count, 211):
        assert draws.at(start + n) == (datasets[n], rows[n])


def test_range_equals_at_across_blocks() -> None:
    draws = Draws(3, {"a": 0.5, "b": 0.3, "c": 0.2}, {"a": 100, "b": 7, "c": 10**9})
    datasets, rows = draws.range(BLOCK - 5, 2 * BLOCK)
    for n in [*range(8), *range(8, 2 * BLOCK, 97)]:
        assert draws.at(BLOCK - 5 + n) == (datasets[n], rows[n])


@given(some_draws(), st.integers(1, 6))
def test_quotas_are_exact_after_every_block(draws: Draws, blocks: int) -> None:
    """A dataset's count never leaves its share by more than 2 draws, and every block is shared out whole."""
    datasets, _ = draws.range(0, blocks * BLOCK)
    weights = np.array(draws._weights, dtype=float)
    for block in range(1, blocks + 1):
        counts = np.bincount(datasets[: block * BLOCK], minlength=len(weights))
        assert counts.sum() == block * BLOCK
        assert np.abs(counts - block * BLOCK * weights / weights.sum()).max() <= 2


@given(WEIGHTS, st.integers(0, 10**9))
def test_quotas_stay_exact_far_out(weights: dict[str, float], block: int) -> None:
    draws = Draws(0, weights, dict.fromkeys(weights, 10))
    before, after = draws._quotas(block), draws._quotas(block + 1)
    assert sum(before) == block * BLOCK
    assert all(last >= first for first, last in zip(before, after, strict=True))
    total = sum(draws._weights)
    for count, weight in zip(before, draws._weights, strict=True):
        assert abs(count * total - block * BLOCK * weight) <= 2 * total


def test_weights_are_read_as_decimals() -> None:
    draws = Draws(0, {"a": 0.1, "b": 0.2, "c": 0.7}, {"a": 5, "b": 5, "c": 5})
    assert draws._weights == (1, 2, 7)
    assert draws._quotas(10 * 5) == [5120, 10240, 35840]


def test_the_papers_mixture() -> None:
    """Shares after 100 blocks of a mixture with one dataset of 1 in 1000."""
    weights = {"big": 0.949, "small": 0.05, "rare": 0.001}
    datasets, rows = Draws(1, weights, {"big": 10**7, "small": 10**5, "rare": 200}).range(0, 100 * BLOCK)
    assert np.bincount(datasets).tolist() == [97178, 102, 5120]
    rare = rows[datasets == 1]
    assert len(set(rare.tolist())) == 102


@given(some_draws())
def test_every_row_once_a_pass(draws: Draws) -> None:
    datasets, rows = draws.range(0, 4 * BLOCK)
    for dataset, size in enumerate(draws._sizes):
        mine = rows[datasets == dataset]
        assert ((mine >= 0) & (mine < size)).all()
        for first in range(0, len(mine), size):
            one_pass = mine[first : first + size]
            assert len(np.unique(one_pass)) == len(one_pass)


def test_passes_differ_and_seeds_differ() -> None:
    draws = Draws(5, {"a": 1}, {"a": 512})
    passes = draws.range(0, 4 * 512)[1].reshape(4, 512)
    other = Draws(6, {"a": 1}, {"a": 512}).range(0, 512)[1]
    assert sorted(passes[0].tolist()) != passes[0].tolist()
    assert all((passes[0] != later).mean() > 0.95 for later in [*passes[1:], other])


def test_a_dataset_more_leaves_the_others_order() -> None:
    """The n-th draw of a dataset takes the same row whatever else is in the mixture; only when it comes differs."""
    sizes = {"b": 3000, "d": 5000}
    before = Draws(9, {"b": 1, "d": 2}, sizes)
    after = Draws(9, {"b": 1, "d": 2, "a": 1, "c": 3}, sizes | {"a": 10, "c": 10})
    for name, size in sizes.items():
        numbers = np.arange(2 * size)
        orders = [draws._rows(draws.datasets.index(name), numbers) for draws in (before, after)]
        assert np.array_equal(orders[0], orders[1])
        assert not np.array_equal(orders[0][:size], orders[0][size:])
    blocks = 6  # after them 2048 draws of b before, 878 after; its first ones are the same rows
    found = []
    for draws in (before, after):
        datasets, rows = draws.range(0, blocks * BLOCK)
        found.append(set(rows[datasets == draws.datasets.index("b")].tolist()))
    assert [len(rows) for rows in found] == [2048, 878]
    assert found[1] < found[0]


@given(st.integers(1, 3000), st.integers(0, 2**64))
def test_permutations_are_bijections(size: int, seed: int) -> None:
    keys = round_keys("test", seed)
    places = np.arange(size, dtype=np.uint64)
    found = permute_all(places, size, keys)
    assert np.array_equal(np.sort(found), places)
    assert [permute(place, size, keys) for place in range(0, size, 13)] == found[::13].tolist()


def test_permutations_look_random() -> None:
    """Position and value are uncorrelated, and a place's image is uniform over seeds (chi-square, 15 degrees)."""
    size = 4096
    found = permute_all(np.arange(size, dtype=np.uint64), size, round_keys("t", 1)).astype(float)
    assert abs(np.corrcoef(np.arange(size), found)[0, 1]) < 0.06
    assert abs(np.corrcoef(found[1:], found[:-1])[0, 1]) < 0.06
    images = np.bincount([permute(3, 16, round_keys("t", seed)) for seed in range(3200)], minlength=16)
    assert ((images - 200) ** 2 / 200).sum() < 50  # p = 1e-5; seeds are fixed


@given(st.integers(0, 2**32), st.integers(0, 3), st.integers(1, 300), st.integers(0, 5))
def test_mask_entries_are_a_permutation_each_pass(seed: int, strategy: int, entries: int, taken: int) -> None:
    first = taken * entries
    found = [mask_entry(seed, strategy, g, entries) for g in range(first, first + entries)]
    assert sorted(found) == list(range(entries))


@given(st.integers(0, 2**32), st.integers(0, 3), st.integers(1, 10**6), st.integers(0, 10**12), st.integers(0, 2500))
def test_mask_entries_of_many_draws(seed: int, strategy: int, entries: int, start: int, count: int) -> None:
    found = mask_entries(seed, strategy, start, count, entries)
    assert found.shape == (count,)
    for n in range(0, count, 211):
        assert found[n] == mask_entry(seed, strategy, start + n, entries)


def test_mask_entries_differ_by_strategy_seed_and_pass() -> None:
    def entries(seed: int, strategy: int, start: int) -> list[int]:
        return [mask_entry(seed, strategy, g, 256) for g in range(start, start + 256)]

    base = np.array(entries(1, 0, 0))
    for other in (entries(2, 0, 0), entries(1, 1, 0), entries(1, 0, 256)):
        assert (base != np.array(other)).mean() > 0.9


def test_the_first_draws_never_change(repository: Path) -> None:
    """Runs are resumed by number: another order would silently train on other rows. Also equal in a fresh process."""
    weights, sizes = {"k400": 0.7, "images": 0.3}, {"k400": 240_000, "images": 1_281_167}
    draws = Draws(20260101, weights, sizes)
    code = (
        f"from storage.draws import Draws; print([Draws(20260101, {weights}, {sizes}).at(g) for g in (0, 1, 2, 1500)])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=repository)
    assert said.stdout.strip() == str([draws.at(g) for g in (0, 1, 2, 1500)])
    assert [draws.at(g) for g in (0, 1, 2, 1500)] == GOLDEN


GOLDEN = [(1, 192836), (1, 181605), (1, 3369), (1, 83724)]  # written by this code's first version


@pytest.mark.parametrize(
    ("weights", "sizes"),
    [
        ({}, {}),
        ({"a": 1.0}, {"b": 1}),
        ({"a": 0.0}, {"a": 1}),
        ({"a": -1.0}, {"a": 1}),
        ({"a": 1.0}, {"a": 0}),
        ({"a": float("nan")}, {"a": 1}),
        ({"a": float("inf")}, {"a": 1}),
    ],
)
def test_what_cannot_be_drawn_is_refused(weights: dict[str, float], sizes: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        Draws(0, weights, sizes)
