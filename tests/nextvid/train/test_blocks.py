"""Recomputed, compiled and folded steps are the plain step: same losses, same gradients, same names."""

import json
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from nextvid.config.recipe import ExecutionConfig
from nextvid.train.step import Trained, build, take_step
from tests.nextvid.train.tiny import ALONE, gradients_of, random_batch, tiny_recipe


def stepped(how: ExecutionConfig) -> tuple[dict[str, float], dict[str, torch.Tensor], Trained]:
    """Losses and gradients of a second step, whose decoder is past its zero initialisation."""
    trained = build(tiny_recipe(), ALONE, how)
    take_step(trained, random_batch(0), 0, 0)
    found = take_step(trained, random_batch(1), 1, 2)
    return {name: float(value) for name, value in found.losses.items()}, gradients_of(trained), trained


def test_recomputed_blocks_give_the_same_bits() -> None:
    wanted, gradients, plain = stepped(ExecutionConfig())
    found, recomputed, trained = stepped(ExecutionConfig(recompute_blocks=True))
    assert found == wanted
    assert recomputed.keys() == gradients.keys() == dict(plain.model.named_parameters()).keys()
    assert all(torch.equal(recomputed[name], gradient) for name, gradient in gradients.items())
    assert trained.model.state_dict().keys() == plain.model.state_dict().keys()
    assert all(
        torch.equal(a, b) for a, b in zip(trained.reference.parameters(), plain.reference.parameters(), strict=True)
    )


def test_recomputed_blocks_hold_what_enters_them() -> None:
    """Bytes that the graph of a forward keeps."""

    def kept(how: ExecutionConfig) -> int:
        trained = build(tiny_recipe(), ALONE, how)
        weights = {p.untyped_storage().data_ptr() for p in trained.model.parameters()}
        sizes: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = torch.randn(4, 20, 24, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            trained.model.encoder.blocks[0](x, torch.zeros(1, 1, 20, 6, 2), scaled_dot_product_attention)
        return sum(size for place, size in sizes.items() if place not in weights)

    assert kept(ExecutionConfig(recompute_blocks=True)) < 0.3 * kept(ExecutionConfig())


def test_folded_copies_give_the_same_step() -> None:
    wanted, gradients, _ = stepped(ExecutionConfig())
    found, folded, _ = stepped(ExecutionConfig(fold_copies=True))
    assert found == pytest.approx(wanted, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(folded[name], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.timeout(900)  # inductor: 144 s of CPU time
@pytest.mark.parametrize(
    "backend", ["eager", *(pytest.param(b, marks=pytest.mark.faults) for b in ("aot_eager", "inductor"))]
)
def test_compiled_blocks_are_whole_graphs_and_give_the_same_steps(backend: str) -> None:
    """All stages with both strategies, four copies and one, two clip lengths, diagnosis and sampling between the steps.

    In a process without the checks of array shapes at run time, which dynamo cannot trace. `eager` and `aot_eager` run
    the captured graphs without a C compiler; a block that does not fit one graph is an error with any.
    """
    command = [sys.executable, "-m", "tests.nextvid.train.compiled", backend]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=850)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (
        said["graphs"] == 13
    )  # by clip length: encoder of two strategies, reference, predictor of two; decoder 4+1, 1
    assert said["late"] == 0
    assert said["breaks"] == 0
    assert (
        said["error"] < 1e-4
    )  # measured: 3e-6 to 9e-6; AdamW makes the noise of keys' biases as large as any gradient
