"""Flow matching: draws of time and noise, the straight path, its loss, and Euler sampling (docs/method.md 4.2, 11).

tau = 0 is noise and tau = 1 is data, in training and in sampling. Draws are keyed by seed, step, clip, strategy and
copy, never by rank or position in the batch, so ranks, micro-batches and resumption change nothing.

Axes: k copies, B clips, F predicted tubelets, n tokens per tubelet, C target channels.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from nextvid.config.recipe import LossConfig

ODE_STEPS = 50  # docs/method.md 11


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
            generator.manual_seed(_hash(key.seed, key.step, draw, strategy, copy))
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
    velocity: Callable[[Tensor, float], Tensor], noise: Float[Tensor, "*shape"], steps: int = ODE_STEPS
) -> Float[Tensor, "*shape"]:
    """Integrate dh/dtau = velocity(h, tau) from noise at tau = 0 to data at tau = 1 in equal steps."""
    h = noise
    for index in range(steps):
        h = h + velocity(h, index / steps) / steps
    return h


def _hash(*parts: int) -> int:
    """A 63-bit seed of the integers given; stable over machines and versions."""
    text = ",".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
