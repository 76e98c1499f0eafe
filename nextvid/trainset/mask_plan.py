"""The asset `mask_plan`: the visible cells of every masking strategy, drawn once, under a digest of the configuration.

mask_plan/<digest>/ has plan.json with statistics, `<strategy>.raw.npy` (as drawn) and, for `fixed`, `<strategy>.npy`
(thinned to the budget) as packed bits, a gallery, and the checks. The sampler is nextvid/model/masks.py. All four ways
of thinning have a plan and a digest; `flat` and `all` have no entries.

Axes: E entries, S cells.
"""

import io
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from einops import rearrange
from jaxtyping import Bool, Int
from PIL import Image, ImageDraw

from nextvid.config.project import Project
from nextvid.config.recipe import MaskConfig, MaskStrategy, ModelConfig, RecipeConfig
from nextvid.graph import GRAPH
from nextvid.making.outcome import Check, Outcome
from nextvid.making.progress import OnProgress, Progress, silent
from nextvid.making.publishing import addressed
from nextvid.model.masks import cells_of, draw_plan, draw_visible, pack, statistics, unpack
from nextvid.pictures import SHEET_BACKGROUND, SHEET_INK, sheet_png
from storage import atomic, tables
from storage.digest import digest_bytes, digest_config
from storage.errors import DamagedError
from storage.records import publish_record, read_record
from storage.root import DataRoot

SIGMAS = 6.0  # our bound on the thinning statistic: a false alarm has a chance of about 1e-9
TOLERANCE = 0.02  # of the probabilities of the raw sampler, as docs/method.md 2.3 gives them
MEAN_TOLERANCE = 0.03  # of the mean of visible cells, relative
# docs/method.md 2.3: mean of visible cells; P(visible) at centre, middle of the upper edge, corner
PAPER_STATISTICS = {(8, 0.15): (97.3, 0.05, 0.66, 0.93), (2, 0.70): (48.5, 0.00, 0.36, 0.81)}
PAPER_GRID = (16, 16)
# the gallery: our choices
SHOWN = 12  # entries of each strategy
CELL = 8  # pixels
GAP = 6  # pixels between pictures
CAPTION = 14  # pixels
MASKED, THINNED, KEPT = (38, 40, 48), (96, 108, 128), (250, 204, 92)

Bits = Bool[np.ndarray, "E S"]


@dataclass(frozen=True)
class OpenedPlan:
    """A mask plan in memory: raw and kept bits by strategy name; empty for `flat` and `all`."""

    digest: str
    masks: MaskConfig
    grid: tuple[int, int]
    raw: dict[str, Bits]
    kept: dict[str, Bits]

    def cells(self, strategy: str) -> Int[np.ndarray, "E n"]:
        """Visible cells of every entry of a `fixed` plan, ascending."""
        return cells_of(self.kept[strategy])


def plan_digest(masks: MaskConfig, grid: tuple[int, int]) -> str:
    """Identity of a plan: configuration, grid, and the maker's version, which is raised where it draws other bits."""
    return digest_config(
        {"masks": masks.model_dump(mode="json"), "grid": list(grid), "sampler": GRAPH["mask_plan"].version}
    )


def grid_of(model: ModelConfig) -> tuple[int, int]:
    """Cells per tubelet, as rows and columns."""
    return model.grid_height, model.grid_width


def make_mask_plan(project: Project, recipe: str, on_progress: OnProgress = silent) -> Outcome:
    """Draw the plan of a recipe, unless it is there."""
    return make_plan(project.root, project.recipe(recipe), on_progress)


def make_plan(root: DataRoot, recipe: RecipeConfig, on_progress: OnProgress = silent) -> Outcome:
    """Draw, check and write the plan of a recipe's masks, unless it is there."""
    started = time.perf_counter()
    masks, grid = recipe.masks, grid_of(recipe.model)
    name = plan_digest(masks, grid)
    with addressed(root, "mask_plan", name) as made:
        if made.new:
            total, about = len(masks.strategies), f"mask_plan {recipe.name}"
            strategies = draw_plan(masks, *grid, lambda done: on_progress(Progress(about, done, total))).strategies
            raw = {strategy.name: strategy.raw for strategy in strategies}
            kept = {strategy.name: strategy.kept for strategy in strategies if strategy.kept is not None}
            opened = OpenedPlan(name, masks, grid, raw, kept)
            made.checks = _checks(opened, recipe)
            _write(opened, made.path)
            atomic.publish_bytes(f"{made.path}/gallery.png", gallery(raw, kept, grid))
    folder = root.pointed("mask_plan", name)
    plan = read_plan(folder)
    sizes, found = [len(data) for _, data in read_files(folder, plan)], plan["statistics"]
    return Outcome(
        asset="mask_plan",
        partition=recipe.name,
        made=made.new,
        rows=masks.entries * len(found),
        size_bytes=sum(sizes) if made.new else 0,
        seconds=time.perf_counter() - started,
        digest=name,
        numbers={f"{strategy}_{key}": value for strategy, some in found.items() for key, value in some.items()},
        pictures={"mask gallery": f"{folder}/gallery.png"},
        checks=made.checks,
    )


def open_mask_plan(root: DataRoot, masks: MaskConfig, grid: tuple[int, int]) -> OpenedPlan:
    """The plan of these masks.

    Raises UpstreamError where it is missing or failed its checks, DamagedError where its files changed.
    """
    name = plan_digest(masks, grid)
    folder = root.pointed("mask_plan", name)
    tables.require_checks(f"{folder}/checks.json", "mask_plan")
    raw: dict[str, Bits] = {}
    kept: dict[str, Bits] = {}
    for file, data in read_files(folder, read_plan(folder)):
        bits = unpack(np.load(io.BytesIO(data), allow_pickle=False), grid[0] * grid[1])
        strategy, _, stage = file.removesuffix(".npy").partition(".")
        (raw if stage == "raw" else kept)[strategy] = bits
    return OpenedPlan(name, masks, grid, raw, kept)


def read_plan(folder: str) -> dict[str, Any]:
    """plan.json of a mask plan's folder. DamagedError where it is not that of the digest which the folder has."""
    remedy = f"remove the folder {folder} and make mask_plan again"
    plan = read_record(f"{folder}/plan.json", remedy)
    named = {name: plan.get(name) for name in ("masks", "grid", "sampler")}
    if digest_config(named) != folder.rpartition("/")[2] or not {"files", "statistics"} <= plan.keys():
        raise DamagedError(f"{folder}/plan.json describes another plan than the folder's name says; {remedy}")
    return plan


def read_files(folder: str, plan: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
    """Name and content of each file that a plan.json names. DamagedError where one changed."""
    for file, digest in plan["files"].items():
        if "/" in file:
            raise DamagedError(
                f"{folder}/plan.json names {file!r}, which is no file of its folder: make mask_plan again"
            )
        data = atomic.read_bytes(f"{folder}/{file}")
        if digest_bytes(data) != digest:
            raise DamagedError(
                f"{folder}/{file}: bytes differ from plan.json; remove the folder {folder} and make mask_plan again"
            )
        yield file, data


def _write(plan: OpenedPlan, folder: str) -> None:
    """Write the bits, and plan.json, which names their digests."""
    files: dict[str, str] = {}
    for suffix, bits_by_name in ((".raw.npy", plan.raw), (".npy", plan.kept)):
        for name, bits in bits_by_name.items():
            buffer = io.BytesIO()
            np.save(buffer, pack(bits), allow_pickle=False)
            atomic.publish_bytes(f"{folder}/{name}{suffix}", buffer.getvalue())
            files[name + suffix] = digest_bytes(buffer.getvalue())
    numbers = {}
    for name, bits in plan.raw.items():
        numbers[name] = {f"visible_{what}": number for what, number in statistics(bits).items()}
    described = {
        "masks": plan.masks.model_dump(mode="json"),
        "grid": list(plan.grid),
        "sampler": GRAPH["mask_plan"].version,
        "bits": "row-major, little-endian: cell i of an entry is bit i % 8 of byte i // 8",
        "files": files,
        "statistics": numbers,
    }
    publish_record(f"{folder}/plan.json", described)


def _checks(plan: OpenedPlan, recipe: RecipeConfig) -> tuple[Check, ...]:
    budgets = {strategy.name: strategy.budget for strategy in plan.masks.strategies}
    wrong = sum(int((bits.sum(axis=1) != budgets[name]).sum()) for name, bits in plan.kept.items())
    statistic, bound = thinning_statistic(plan)
    worst = max((_raw_error(plan, index) for index in range(len(plan.raw))), default=0.0)
    return (
        Check("budgets_exact", wrong == 0, {"entries": sum(map(len, plan.kept.values())), "wrong": wrong}),
        Check("tubes_constant", _tubes_constant(plan, recipe), {"strategies": len(plan.kept)}),
        Check("thinning_uniform", statistic <= bound, {"statistic": statistic, "bound": bound}),
        Check(
            "raw_statistics",
            worst <= 1.0,
            {"worst_of_tolerance": worst, "paper_geometry": int(any(_paper(plan, s) for s in plan.masks.strategies))},
        ),
    )


def _tubes_constant(plan: OpenedPlan, recipe: RecipeConfig) -> bool:
    """Whether ids as training builds them hold the same cells in every tubelet, for every clip length."""
    import torch

    from nextvid.model.tokens import tube_ids

    total = plan.grid[0] * plan.grid[1]
    for name, bits in plan.kept.items():
        if len(np.unique(bits.sum(axis=1))) > 1:
            return False
        cells = torch.from_numpy(plan.cells(name)[:1024])
        for frames in recipe.clip_lengths:
            ids = tube_ids(cells, frames // recipe.model.tubelet, total).unflatten(1, (-1, cells.shape[1]))
            starts = total * torch.arange(ids.shape[1])[None, :, None]
            if not torch.equal(ids - starts, cells[:, None].expand_as(ids)):
                return False
    return True


def thinning_statistic(plan: OpenedPlan) -> tuple[float, float]:
    """How far thinning departs from uniform, and its bound, over all cells of all strategies.

    Given an entry's n visible cells each is kept with probability budget / n; the sum over entries of (kept - that) at
    one cell has that binomial variance. The squares of the standardised sums add up to about one a cell.
    """
    total, cells = 0.0, 0
    for name, kept in plan.kept.items():
        raw = plan.raw[name]
        share = kept.sum(axis=1) / raw.sum(axis=1)
        expected = share @ raw
        variance = (share * (1 - share)) @ raw
        varying = variance > 0
        total += float(((kept.sum(axis=0) - expected)[varying] ** 2 / variance[varying]).sum())
        cells += int(varying.sum())
        if (kept & ~raw).any():
            return math.inf, 0.0
    return total, cells + SIGMAS * math.sqrt(2 * cells)


def _paper(plan: OpenedPlan, strategy: MaskStrategy) -> bool:
    plain = (strategy.aspect_min, strategy.aspect_max) == (0.75, 1.5)
    return plan.grid == PAPER_GRID and plain and (strategy.blocks, strategy.scale) in PAPER_STATISTICS


def _raw_error(plan: OpenedPlan, index: int) -> float:
    """Largest departure from docs/method.md 2.3 in units of its tolerance; 0 where the geometry is not the paper's."""
    strategy = plan.masks.strategies[index]
    if not _paper(plan, strategy):
        return 0.0
    # without redrawing entries below the budget, which the paper's sampler does not do
    drawn = draw_visible(strategy, *plan.grid, plan.masks.entries, (plan.masks.seed, index))
    visible = drawn.mean(axis=0).reshape(plan.grid)  # how often each cell is visible
    mean, *probabilities = PAPER_STATISTICS[strategy.blocks, strategy.scale]
    places = (visible[7:9, 7:9].mean(), visible[0, 7:9].mean(), visible[0, 0])
    errors = [abs(place - wanted) / TOLERANCE for place, wanted in zip(places, probabilities, strict=True)]
    return float(max([abs(statistics(drawn)["mean"] / mean - 1) / MEAN_TOLERANCE, *errors]))


def gallery(raw: Mapping[str, Bits], kept: Mapping[str, Bits], grid: tuple[int, int]) -> bytes:
    """PNG: the first entries of each strategy, one row of pictures; a plan without entries is one line of text.

    Bright cells are kept, grey ones were visible before thinning, dark ones are masked.
    """
    height, width = grid
    across = SHOWN * (width * CELL + GAP) + GAP
    row_height = CAPTION + height * CELL + 2 * GAP
    sheet = Image.new("RGB", (across, max(1, len(raw)) * row_height), SHEET_BACKGROUND)
    ink = ImageDraw.Draw(sheet)
    if not raw:
        ink.text((GAP, GAP), "no entries: this configuration draws none beforehand", fill=SHEET_INK)
    for row, (name, bits) in enumerate(raw.items()):
        top = row * row_height
        shown = kept.get(name, bits)
        text = (
            f"{name}: {bits.sum(axis=1).mean():.1f} of {height * width} cells visible, {shown[0].sum()} kept in entry 0"
        )
        ink.text((GAP, top + 1), text, fill=SHEET_INK)
        colours = np.array([MASKED, THINNED, KEPT], dtype=np.uint8)[bits[:SHOWN].astype(int) + (bits & shown)[:SHOWN]]
        cells = rearrange(colours, "e (h w) c -> e h w c", h=height)
        for column, picture in enumerate(cells.repeat(CELL, axis=1).repeat(CELL, axis=2)):
            sheet.paste(Image.fromarray(picture), (GAP + column * (width * CELL + GAP), top + CAPTION + GAP))
    return sheet_png(sheet)
