"""One step: micro-batches add up, the average follows the optimiser, a gradient that is no number changes nothing."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from nextvid.config.recipe import RecipeConfig
from nextvid.model.flow import NoiseKey
from nextvid.model.tokens import latent_tokens, stack_target
from nextvid.train.step import build, build_model, means, take_step
from tests.nextvid.train.tiny import ALONE, gradients_of, latents_of, random_batch, tiny_recipe


def _unclipped(recipe: RecipeConfig) -> RecipeConfig:
    return recipe.model_copy(update={"optim": recipe.optim.model_copy(update={"clip": 1e9})})


def test_one_backward_a_strategy_is_the_gradient_of_the_total() -> None:
    recipe = _unclipped(tiny_recipe())
    trained, batch = build(recipe, ALONE), random_batch()
    assert trained.model.decoder is not None
    for parameter in trained.model.decoder.parameters():  # past its zero initialisation, so that all gradients live
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    model = trained.model
    tokens = latent_tokens(latents_of(batch), 2)
    features = torch.nn.functional.layer_norm(trained.reference(tokens, 2)[:, 16:], (24,))
    losses = model(
        tokens, stack_target(latents_of(batch), 2), features, batch.visible, NoiseKey(0, 0, batch.draws), copies=2
    )
    losses.total.backward()
    wanted = gradients_of(trained)
    stepped = take_step(trained, batch, 0, 0)
    found = gradients_of(trained)
    assert found.keys() == wanted.keys() == dict(model.named_parameters()).keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
    assert {name: float(value) for name, value in stepped.losses.items()} == pytest.approx(
        {f"align/{name}": value.item() for name, value in losses.align.items()}
        | {f"flow/{name}": value.item() for name, value in losses.flow.items()},
        rel=1e-5,
    )


def test_trap_28_micro_batches_give_the_gradient_of_the_whole() -> None:
    """Trap 28."""
    recipe = _unclipped(tiny_recipe())
    results = []
    for micro in (0, 1, 2):
        trained = build(recipe, ALONE)
        stepped = take_step(trained, random_batch(), 0, micro)
        results.append((gradients_of(trained), stepped))
    whole, stepped = results[0]
    for gradients, other in results[1:]:
        for name, gradient in whole.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6)
        for name, value in stepped.losses.items():
            torch.testing.assert_close(other.losses[name], value)


@pytest.mark.parametrize("micro", [0, 1])
def test_trap_13_the_average_moves_once_a_step_after_the_optimiser(micro: int) -> None:
    """Traps 11 to 13: the reference is the closed form of the online weights after each step."""
    recipe = tiny_recipe()
    trained = build(recipe, ALONE)
    wanted = {name: value.clone() for name, value in trained.model.encoder.state_dict().items()}
    for step in range(3):
        take_step(trained, random_batch(step), step, micro)
        for name, value in trained.model.encoder.state_dict().items():
            wanted[name] = 0.9 * wanted[name] + 0.1 * value
    for name, value in trained.reference.state_dict().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-7)
        assert not torch.equal(value, trained.model.encoder.state_dict()[name])


def test_without_an_average_the_reference_is_the_online_encoder() -> None:
    recipe = tiny_recipe()
    recipe = recipe.model_copy(update={"optim": recipe.optim.model_copy(update={"ema": 0.0})})
    trained = build(recipe, ALONE)
    take_step(trained, random_batch(), 0, 0)
    for name, value in trained.reference.state_dict().items():
        torch.testing.assert_close(value, trained.model.encoder.state_dict()[name])


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    trained = build(tiny_recipe(), ALONE)
    assert take_step(trained, random_batch(0), 0, 0).taken
    before = {name: value.clone() for name, value in trained.model.state_dict().items()}
    average = {name: value.clone() for name, value in trained.reference.state_dict().items()}
    poisoned = random_batch(1)
    latents_of(poisoned)[2, 1, 0, 0, 0] = float("inf")
    stepped = take_step(trained, poisoned, 1, 0)
    assert not stepped.taken
    assert all(torch.equal(value, before[name]) for name, value in trained.model.state_dict().items())
    assert all(torch.equal(value, average[name]) for name, value in trained.reference.state_dict().items())
    assert take_step(trained, random_batch(2), 2, 0).taken
    assert all(torch.isfinite(value).all() for value in trained.model.state_dict().values())


def test_losses_begin_where_the_method_says() -> None:
    """docs/method.md 4.2: 2 for flow with a zero-initialised head; alignment: 1 of the target, and 1 of a narrow z."""
    stepped = take_step(build(tiny_recipe(), ALONE), random_batch(clips=16), 0, 0)
    found = means({name: float(value) for name, value in stepped.losses.items()})
    assert found["flow"] == pytest.approx(2.0, abs=0.1)
    assert found["align"] == pytest.approx(2.0, abs=0.5)


def test_a_step_is_a_function_of_draw_numbers_not_of_the_place_in_therandom_batch() -> None:
    """The same clips in another order, with their draw numbers, give the same mean losses."""
    recipe, batch = tiny_recipe(), random_batch()
    order = [2, 0, 3, 1]
    turned = replace(
        batch,
        draws=tuple(batch.draws[i] for i in order),
        latents=latents_of(batch)[order],
        visible=[ids[order] for ids in batch.visible],
    )
    one, other = (take_step(build(recipe, ALONE), some, 0, 0) for some in (batch, turned))
    for name, value in one.losses.items():
        torch.testing.assert_close(other.losses[name], value)
    renumbered = replace(batch, draws=(100, 101, 102, 103))
    assert take_step(build(recipe, ALONE), renumbered, 0, 0).losses["flow/short"] != one.losses["flow/short"]


@pytest.mark.parametrize("off", ["align", "flow"])
def test_ablations_log_only_what_they_have(off: str) -> None:
    recipe = tiny_recipe()
    recipe = recipe.model_copy(update={"losses": recipe.losses.model_copy(update={off: 0.0})})
    stepped = take_step(build(recipe, ALONE), random_batch(), 0, 0)
    assert stepped.taken
    assert not any(name.startswith(off) for name in stepped.losses)
    assert means(dict.fromkeys(stepped.losses, 1.0))[off] != means(dict.fromkeys(stepped.losses, 1.0))[off]


def test_the_seed_decides_the_initialisation_and_leaves_the_global_generator() -> None:
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    one, same, other = (build_model(tiny_recipe().model_copy(update={"seed": seed})) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(value, same.state_dict()[name]) for name, value in one.state_dict().items())
    assert not torch.equal(one.encoder.embed.weight, other.encoder.embed.weight)


SYNCHRONISING = ("__bool__", "__int__", "__float__", "__index__", "item", "tolist", "numpy", "cpu", "nonzero")


@pytest.mark.parametrize("micro", [4, 2])
def test_a_step_waits_for_no_number_of_its_device(micro: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU each of these calls would wait for all that is queued."""
    trained = build(tiny_recipe(), ALONE)
    take_step(trained, random_batch(0), 0, micro)  # the optimiser's state is there
    batch, calls = random_batch(1), list[str]()
    for name in SYNCHRONISING:
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, _counted(original, name, calls))
    stepped = take_step(trained, batch, 1, micro)
    assert calls == []
    assert bool(stepped.taken)
    assert calls == ["__bool__"]


def _counted(original: Callable[..., Any], name: str, calls: list[str]) -> Callable[..., Any]:
    def call(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return original(self, *args, **kwargs)

    return call
