"""Rates of Tab. 8 at the edges of its stages, parameter groups, clipping by module (traps 14 and 27)."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nextvid.config.recipe import OptimConfig, SpikeConfig
from nextvid.config.recipes import recipe
from nextvid.config.stages import draws_before, stage_at
from nextvid.model.reference import reference_encoder
from nextvid.train import checkpoint
from nextvid.train.checkpoint import Identity, Progress
from nextvid.train.optim import Spikes, build_optimizer, clip_gradients, rates, set_rates, trained_modules
from nextvid.train.step import build_model
from tests.nextvid.train.tiny import tiny_recipe

PAPER = recipe("nextvid_l").stages


@pytest.mark.parametrize(
    ("step", "main"),  # docs/method.md 7.2, check values and edges
    [
        (0, 1e-4),
        (6_000, 3e-4),
        (12_000 - 1, 1e-4 + 4e-4 * 11_999 / 12_000),
        (12_000, 5e-4),
        (26_000, 4.75e-4),
        (40_000 - 1, 5e-4 - 5e-5 * 27_999 / 28_000),
        (40_000, 4.5e-4),
        (80_000, 2.75e-4),
        (120_000, 1e-4),
        (126_000, 5.05e-5),
        (132_000 - 1, 1e-4 - 9.9e-5 * 11_999 / 12_000),
    ],
)
def test_trap_27_rates_of_the_paper(step: int, main: float) -> None:
    now = rates(PAPER, "linear", step)
    assert now.main == pytest.approx(main, rel=1e-9)
    fixed = 3e-4 if step >= 120_000 else 8e-4 if step >= 40_000 else None
    assert now.decoder == pytest.approx(now.main if fixed is None else fixed, rel=1e-9)


def test_cosine_is_one_curve_between_warmup_and_cooldown() -> None:
    assert rates(PAPER, "cosine", 40_000).main == pytest.approx(4.37e-4, rel=1e-3)  # docs/method.md 7.2
    assert rates(PAPER, "cosine", 12_000).main == pytest.approx(5e-4)
    assert rates(PAPER, "cosine", 119_999).main == pytest.approx(1e-4, rel=1e-6)
    for step in (0, 6_000, 126_000):  # warm-up and cool-down stay linear
        assert rates(PAPER, "cosine", step) == rates(PAPER, "linear", step)


def test_trap_27_both_groups_get_their_rate() -> None:
    tiny = tiny_recipe()
    optimizer = build_optimizer(build_model(tiny), tiny.optim)
    for step in range(tiny.steps):
        now = rates(tiny.stages, "linear", step)
        set_rates(optimizer, now)
        assert {(group["part"], group["lr"]) for group in optimizer.param_groups} == {
            ("main", now.main),
            ("decoder", now.decoder),
        }


@given(st.integers(0, 131_999))
def test_draw_counter_is_the_running_sum_of_batches(step: int) -> None:
    index, inside = stage_at(PAPER, step)
    before = sum(stage.steps * stage.batch for stage in PAPER[:index])
    assert draws_before(PAPER, step) == before + inside * PAPER[index].batch
    assert draws_before(PAPER, step + 1) - draws_before(PAPER, step) == PAPER[index].batch


def test_all_clips_of_the_paper() -> None:
    assert draws_before(PAPER, 132_000) == 120_000 * 3072 + 12_000 * 768  # docs/method.md 1: 377.9M clips
    with pytest.raises(AssertionError):
        stage_at(PAPER, 132_000)


def test_trap_14_groups_hold_every_trained_parameter_once_and_nothing_else() -> None:
    tiny = tiny_recipe()
    model = build_model(tiny)
    reference = reference_encoder(model.encoder)
    optimizer = build_optimizer(model, tiny.optim)
    found = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len({id(parameter) for parameter in found}) == len(found)
    assert {id(parameter) for parameter in found} == {id(parameter) for parameter in model.parameters()}
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    assert not {id(parameter) for parameter in found} & {id(parameter) for parameter in reference.parameters()}


def test_trap_14_biases_and_norms_do_not_decay_but_the_query_does() -> None:
    tiny = tiny_recipe()
    model = build_model(tiny)
    shapes = dict(model.named_parameters())
    decay: dict[str, float] = {}
    for group in build_optimizer(model, tiny.optim).param_groups:
        decay |= dict.fromkeys(group["parameter_names"], group["weight_decay"])
    assert decay.keys() == shapes.keys()
    for name, value in decay.items():
        plain = shapes[name].ndim == 1 or name.endswith("bias")
        assert value == (0.0 if plain else 0.04), name
    assert decay["predictor.query"] == 0.04
    assert decay["decoder.blocks.0.modulation.weight"] == 0.04
    assert decay["encoder.norm.weight"] == 0.0


def _with_gradients(scale: dict[str, float]) -> torch.nn.Module:
    model = build_model(tiny_recipe())
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.grad = scale[name.split(".")[0]] * torch.randn(parameter.shape, generator=generator)
    return model


def _norm(module: torch.nn.Module) -> float:
    return float(torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]).norm())


def test_each_module_is_clipped_by_its_own_norm() -> None:
    model = _with_gradients({"encoder": 1.0, "predictor": 1e-5, "decoder": 10.0})
    modules = trained_modules(model)
    before = {name: _norm(module) for name, module in modules.items()}
    norms = clip_gradients(modules, OptimConfig(clip=1.0))
    for name, module in modules.items():
        assert float(norms[name]) == pytest.approx(before[name], rel=1e-4)
        assert _norm(module) == pytest.approx(min(1.0, before[name]), rel=1e-4)


def test_global_clipping_keeps_the_ratio_of_modules() -> None:
    model = _with_gradients({"encoder": 1.0, "predictor": 0.1, "decoder": 10.0})
    modules = trained_modules(model)
    before = {name: _norm(module) for name, module in modules.items()}
    clip_gradients(modules, OptimConfig(clip=1.0, clip_scope="global"))
    after = {name: _norm(module) for name, module in modules.items()}
    assert sum(value**2 for value in after.values()) ** 0.5 == pytest.approx(1.0, rel=1e-4)
    assert after["encoder"] / after["decoder"] == pytest.approx(before["encoder"] / before["decoder"], rel=1e-4)


def test_a_gradient_that_is_no_number_shows_in_its_norm() -> None:
    model = _with_gradients({"encoder": 1.0, "predictor": 1.0, "decoder": 1.0})
    next(trained_modules(model)["predictor"].parameters()).grad.view(-1)[0] = float("nan")  # type: ignore[union-attr]
    norms = clip_gradients(trained_modules(model), OptimConfig())
    assert torch.isnan(norms["predictor"])
    assert torch.isfinite(norms["encoder"])


def test_trap_27_moments_survive_a_checkpoint_between_two_stages(tmp_path: Path) -> None:
    tiny = tiny_recipe()
    model = build_model(tiny)
    optimizer = build_optimizer(model, tiny.optim)
    for step in range(6):  # up to the edge where the decoder's rate jumps
        set_rates(optimizer, rates(tiny.stages, "linear", step))
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.1 * (step + 1))
        optimizer.step()
    identity = Identity("0" * 12, tiny.digest(), "1" * 32, "2" * 32)
    reference = reference_encoder(model.encoder)
    path = checkpoint.save(tmp_path, identity, Progress(6, 24), model, reference, optimizer)
    other = build_model(tiny)
    resumed = build_optimizer(other, tiny.optim)
    checkpoint.load(path, identity, other, reference_encoder(other.encoder), resumed)
    for old, new in zip(optimizer.param_groups, resumed.param_groups, strict=True):
        for a, b in zip(old["params"], new["params"], strict=True):
            assert optimizer.state[a].keys() == resumed.state[b].keys()
            for name, value in optimizer.state[a].items():
                assert torch.equal(value, resumed.state[b][name])


@given(st.lists(st.floats(0.125, 8, width=32), min_size=4, max_size=12))
def test_spikes_know_mean_and_variance_of_the_steps_taken(losses: list[float]) -> None:
    guard = Spikes(SpikeConfig(window=len(losses), deviations=2.0), torch.device("cpu"))
    for loss in losses:
        assert guard.admits(torch.tensor(loss))  # as many as the window are needed first
        guard.add(torch.tensor(loss), torch.tensor(True))
        guard.add(torch.tensor(1e9), torch.tensor(False))
    values = torch.tensor(losses)
    found = torch.stack((values.mean(), values.var(correction=0)))
    torch.testing.assert_close(guard.state[1:], found, rtol=1e-3, atol=1e-4)
    limit = float(guard.state[1] + 2 * guard.state[2].sqrt())
    assert guard.admits(torch.tensor(limit * 0.99))
    assert not guard.admits(torch.tensor(limit * 1.01))
    assert not guard.admits(torch.tensor(float("nan")))
