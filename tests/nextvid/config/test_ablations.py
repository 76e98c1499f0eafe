"""Ablations: one switch from a valid base each, a document that equals the recipes, and two steps of every one."""

import pytest
import torch

from nextvid.config.ablations import ABLATIONS
from nextvid.config.overrides import apply_overrides, flat
from nextvid.config.recipe import RecipeConfig
from nextvid.config.recipes import recipe
from nextvid.config.reference import BASE, ROWS, differences
from nextvid.model.nextvid import strategy_names
from nextvid.model.tokens import tube_ids
from nextvid.train.loader import Batch
from nextvid.train.optim import trained_modules
from nextvid.train.step import build, take_step
from tests.nextvid.train.tiny import ALONE

CLIPS, FRAMES, TUBELETS, CELLS, PATCH = 2, 4, 2, 16, 2


def shrunken(name: str) -> RecipeConfig:
    """The recipe on 4 x 4 cells with one narrow layer a part; every switch as it was."""
    found = recipe(name)
    channels = 3 * PATCH**2 if found.losses.target == "pixels" else 4
    sizes = [f"model.{part}.{size}" for part in ("encoder", "predictor", "decoder") for size in ("depth=1", "width=24")]
    heads = [f"model.{part}.heads=2" for part in ("encoder", "predictor", "decoder")]
    grid = ["model.grid_height=4", "model.grid_width=4", f"model.patch={PATCH}", f"model.frame_channels={channels}"]
    rest = ["model.encoder.mlp_hidden=48", "masks.strategies.0.budget=10", "masks.strategies.1.budget=6"]
    return apply_overrides(found, [*sizes, *heads, *grid, *rest, "precision=fp32"])


def visible(config: RecipeConfig) -> list[torch.Tensor]:
    """Ids that each strategy keeps, the same cells for both clips."""
    counts = [CELLS] if config.masks.keep == "all" else [each.budget for each in config.masks.strategies]
    cells = [torch.randperm(CELLS, generator=torch.Generator().manual_seed(n))[:n].sort()[0] for n in counts]
    return [tube_ids(each.expand(CLIPS, -1), TUBELETS, CELLS) for each in cells]


def drawn(config: RecipeConfig, step: int) -> Batch:
    """Random clips of what the recipe reads: latents, unless the decoder gives pixels; pixels where it reads them."""
    generator = torch.Generator().manual_seed(step)
    latents = torch.randn(CLIPS, FRAMES, config.model.frame_channels, 4, 4, generator=generator)
    shape = (CLIPS, FRAMES, 4 * PATCH, 4 * PATCH, 3)
    pixels = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    return Batch(
        step,
        tuple(range(CLIPS * step, CLIPS * (step + 1))),
        None if config.losses.target == "pixels" else latents,
        visible(config),
        pixels if config.model.encoder.input == "pixels" else None,
    )


@pytest.mark.parametrize("name", ABLATIONS)
def test_two_steps_change_every_part_it_has(name: str) -> None:
    config = shrunken(name)
    assert differences(recipe(name), recipe(BASE)).keys() >= differences(config, shrunken(BASE)).keys()
    trained = build(config, ALONE)
    before = {part: [p.clone() for p in module.parameters()] for part, module in trained_modules(trained.model).items()}
    losses: dict[str, torch.Tensor] = {}
    for number in range(2):
        stepped = take_step(trained, drawn(config, number), number, micro_batch=1)
        assert stepped.taken
        losses = stepped.losses
    kinds = {kind for kind, weight in (("align", config.losses.align), ("flow", config.losses.flow)) if weight > 0}
    assert set(losses) == {f"{kind}/{strategy}" for kind in kinds for strategy in strategy_names(config.masks)}
    assert all(torch.isfinite(value) for value in losses.values())
    for part, module in trained_modules(trained.model).items():
        assert any(not torch.equal(p, q) for p, q in zip(module.parameters(), before[part], strict=True)), part
    assert ("predictor" in before) == (config.model.predictor.kind != "none")
    assert ("decoder" in before) == (config.model.decoder.kind != "none")


def test_base_is_the_one_gpu_recipe_cut_where_the_paper_stops() -> None:
    base, whole = recipe(BASE), recipe("nextvid_b_latent")
    assert [(stage.name, stage.steps, stage.tau_copies) for stage in base.stages] == [
        ("warmup", 3000, 4),
        ("stable1", 750, 4),
    ]
    assert base.steps / whole.steps == pytest.approx(15 / 132)
    assert recipe("ablation_full_30k").steps / whole.steps == pytest.approx(30 / 132)
    # docs/method.md 7.3: the paper's rate there is 4.95e-4, a 0.99th of the peak
    assert base.stages[-1].lr_end / whole.stages[1].lr_start == pytest.approx(4.95e-4 / 5e-4, rel=2e-3)
    assert whole.model_copy(update={"name": BASE, "stages": base.stages}) == base


@pytest.mark.parametrize(
    ("name", "base", "switch"),
    [
        ("gen_only", "gen_predictor", {"model.predictor.kind": "joint"}),
        ("gen_isolated", "gen_predictor", {"model.predictor.kind": "none", "model.decoder.kind": "xattn"}),
        ("gen_predictor", "full", {"losses.align": 0.0}),
        ("align_only", "align_isolated", {"model.predictor.kind": "joint"}),
        ("align_isolated", "full", {"losses.flow": 0.0, "model.decoder.kind": "none"}),
        ("full_pixels", "full", {"model.encoder.input": "pixels"}),
        ("target_pixels", "full_pixels", {"losses.target": "pixels", "model.frame_channels": 768}),
        ("target_siglip2", "full_pixels", {"losses.target": "siglip2", "model.frame_channels": 768}),
        ("target_cosmos", "full_pixels", {"losses.target": "cosmos", "model.frame_channels": 64}),
        ("unmasked", "gen_isolated", {"masks.keep": "all"}),
        ("cross_self", "gen_isolated", {"model.decoder.kind": "xattn_self", "losses.tau_share": "clip"}),
        ("one_copy", "full", {"stages.warmup.tau_copies": 1, "stages.stable1.tau_copies": 1}),
        ("one_copy_30k", "full_30k", {"stages.warmup.tau_copies": 1, "stages.stable1.tau_copies": 1}),
        ("no_average", "full", {"optim.ema": 0.0}),
    ],
)
def test_each_is_one_switch(name: str, base: str, switch: dict[str, object]) -> None:
    assert differences(recipe(f"ablation_{name}"), recipe(f"ablation_{base}")) == switch


def test_every_row_has_a_recipe_and_every_recipe_a_row() -> None:
    assert {row.recipe for row in ROWS} == set(ABLATIONS)
    assert [sum(row.table == table for row in ROWS) for table in ("2", "3", "4", "5", "11", "12")] == [6, 4, 2, 2, 4, 2]


def test_leaves_are_written_as_overrides_are() -> None:
    """Every path that the document prints can be given back as an override and makes the recipe it describes."""
    base = recipe(BASE)
    for name in ABLATIONS:
        changed = differences(recipe(name), base)
        again = apply_overrides(base, [f"{path}={value}" for path, value in changed.items()])
        assert again.model_copy(update={"name": name}) == recipe(name)
    assert dict(flat({"a": [{"name": "x", "b": 1}], "c": []})) == {"a.x.name": "x", "a.x.b": 1, "c": []}
