"""Copies one after the other give the mean and the gradients of all at once, and hold one graph at a time."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nextvid.model.flow import folded_mean
from tests.nextvid.model.tiny import clip, features, key, s_model, tiny_model, tiny_recipe, visible

COPIES = 4
KINDS: dict[str, dict[str, Any]] = {
    "dit_iso": {},
    "hidden": {"model": {"decoder": {"condition": "hidden"}}},
    "masked": {"model": {"predictor": {"support": "masked"}}},
    "xattn_self": s_model("xattn_self"),
}


class Counter:
    """Bytes that graphs hold now, and the most they ever held."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def hold(self, tensor: Tensor) -> "Held":
        return Held(self, tensor)

    def change(self, size_bytes: int) -> None:
        self.now += size_bytes
        self.most = max(self.most, self.now)


class Held:
    """One tensor that a graph holds; counted until the graph lets it go."""

    def __init__(self, counter: Counter, tensor: Tensor) -> None:
        self.counter, self.tensor, self.size = counter, tensor, tensor.nbytes
        counter.change(self.size)

    def __del__(self) -> None:
        self.counter.change(-self.size)


def losses_and_gradients(kind: str, fold: bool, bf16: bool = False) -> tuple[list[Tensor], dict[str, Tensor]]:
    recipe = tiny_recipe(**KINDS[kind])
    model = tiny_model(recipe)
    tokens, targets = clip(recipe)
    y = features(model, tokens) if recipe.losses.align else None
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        found = model(tokens, targets, y, visible(), key(), COPIES, fold=fold)
    (3.0 * found.total).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return [found.total.detach(), *(value.detach() for value in found.flow.values())], gradients


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_all_copies_at_once(kind: str) -> None:
    wanted, at_once = losses_and_gradients(kind, fold=False)
    found, folded = losses_and_gradients(kind, fold=True)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert folded.keys() == at_once.keys()
    for name, gradient in at_once.items():
        torch.testing.assert_close(folded[name], gradient, rtol=1e-4, atol=1e-6)


def test_under_autocast_every_copy_has_its_own_graph() -> None:
    wanted, at_once = losses_and_gradients("dit_iso", fold=False, bf16=True)
    found, folded = losses_and_gradients("dit_iso", fold=True, bf16=True)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    for name, gradient in at_once.items():
        assert folded[name].dtype == torch.float32
        error = (folded[name] - gradient).norm() / gradient.norm().clamp_min(1e-3)
        assert float(error) < 0.03, name  # bf16 keeps 8 bits


def test_a_graph_at_a_time_is_held() -> None:
    """The most that graphs hold at once grows with the copies, and does not when they are folded."""
    most: dict[tuple[bool, int], int] = {}
    model = tiny_model()
    tokens, targets = clip()
    y = features(model, tokens)
    for fold in (False, True):
        for copies in (2, COPIES):
            counter = Counter()
            with torch.autograd.graph.saved_tensors_hooks(counter.hold, lambda held: held.tensor):
                model(tokens, targets, y, visible(), key(), copies, only=0, fold=fold).total.backward()
            most[fold, copies] = counter.most
            assert counter.now == 0
    two_copies = most[False, COPIES] - most[False, 2]
    assert two_copies > 0.3 * most[False, COPIES]
    assert most[True, COPIES] - most[True, 2] < 0.02 * two_copies
    assert most[True, COPIES] < most[False, 2]


def test_in_float64_it_is_the_mean() -> None:
    layer = nn.Linear(5, 3).double()
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)

    def loss_of(z: Tensor, copy: int) -> Tensor:
        return (layer(z) * (copy + 1)).sin().sum()

    parameters = list(layer.parameters())
    plain = torch.stack([loss_of(x, copy) for copy in range(3)]).mean()
    wanted = torch.autograd.grad(plain, [x, *parameters])
    mean = folded_mean(loss_of, 3, x, parameters)
    found = torch.autograd.grad(2 * mean, [x, *parameters])
    torch.testing.assert_close(mean.double(), plain, rtol=1e-6, atol=1e-6)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, 2 * other, rtol=1e-12, atol=1e-12)


def test_without_gradients_nothing_is_differentiated() -> None:
    model = tiny_model()
    tokens, targets = clip()
    y = features(model, tokens)
    with torch.no_grad():
        folded, at_once = (model(tokens, targets, y, visible(), key(), COPIES, fold=fold) for fold in (True, False))
    assert not folded.total.requires_grad
    torch.testing.assert_close(folded.total, at_once.total)
