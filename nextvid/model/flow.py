"""Flow matching: draws of time and noise, the straight path, its loss, and Euler sampling (docs/method.md 4.2, 11).

The decoder reads z k times (docs/method.md 4.2): k graphs in memory, if run at once. `folded_mean` holds one at a time.

tau = 0 is noise and tau = 1 is data, in training and in sampling. Draws are keyed by seed, step, clip, strategy and
copy, never by rank or position in the batch, so ranks, micro-batches and resumption change nothing.

Axes: k copies, B clips, F predicted tubelets, n tokens per tubelet, C target channels.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction, FunctionCtx

from nextvid.config.recipe import LossConfig

ODE_STEPS = 50  # docs/method.md 11

LossOf = Callable[[Tensor, int], Tensor]  # (condition, copy) -> that copy's loss


@dataclass(frozen=True)
class NoiseKey:
    """What tau and noise are drawn from: the run's seed, the optimiser step and each clip's draw number."""

    seed: int
    step: int
    draws: tuple[int, ...]


class FlowDraws(NamedTuple):
    """tau in {0, 1/1000, ..., 999/1000} and Gaussian noise."""

    tau: Float[Tensor, "k B F"]
    noise: Float[Tensor, "k B F n C"]


def draw_flow(
    key: NoiseKey, strategy: int, copies: range, shape: tuple[int, int, int], losses: LossConfig, device: torch.device
) -> FlowDraws:
    """Draws of each clip for one mask strategy; `shape` is (F, n, C).

    The generator is seeded for every (seed, step, draw, strategy, copy). The CPU's keeps 32 bits of the seed, the GPU's
    all; the two give different numbers, so results are reproducible on one kind of device only.
    """
    frames, cells, channels = shape
    generator = torch.Generator(device)
    indices, noises = [], []
    for copy in copies:
        for draw in key.draws:
            seed = hashlib.blake2b(f"{key.seed},{key.step},{draw},{strategy},{copy}".encode(), digest_size=8).digest()
            generator.manual_seed(int.from_bytes(seed, "little") >> 1)  # 63 bits, the same on every machine
            shared = losses.tau_share == "clip"
            index = torch.randint(losses.timesteps, (1 if shared else frames,), generator=generator, device=device)
            indices.append(index.expand(frames))
            noises.append(torch.randn(frames, cells, channels, generator=generator, device=device))
    leading = (len(copies), len(key.draws))
    tau = torch.stack(indices).unflatten(0, leading).float() / losses.timesteps
    return FlowDraws(tau, torch.stack(noises).unflatten(0, leading))


def interpolate(draws: FlowDraws, target: Float[Tensor, "B F n C"]) -> Float[Tensor, "k B F n C"]:
    """h_tau = (1 - tau) h0 + tau h1."""
    tau = draws.tau[..., None, None]
    return (1.0 - tau) * draws.noise + tau * target


def flow_loss(
    velocity: Float[Tensor, "k B F n C"], draws: FlowDraws, target: Float[Tensor, "B F n C"]
) -> Float[Tensor, ""]:
    """Mean over every element of (velocity - (h1 - h0))^2, in fp32 (docs/method.md 4.2)."""
    return (velocity.float() - (target - draws.noise)).square().mean()


def euler(
    velocity: Callable[[Tensor, float], Tensor], noise: Float[Tensor, "*shape"], steps: int
) -> Float[Tensor, "*shape"]:
    """Integrate dh/dtau = velocity(h, tau) from noise at tau = 0 to data at tau = 1 in equal steps."""
    h = noise
    for index in range(steps):
        h = h + velocity(h, index / steps) / steps
    return h


def folded_mean(
    loss_of: LossOf, copies: int, condition: Float[Tensor, "*shape"], parameters: Sequence[nn.Parameter]
) -> Float[Tensor, ""]:
    """Mean of `loss_of(condition, copy)` over the copies, with one copy's graph in memory at a time.

    Each copy's backward follows its forward, and the gradients of the condition and of `parameters` (all other tensors
    that get one) are kept for the ordinary backward; nothing is computed twice. From outside it is one differentiable
    function, so DDP and gradient accumulation need not know.
    """
    if not torch.is_grad_enabled():
        return torch.stack([loss_of(condition, copy) for copy in range(copies)]).mean()
    mean: Tensor = _FoldedMean.apply(loss_of, copies, condition, *parameters)
    return mean


class _FoldedMean(torch.autograd.Function):
    """Computes gradients in `forward`, scales them in `backward`."""

    @staticmethod
    def forward(ctx: FunctionCtx, loss_of: LossOf, copies: int, condition: Tensor, *parameters: nn.Parameter) -> Tensor:
        leaf = condition.detach().requires_grad_()
        inputs = [leaf, *parameters]
        total, sums = condition.new_zeros((), dtype=torch.float32), [torch.zeros_like(each) for each in inputs]
        device = condition.device.type
        # No cache of cast weights: a cached cast belongs to a copy's graph, which is freed before the next copy.
        uncached = torch.autocast(
            device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device), cache_enabled=False
        )
        for copy in range(copies):
            with torch.enable_grad(), uncached:
                loss = loss_of(leaf, copy) / copies
            gradients = torch.autograd.grad(loss, inputs)
            torch._foreach_add_(sums, gradients)
            total += loss.detach()
        ctx.save_for_backward(*sums)
        return total

    @staticmethod
    def backward(ctx: BackwardCFunction, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *torch._foreach_mul(ctx.saved_tensors, grads[0])
