"""Block masks: which cells each strategy leaves visible, and how they are thinned (docs/method.md 2). numpy only.

A mask is spatial and holds for every tubelet (a tube), so an entry of a mask plan is S booleans. Entry i depends on
(seed, strategy, i) alone, not on how many entries there are. Which entry a clip takes is decided in storage/draws.py.

Axes: E entries, H and W cells, S = H*W cells, n visible cells, L visible tokens, u uniform numbers.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from nextvid.config.recipe import ConfigError, MaskConfig, MaskStrategy
from nextvid.model.seeding import generators

ATTEMPTS = 1000  # draws of an entry before the configuration is refused; 97 % succeed at once (docs/method.md 2.4)
CHUNK = 8192  # entries drawn at once: our choice, about 70 MB on a 16x16 grid
GRID = 8  # `bucket` keeps a multiple of this many cells (docs/method.md 2.4)
FLAT_BATCH = 32  # local batch whose truncation `flat` reproduces: 3072 clips on 96 GPUs (docs/method.md 2.3)

Bits = Bool[np.ndarray, "E S"]


@dataclass(frozen=True)
class StrategyPlan:
    """Visible cells of one strategy: as drawn, and after thinning (None for `bucket`, which thins at each step)."""

    name: str
    raw: Bits
    kept: Bits | None


@dataclass(frozen=True)
class MaskPlan:
    """Entries of every strategy; no strategies for `all` and `flat`, which need no plan."""

    grid_height: int
    grid_width: int
    strategies: tuple[StrategyPlan, ...]


def draw_plan(
    masks: MaskConfig, grid_height: int, grid_width: int, on_drawn: Callable[[int], None] = lambda _: None
) -> MaskPlan:
    """Draw every entry of a mask configuration; `on_drawn` is told how many strategies are drawn.

    Raises ConfigError if a strategy's blocks hardly ever leave its budget visible.
    """
    plans = []
    if masks.keep in ("fixed", "bucket"):
        for index, strategy in enumerate(masks.strategies):
            least = strategy.budget if masks.keep == "fixed" else GRID
            raw = draw_visible(strategy, grid_height, grid_width, masks.entries, (masks.seed, index), least)
            kept = thin(raw, strategy.budget, (masks.seed, index)) if masks.keep == "fixed" else None
            plans.append(StrategyPlan(strategy.name, raw, kept))
            on_drawn(len(plans))
    return MaskPlan(grid_height, grid_width, tuple(plans))


def draw_visible(
    strategy: MaskStrategy, height: int, width: int, entries: int, key: tuple[int, int], least: int = 1
) -> Bits:
    """Complements of the union of blocks, one block size an entry; entries with fewer than `least` cells are redrawn.

    With `least=1` this is V-JEPA 2's sampler, except that there a batch shares one block size. `key` is (seed,
    strategy). Raises ConfigError if some entry fails every attempt.
    """
    visible = np.zeros((entries, height * width), dtype=bool)
    todo = np.arange(entries)
    for attempt in range(ATTEMPTS):
        rng = np.random.default_rng([*key, attempt])
        uniform = rng.random((int(todo[-1]) + 1, 1 + 2 * strategy.blocks))[todo]
        drawn = np.concatenate([_blocks(strategy, height, width, part) for part in _chunks(uniform)])
        enough = drawn.sum(axis=1) >= least
        visible[todo[enough]] = drawn[enough]
        todo = todo[~enough]
        if todo.size == 0:
            return visible
    raise ConfigError(
        f"mask strategy '{strategy.name}': {strategy.blocks} blocks of {strategy.scale} of a {height}x{width} grid "
        f"leave {least} cells visible too rarely ({todo.size} of {entries} entries failed {ATTEMPTS} draws); "
        "lower the budget, the scale or the number of blocks"
    )


def thin(raw: Bits, budget: int, key: tuple[int, int]) -> Bits:
    """A uniformly random subset of exactly `budget` visible cells in each entry. Every entry must have that many."""
    assert raw.sum(axis=1).min(initial=budget) >= budget, "an entry has fewer visible cells than the budget"
    rng = np.random.default_rng([*key, ATTEMPTS])  # no attempt of draw_visible has this number
    thinned = np.zeros_like(raw)
    for kept, part in zip(_chunks(thinned), _chunks(raw), strict=True):
        np.put_along_axis(kept, _chosen(part, budget, rng.random(part.shape)), values=True, axis=1)
    return thinned


def cells_of(kept: Bits) -> Int[np.ndarray, "E n"]:
    """Ascending cell indices, int64, of entries that all keep equally many cells."""
    counts = kept.sum(axis=1)
    assert counts.size == 0 or (counts == counts[0]).all(), "entries keep different numbers of cells"
    return np.nonzero(kept)[1].reshape(len(kept), -1)


def pack(bits: Bits) -> UInt8[np.ndarray, "E bytes"]:
    """Row-major bits, little-endian in each byte: cell i of an entry is bit i % 8 of byte i // 8."""
    return np.packbits(bits, axis=1, bitorder="little")


def unpack(packed: UInt8[np.ndarray, "E bytes"], cells: int) -> Bits:
    """The inverse of `pack` for entries of `cells` cells."""
    return np.unpackbits(packed, axis=1, count=cells, bitorder="little").astype(bool)


def statistics(bits: Bits) -> dict[str, float | int]:
    """Visible cells per tubelet over the entries."""
    counts = bits.sum(axis=1)
    spread = {"mean": float(counts.mean()), "sd": float(counts.std())}
    return {**spread, "least": int(counts.min()), "most": int(counts.max())}


@dataclass(frozen=True)
class Buckets:
    """What `bucket` draws from: a plan's entries, sorted by how many cells are visible in multiples of GRID."""

    raw: Bits
    levels: Int[np.ndarray, " E"]  # visible cells of each entry over GRID, rounded down
    members: tuple[Int[np.ndarray, " _"], ...]  # entries of each level, ascending

    @classmethod
    def of(cls, raw: Bits) -> "Buckets":
        """Sort the entries; once a plan, since it reads all of it."""
        levels = raw.sum(axis=1) // GRID
        starts = np.cumsum(np.bincount(levels))
        return cls(raw, levels, tuple(np.split(np.argsort(levels, kind="stable"), starts[:-1])))


def step_bucket(buckets: Buckets, key: tuple[int, int], step: int) -> int:
    """Cells that every clip keeps at this step under `bucket`: the count of a random entry, down to a multiple of 8.

    It depends on (seed, strategy, step) alone, so all ranks have the same shapes.
    """
    rng = np.random.default_rng([*key, ATTEMPTS + 1, step])
    return int(buckets.levels[rng.integers(len(buckets.levels))]) * GRID


def bucket_entries(buckets: Buckets, bucket: int, key: tuple[int, int], draws: Sequence[int]) -> Int[np.ndarray, "B n"]:
    """The `bucket` cells of each draw number: a random entry of that bucket, thinned to it; ascending, int64."""
    members = buckets.members[bucket // GRID]
    rngs = generators((*key, ATTEMPTS + 2), draws)
    entries = buckets.raw[members[[rng.integers(len(members)) for rng in rngs]]]
    return np.sort(_chosen(entries, bucket, _uniform(rngs, entries.shape[1])), axis=1)


def flat_ids(
    strategy: MaskStrategy,
    height: int,
    width: int,
    tubelets: int,
    key: tuple[int, int],
    step: int,
    draws: Sequence[int],
) -> Int[np.ndarray, "E L"]:
    """Visible flat ids of `flat`, V-JEPA 2's truncation, for the clips with these draw numbers; int64.

    One block size a step. The length is the shortest of 32 emulated clips of the step, so neither ranks nor
    micro-batches change it. A clip's own blocks are drawn from (step, draw) until at least that many cells are visible,
    and the sorted list of (t, h, w) is cut to a prefix, which empties late tubelets.
    """
    shape = np.random.default_rng([*key, ATTEMPTS + 3, step]).random()

    def entries(purpose: int, numbers: Sequence[int], least: int) -> Bits:
        """One entry a number, each drawn from its own generator until enough cells are visible."""
        rngs = generators((*key, ATTEMPTS + purpose, step), numbers)
        found, todo = np.empty((len(rngs), height * width), dtype=bool), np.arange(len(rngs))
        while todo.size:
            uniform = np.full((todo.size, 1 + 2 * strategy.blocks), shape)
            uniform[:, 1:] = _uniform([rngs[each] for each in todo], 2 * strategy.blocks)
            found[todo] = _blocks(strategy, height, width, uniform)
            todo = todo[found[todo].sum(axis=1) < least]
        return found

    least = int(entries(4, range(FLAT_BATCH), 1).sum(axis=1).min())
    starts = height * width * np.arange(tubelets)[:, None]
    tubes = [(starts + np.flatnonzero(entry)).ravel() for entry in entries(5, draws, least)]
    return np.stack([tube[: least * tubelets] for tube in tubes])


def _blocks(strategy: MaskStrategy, height: int, width: int, uniform: Float[np.ndarray, "E u"]) -> Bits:
    """Visible cells from uniform numbers: the aspect ratio, then top and left of each block (docs/method.md 2.2)."""
    area = int(height * width * strategy.scale)
    aspect = strategy.aspect_min + uniform[:, 0] * (strategy.aspect_max - strategy.aspect_min)
    tall = np.minimum(height, np.rint(np.sqrt(area * aspect))).astype(np.int64)[:, None]
    wide = np.minimum(width, np.rint(np.sqrt(area / aspect))).astype(np.int64)[:, None]
    top = np.floor(uniform[:, 1::2] * (height - tall + 1)).astype(np.int64)
    left = np.floor(uniform[:, 2::2] * (width - wide + 1)).astype(np.int64)
    row, column = np.arange(height), np.arange(width)
    hidden = np.zeros((len(uniform), height, width), dtype=bool)
    for block in range(strategy.blocks):
        first_row, first_column = top[:, block, None], left[:, block, None]
        rows = (row >= first_row) & (row < first_row + tall)
        columns = (column >= first_column) & (column < first_column + wide)
        hidden |= rows[:, :, None] & columns[:, None, :]
    return ~hidden.reshape(len(uniform), -1)


def _uniform(rngs: Sequence[np.random.Generator], count: int) -> Float[np.ndarray, "E u"]:
    """The next uniform numbers of each generator."""
    found = np.empty((len(rngs), count))
    for rng, row in zip(rngs, found, strict=True):
        rng.random(out=row)
    return found


def _chosen(raw: Bits, budget: int, uniform: Float[np.ndarray, "E S"]) -> Int[np.ndarray, "E n"]:
    """The `budget` visible cells with the smallest random numbers, in no order."""
    return np.argpartition(np.where(raw, uniform, math.inf), budget - 1, axis=1)[:, :budget]


def _chunks(rows: np.ndarray) -> list[np.ndarray]:
    return [rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]
