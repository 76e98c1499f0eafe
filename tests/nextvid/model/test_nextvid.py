"""The whole model: what reaches which loss, what gradients flow where, sizes, and generation."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nextvid.config.recipe import RecipeConfig
from nextvid.config.recipes import recipe
from nextvid.model.decoder import Positions
from nextvid.model.encoder import Encoder
from nextvid.model.flow import draw_flow
from nextvid.model.nextvid import Losses, NExTVid, hidden_cells, strategy_names
from nextvid.model.tokens import gather_tokens, tube_ids
from tests.nextvid.model.tiny import (
    CELLS,
    KEPT,
    TUBELETS,
    clip,
    draw_shapes_only,
    features,
    key,
    s_model,
    tiny_model,
    tiny_recipe,
    visible,
)

FRAMES = TUBELETS - 1


def losses(model: NExTVid, copies: int = 2, only: int | None = None, clips: int = 2) -> Losses:
    tokens, targets = clip(model.recipe, clips)
    align, flow = model.recipe.losses.align > 0, model.recipe.losses.flow > 0
    ids = visible(clips) if model.recipe.masks.keep != "all" else visible(clips, (CELLS,))
    y = features(model, tokens) if align else None
    found: Losses = model(tokens, targets if flow else None, y, ids, key(clips), copies, only)
    return found


def gradients(module: nn.Module) -> float:
    """Norm of all gradients of a module."""
    grads = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    return float(torch.stack([grad.norm() for grad in grads]).norm()) if grads else 0.0


def test_total_weighs_both_losses_and_averages_strategies() -> None:
    found = losses(tiny_model())
    expected = sum(1.0 * found.align[name] + 0.5 * found.flow[name] for name in ("short", "long")) / 2
    assert torch.allclose(found.total, torch.as_tensor(expected))


def test_trap_13_strategies_run_one_by_one_add_up() -> None:
    together, alone = tiny_model(), tiny_model()
    losses(together).total.backward()
    parts = [losses(alone, only=index) for index in range(2)]
    for part in parts:
        part.total.backward()
    assert [tuple(part.align) for part in parts] == [("short",), ("long",)]
    for one, other in zip(together.parameters(), alone.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.allclose(one.grad, other.grad, atol=1e-6)


def test_trap_28_micro_batches_average_to_the_whole_batch() -> None:
    recipe = tiny_recipe()
    whole, cut = tiny_model(recipe), tiny_model(recipe)
    tokens, targets = clip(recipe, 4)
    ids, y = visible(4), features(whole, tokens)
    whole(tokens, targets, y, ids, key(4), 2).total.backward()
    for row in range(4):
        own = slice(row, row + 1)
        part = key(4).__class__(3, 0, (100 + row,))
        (cut(tokens[own], targets[own], y[own], [each[own] for each in ids], part, 2).total / 4).backward()
    for one, other in zip(whole.parameters(), cut.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.allclose(one.grad, other.grad, atol=1e-5)


def test_trap_07_flow_alone_moves_the_encoder_once_gates_are_open() -> None:
    changes: dict[str, Any] = {"losses": {"align": 0.0}}
    closed = tiny_model(tiny_recipe(**changes), trained=False)
    losses(closed).total.backward()
    assert gradients(closed.encoder) == 0.0  # zero head and gates, docs/method.md 4.5
    opened = tiny_model(tiny_recipe(**changes))
    losses(opened).total.backward()
    assert gradients(opened.encoder) > 1e-4
    assert opened.predictor is not None
    assert gradients(opened.predictor) > 1e-4


def test_alignment_alone_moves_encoder_and_predictor_at_the_start() -> None:
    model = tiny_model(tiny_recipe(losses={"flow": 0.0}, model={"decoder": {"kind": "none"}}), trained=False)
    found = losses(model)
    found.total.backward()
    assert found.flow == {}
    assert model.decoder is None
    assert gradients(model.encoder) > 1e-4


def test_the_last_tubelet_never_enters_the_online_branch() -> None:
    model = tiny_model()
    tokens, targets = clip()
    y, ids = features(model, tokens), visible()
    before = model(tokens, targets, y, ids, key()).total
    tokens[:, FRAMES * CELLS :] = math.nan
    assert torch.equal(model(tokens, targets, y, ids, key()).total, before)


def test_dropping_the_last_tubelet_changes_no_prediction() -> None:
    model = tiny_model()
    assert model.predictor is not None
    tokens, _ = clip()
    ids = visible()[0]
    whole = model.encoder(gather_tokens(tokens, ids), TUBELETS, ids)
    short = ids[:, : FRAMES * KEPT[0]]
    context = model.encoder(gather_tokens(tokens, short), FRAMES, short)
    assert torch.allclose(whole[:, : FRAMES * KEPT[0]], context, atol=1e-6)


class Recorder(nn.Module):
    """Stands in for the decoder and keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[Tensor, Tensor, Tensor, Positions]] = []

    def forward(self, condition: Tensor, noisy: Tensor, tau: Tensor, positions: Positions) -> Tensor:
        self.asked.append((condition, noisy, tau, positions))
        return torch.zeros_like(noisy)


def test_trap_16_predictions_features_and_targets_stand_at_the_same_ids() -> None:
    """Targets that are their own flat id: undoing the noise gives S..N-1, in the order of the query ids."""
    recipe = tiny_recipe()
    model = tiny_model(recipe)
    recorder = Recorder()
    model.decoder = recorder  # type: ignore[assignment]
    tokens, _ = clip(recipe)
    targets = torch.arange(TUBELETS * CELLS, dtype=torch.float32).view(1, TUBELETS, CELLS, 1).expand(2, -1, -1, 10)
    model(tokens, targets, features(model, tokens), visible(), key(), 3)
    for strategy, (condition, noisy, tau, positions) in enumerate(recorder.asked):
        draws = draw_flow(key(), strategy, range(3), (FRAMES, CELLS, 10), recipe.losses, torch.device("cpu"))
        assert torch.equal(draws.tau, tau)
        used = tau > 0.05
        undone = ((noisy - (1 - tau[..., None, None]) * draws.noise) / tau[..., None, None])[used]
        expected = positions.query_ids[0].view(FRAMES, CELLS, 1).expand(3, 2, FRAMES, CELLS, 10)[used]
        assert torch.allclose(undone, expected.float(), atol=1e-2)
        assert condition.shape == (2, FRAMES * CELLS, 32)
    z = model._encode_and_predict(tokens, visible()[0])[0].z
    assert z is not None
    assert not model._align(z, z, all_query_ids())


def all_query_ids() -> Tensor:
    return torch.arange(CELLS, TUBELETS * CELLS)[None]


@pytest.mark.parametrize("kept", [KEPT, (1, 1)])
def test_trap_23_every_position_of_tubelets_1_on_counts_and_one_cell_suffices(kept: tuple[int, int]) -> None:
    model = tiny_model()
    recorder = Recorder()
    tokens, targets = clip()
    found = model(tokens, targets, features(model, tokens), visible(kept=kept), key())
    assert torch.isfinite(found.total)
    model.decoder = recorder  # type: ignore[assignment]
    model(tokens, targets, features(model, tokens), visible(kept=kept), key())
    counted = sum(noisy[..., 0].numel() for _, noisy, _, _ in recorder.asked)
    assert counted == 2 * 2 * FRAMES * CELLS  # M * B * (T - 1) * S


def test_trap_24_tubes_that_are_no_tubes_are_refused() -> None:
    model = tiny_model()
    tokens, targets = clip()
    ids = visible()
    with pytest.raises(AssertionError, match="equally many cells in every tubelet"):
        model(tokens, targets, features(model, tokens), [ids[0][:, :-1], ids[1]], key())


def test_trap_29_initial_losses() -> None:
    """Unit-variance targets: flow starts at 2.0 (zero head). Alignment is 1 + var(z) for targets of variance 1."""
    model = tiny_model(tiny_recipe(), trained=False)
    found = losses(model, copies=4, clips=16)
    for name in ("short", "long"):
        assert float(found.flow[name].detach()) == pytest.approx(2.0, abs=0.05)
        assert 1.0 < float(found.align[name].detach()) < 2.5


def test_wide_models_start_near_one() -> None:
    """docs/method.md 4.1: 1.15 with a predictor 384 wide, since the encoder's width decides its initialisation."""
    wide = {"encoder": {"width": 512, "heads": 8, "depth": 1}, "predictor": {"width": 384, "heads": 12, "depth": 1}}
    found = losses(tiny_model(tiny_recipe(model=wide), trained=False))
    assert float(found.align["short"].detach()) == pytest.approx(1.15, abs=0.05)  # 1 + 384 * 0.02^2


def test_trap_32_copies_cost_a_decoder_pass_and_nothing_else() -> None:
    model = tiny_model()
    calls: list[str] = []
    for name, module in (("encoder", model.encoder), ("predictor", model.predictor)):
        assert module is not None
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    losses(model, copies=4)
    assert calls.count("predictor") == 2
    assert calls.count("encoder") == 3  # once as reference: its copy takes the hook along


def flops(config: RecipeConfig, copies: int, monkeypatch: pytest.MonkeyPatch) -> float:
    """Forward and backward of one clip on the meta device, in multiply-adds times two."""
    draw_shapes_only(monkeypatch)
    with torch.device("meta"):
        model = NExTVid(config)
        reference = Encoder(config.model)
        tokens, targets = torch.empty(1, 2048, 1536), torch.empty(1, 8, 256, 64)
        ids = [tube_ids(torch.zeros(1, count, dtype=torch.int64), 8, 256) for count in (60, 15)]
        counter = FlopCounterMode(display=False)
        with counter:
            with torch.no_grad():
                reference(tokens, 8)
            y = torch.empty(1, 7 * 256, config.model.encoder.width)
            model(tokens, targets, y, ids, key(1), copies).total.backward()
    return float(counter.get_total_flops())


def by_formula(config: RecipeConfig, copies: int) -> float:
    """docs/method.md 12, without the last tubelet in the online encoder."""
    L, D, H, d = config.model.encoder.depth, config.model.encoder.width, config.model.encoder.mlp_hidden, 384
    T = 8

    def encoder(n: int, tubelets: int) -> float:
        dense = L * 2 * tubelets * n * (4 * D**2 + 2 * D * H) + 2 * 1536 * D * tubelets * n
        return dense + L * 4 * D * n**2 * tubelets * (tubelets + 1) / 2

    def predictor(n: int) -> float:
        layers = 12 * (4 * d**2 * (T - 1) * n + 2 * 10 * d**2 * (T - 1) * 256)
        return 2 * D * d * (T - 1) * n + layers + 12 * 4 * d * 256 * n * T * (T - 1) / 2 + 2 * d * D * (T - 1) * 256

    decoder = copies * (T - 1) * 256 * (12 * (24 * d**2 + 4 * d * 256) + 2 * 2 * 64 * d) + 2 * D * d * (T - 1) * 256
    online = sum(encoder(n, T - 1) + predictor(n) + decoder for n in (60, 15))
    return encoder(256, T) + 3 * online


@pytest.mark.parametrize("copies", [1, 4])
def test_trap_32_flops_of_a_step(copies: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted on ViT-L cut to three layers, where predictor and decoder weigh most."""
    full = recipe("nextvid_l")
    encoder = full.model.encoder.model_copy(update={"depth": 3})
    config = full.model_copy(update={"model": full.model.model_copy(update={"encoder": encoder})})
    assert flops(config, copies, monkeypatch) == pytest.approx(by_formula(config, copies), rel=0.05)


@pytest.mark.parametrize(
    ("name", "copies", "table"), [("nextvid_l", 4, 5.1), ("nextvid_l", 1, 3.6), ("nextvid_g", 4, 10.9)]
)
def test_flops_of_the_paper(name: str, copies: int, table: float) -> None:
    """The table of docs/method.md 12, in TFLOP, still holds the last tubelet that we drop: 3 to 5 % more."""
    assert 0.92 * table < by_formula(recipe(name), copies) / 1e12 < table


@pytest.mark.parametrize(
    ("name", "encoder", "predictor", "decoder"),
    [
        ("nextvid_l", 303.9, 22.09, 32.91),
        ("nextvid_h", 631.6, 22.29, 33.00),
        ("nextvid_g", 1012.2, 22.39, 33.05),
        ("nextvid_b", 86.2, 21.9, 32.8),
        ("nextvid_s", 21.9, 21.6, 32.66),
    ],
)
def test_trap_14_parameter_counts(name: str, encoder: float, predictor: float, decoder: float) -> None:
    """Table 6.2, in millions; the reference encoder is no part of the model that is optimised."""
    with torch.device("meta"):
        model = NExTVid(recipe(name))
    assert millions(model.encoder) == pytest.approx(encoder, abs=0.06)
    assert millions(model.predictor) == pytest.approx(predictor, abs=0.06)
    assert millions(model.decoder) == pytest.approx(decoder, abs=0.06)
    assert {each.split(".")[0] for each, _ in model.named_parameters()} == {"encoder", "predictor", "decoder"}
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("changes", "decoder"),
    [
        ({"model": {"decoder": {"condition": "hidden"}}}, (32.66, 32.66)),
        (s_model("xattn"), (32.9, 33.1)),
        (s_model("xattn_self"), (45.2, 45.5)),
        ({"losses": {"target": "pixels"}, "model": {"frame_channels": 768}}, (34.0, 34.2)),
    ],
)
def test_parameter_counts_of_ablations(changes: dict[str, Any], decoder: tuple[float, float]) -> None:
    """Sections 6.2 and 10 at ViT-L, in millions."""
    values = recipe("nextvid_l").model_dump()
    for section, change in changes.items():
        for field, value in change.items():
            values[section][field] = values[section][field] | value if isinstance(value, dict) else value
    with torch.device("meta"):
        model = NExTVid(RecipeConfig.model_validate(values))
    assert decoder[0] - 0.05 < millions(model.decoder) < decoder[1] + 0.05


def millions(module: nn.Module | None) -> float:
    assert module is not None
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


def test_query_token_decays_like_a_matrix() -> None:
    predictor = tiny_model().predictor
    assert predictor is not None
    assert predictor.query.ndim == 3  # docs/method.md 7.4: no decay on one-dimensional tensors


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"predictor": {"kind": "joint"}}},
        {"model": {"decoder": {"condition": "hidden"}}},
        {"model": {"predictor": {"support": "masked"}}},
        {"masks": {"keep": "all"}},
        {"losses": {"tau_share": "clip"}},
        {"losses": {"target_norm": False}},
        s_model("xattn"),
        s_model("xattn_self"),
    ],
)
def test_ablations_train_every_part_they_have(changes: dict[str, Any]) -> None:
    model = tiny_model(tiny_recipe(**changes))
    found = losses(model)
    found.total.backward()
    assert torch.isfinite(found.total)
    for module in (model.encoder, model.predictor, model.decoder):
        assert module is None or gradients(module) > 1e-5


def test_all_is_one_pass_over_every_cell() -> None:
    model = tiny_model(tiny_recipe(masks={"keep": "all"}))
    assert strategy_names(model.recipe.masks) == ("all",)
    assert tuple(losses(model).flow) == ("all",)


def test_flat_equals_tubes_where_nothing_was_cut() -> None:
    tubes, flat = tiny_model(), tiny_model(tiny_recipe(masks={"keep": "flat"}))
    assert torch.allclose(losses(tubes).total, losses(flat).total, atol=1e-5)


def test_flat_takes_ragged_context() -> None:
    """A prefix that leaves the last tubelets empty is finite, and deaf to what it cut."""
    recipe = tiny_recipe(masks={"keep": "flat"})
    model = tiny_model(recipe)
    tokens, targets = clip(recipe)
    ids = [each[:, : each.shape[1] // 2 + 1] for each in visible()]
    y = features(model, tokens)
    before = model(tokens, targets, y, ids, key()).total
    tokens[:, 3 * CELLS :] = math.nan
    assert torch.equal(model(tokens, targets, y, ids, key()).total, before)
    assert torch.isfinite(before)


def test_masked_support_asks_at_hidden_cells_alone() -> None:
    recipe = tiny_recipe(model={"predictor": {"support": "masked"}})
    model = tiny_model(recipe)
    tokens, targets = clip(recipe)
    ids, y = visible(), features(model, tokens)
    seen, queries = model._encode_and_predict(tokens, ids[0])
    assert seen.z is not None
    for row in range(2):
        assert not set((queries[row] % CELLS).tolist()) & set((ids[0][row] % CELLS).tolist())
        assert len(queries[row]) == FRAMES * (CELLS - KEPT[0])
    by_row = [(seen.z[row] - y[row, queries[row] - CELLS]).square().mean() for row in range(2)]
    found = model(tokens, targets, y, ids, key())
    assert torch.allclose(found.align["short"], torch.stack(by_row).mean())
    changed = targets.clone()
    changed[0, :, ids[0][0, : KEPT[0]]] += 1.0  # targets of visible cells of the first clip
    after = model(tokens, changed, y, [ids[0], ids[0]], key())
    assert torch.equal(after.flow["short"], found.flow["short"])


def test_hidden_cells() -> None:
    assert hidden_cells(torch.tensor([[0, 3], [1, 2]]), 5).tolist() == [[1, 2, 4], [0, 3, 4]]


def test_conditions_of_fewer_tubelets_are_those_of_more() -> None:
    """Generation one after the other: predictions do not change when later tubelets arrive."""
    model = tiny_model()
    tokens, _ = clip()
    ids = visible()[0]
    long, short = (
        model.condition(gather_tokens(tokens, part), part, frames).z
        for frames in (FRAMES, 1)
        for part in (ids[:, : frames * KEPT[0]],)
    )
    assert long is not None
    assert short is not None
    assert torch.allclose(long[:, :CELLS], short, atol=1e-6)


def test_sampling_is_a_function_of_the_generator() -> None:
    model = tiny_model()
    ids = visible()[0][:, : FRAMES * KEPT[0]]
    seen = model.condition(gather_tokens(clip()[0], ids), ids, FRAMES)
    first, second, other = (
        model.sample(seen, steps=3, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert first.shape == (2, FRAMES, CELLS, 10)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_autocast_keeps_losses_in_fp32_and_close() -> None:
    model = tiny_model()
    plain = losses(model).total
    with torch.autocast("cpu", torch.bfloat16):
        mixed = losses(model).total
    assert mixed.dtype == torch.float32
    assert float((mixed - plain).detach().abs()) < 0.02 * float(plain.detach())


def test_one_draw_number_a_clip() -> None:
    model = tiny_model()
    tokens, targets = clip()
    with pytest.raises(AssertionError, match="3 draw numbers for 2 clips"):
        model(tokens, targets, features(model, tokens), visible(), key(3))


@pytest.mark.slow
def test_trap_16_and_20_overfitting_brings_each_tubelet_its_own_constant() -> None:
    """Targets of tubelet t are all 0.7 * t: a sampler or pairing that is off by one gives its neighbour's."""
    recipe = tiny_recipe(losses={"align": 0.0})
    model = tiny_model(recipe, trained=False)
    tokens, _ = clip(recipe)
    level = 0.7 * torch.arange(TUBELETS)[None, :, None, None]
    targets = level.expand(2, TUBELETS, CELLS, 10).contiguous()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    first = last = math.nan
    for step in range(250):
        optimizer.zero_grad()
        total = model(tokens, targets, None, visible(), key(step=step), 4).total
        total.backward()
        optimizer.step()
        last = float(total.detach())
        first = last if step == 0 else first
    assert last < 0.2 * first
    ids = visible()[0][:, : FRAMES * KEPT[0]]
    seen = model.condition(gather_tokens(tokens, ids), ids, FRAMES)
    means = model.sample(seen, generator=torch.Generator().manual_seed(0)).mean(dim=(0, 2, 3))
    assert torch.allclose(means, 0.7 * torch.arange(1.0, TUBELETS), atol=0.2)
