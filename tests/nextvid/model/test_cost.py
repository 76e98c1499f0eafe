"""Costs against what torch counts: FLOPs of forward and backward, numbers that autograd keeps, the paper's table."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nextvid.config.recipe import RecipeConfig
from nextvid.config.recipes import recipe
from nextvid.config.strict import parse
from nextvid.model.cost import cost, count_parameters, stage_cost
from nextvid.model.encoder import Encoder, all_ids, input_width
from nextvid.model.memory import KEPT_BYTES
from nextvid.model.nextvid import NExTVid
from nextvid.model.tokens import tube_ids
from tests.nextvid.model.tiny import (
    CELLS,
    clip,
    draw_shapes_only,
    features,
    key,
    s_model,
    tiny_model,
    tiny_recipe,
    visible,
)

VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "latents": {"model": {"encoder": {"input": "latents"}}},
    "joint": {"model": {"predictor": {"kind": "joint"}}},
    "masked": {"model": {"predictor": {"support": "masked"}}},
    "align": {"losses": {"flow": 0.0}, "model": {"decoder": {"kind": "none"}}},
    "unmasked": {"masks": {"keep": "all"}},
    "flat": {"masks": {"keep": "flat"}},
    "dense": {"model": {"attention": "dense"}},
    "xattn": s_model("xattn"),
    "xattn_self": s_model("xattn_self"),
}


def merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return values | {k: merged(values[k], v) if isinstance(v, dict) else v for k, v in changes.items()}


def shallow(changes: dict[str, Any], copies: int) -> RecipeConfig:
    """The paper's widths, grid and masks with one block a part, so that the counter is done in a moment."""
    values = recipe("nextvid_l").model_dump()
    for part in ("encoder", "predictor", "decoder"):
        values["model"][part]["depth"] = 1
    values["stages"] = [values["stages"][0] | {"tau_copies": copies}]
    return parse(RecipeConfig, merged(values, changes), "shallow")


def counted(config: RecipeConfig, monkeypatch: pytest.MonkeyPatch) -> float:
    """FLOPs of a clip as torch counts them on the meta device."""
    draw_shapes_only(monkeypatch)
    model, counts = config.model, [each.budget for each in config.masks.strategies]
    with torch.device("meta"):
        online, reference = NExTVid(config), Encoder(model)
        tokens = torch.empty(1, 2048, input_width(model))
        targets = torch.empty(1, 8, 256, model.target_channels) if config.losses.flow else None
        y = torch.empty(1, 7 * 256, model.encoder.width) if config.losses.align else None
        ids = [tube_ids(torch.zeros(1, count, dtype=torch.int64), 8, 256) for count in counts]
        if config.masks.keep == "all":
            ids = [all_ids(8, 256)]
        monkeypatch.setattr(
            "nextvid.model.nextvid.hidden_cells", lambda seen, cells: seen.new_zeros(1, cells - seen.shape[1])
        )
        with FlopCounterMode(display=False) as counter:
            if config.losses.align:
                with torch.no_grad():
                    reference(tokens, 8)
            online(tokens, targets, y, ids, key(1), config.stages[0].tau_copies).total.backward()
    return float(counter.get_total_flops())


@pytest.mark.parametrize(("name", "copies"), [*((name, 1) for name in VARIANTS), ("base", 4), ("xattn", 4)])
def test_flops_are_what_torch_counts(name: str, copies: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = shallow(VARIANTS[name], copies)
    found = stage_cost(config, config.stages[0])
    assert found.clip_flops == pytest.approx(counted(config, monkeypatch), rel=0.05)
    assert found.step_flops == 3072 * found.clip_flops


@pytest.mark.parametrize(
    ("name", "first", "third", "last"),
    [("nextvid_l", 5.1, 3.6, 17.9), ("nextvid_h", 7.8, 6.3, 30.7), ("nextvid_g", 10.9, 9.4, 44.9)],
)
def test_flops_of_the_paper(name: str, first: float, third: float, last: float) -> None:
    """docs/method.md 12, in TFLOP a clip, with the last tubelet that we drop: 1 to 7 % more."""
    stages = cost(recipe(name)).stages
    for stage, table in ((stages[0], first), (stages[2], third), (stages[3], last)):
        assert 0.93 * table < stage.clip_flops / 1e12 < table
    assert [part.tokens for part in vars(stages[0].passes[0]).values() if hasattr(part, "tokens")] == [420, 1792, 7168]


def kept_bytes(config: RecipeConfig, copies: int) -> int:
    """Bytes of different storages that autograd keeps of one clip and pass, weights and their copies excepted."""
    model = tiny_model(config)
    tokens, targets = clip(config, 1)
    y = features(model, tokens) if config.losses.align else None
    ids = visible(1) if config.masks.keep != "all" else visible(1, (CELLS,))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {shape for p in model.parameters() for shape in (tuple(p.shape), tuple(p.shape[::-1]))}
    held: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        copied = tensor.dtype == torch.bfloat16 and tuple(tensor.shape) in shapes
        if storage.data_ptr() not in weights and not copied:
            held[storage.data_ptr()] = storage
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"),
    ):
        losses = model(tokens, targets if config.losses.flow else None, y, ids, key(1), copies, only=0)
    assert torch.isfinite(losses.total)
    return sum(storage.nbytes() for storage in held.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["base", "joint", "align", "unmasked", "xattn", "xattn_self"])
def test_activations_are_what_autograd_keeps(name: str, precision: str) -> None:
    wider = {part: {"depth": 4, "width": 64} for part in ("encoder", "predictor", "decoder")}
    wider["encoder"] |= {"mlp_hidden": 256}
    changes: dict[str, Any] = {"model": wider, "precision": precision}
    values = tiny_recipe().model_dump()
    config = parse(RecipeConfig, merged(merged(values, changes), VARIANTS[name]), name)
    stage = config.stages[0].model_copy(update={"tau_copies": 2})
    wanted = stage_cost(config, stage).passes[0].kept * KEPT_BYTES[config.precision]
    assert wanted == pytest.approx(kept_bytes(config, 2), rel=0.05)


def test_parameters_of_vit_l() -> None:
    assert {part: round(count / 1e6, 1) for part, count in count_parameters(recipe("nextvid_l")).items()} == {
        "encoder": 303.9,
        "predictor": 22.1,
        "decoder": 32.9,
    }  # docs/method.md 6.2


def test_a_part_that_is_not_there_costs_nothing() -> None:
    config = shallow(s_model("xattn"), 1)
    only = stage_cost(config, config.stages[0]).passes[0]
    assert count_parameters(config)["predictor"] == 0
    assert (only.predictor.flops, only.predictor.kept) == (0, 0)
    assert stage_cost(config, config.stages[0]).reference == 0
