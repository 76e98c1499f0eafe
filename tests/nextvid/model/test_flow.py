"""Draws of time and noise, the direction of time, and the sampler."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nextvid.config.recipe import LossConfig
from nextvid.model.flow import FlowDraws, NoiseKey, draw_flow, euler, flow_loss, interpolate

CPU = torch.device("cpu")
SHAPE = (3, 4, 5)  # tubelets, cells, channels


def drawn(key: NoiseKey, strategy: int = 0, copies: int = 2, losses: LossConfig | None = None) -> FlowDraws:
    return draw_flow(key, strategy, range(copies), SHAPE, losses or LossConfig(), CPU)


def test_times_are_the_thousand_point_grid_below_one() -> None:
    tau = torch.cat([drawn(NoiseKey(0, step, tuple(range(50)))).tau.flatten() for step in range(30)])
    assert torch.equal((tau * 1000).round() / 1000, tau)
    assert float(tau.min()) == 0.0
    assert torch.equal(tau.max(), torch.tensor(0.999))
    assert abs(float(tau.mean()) - 0.4995) < 0.01  # 9000 draws: standard error 0.003


def test_noise_is_standard_normal() -> None:
    noise = drawn(NoiseKey(0, 0, tuple(range(200)))).noise
    assert abs(float(noise.mean())) < 0.02
    assert abs(float(noise.std()) - 1.0) < 0.02


@given(st.permutations(range(6)), st.integers(1, 5))
def test_draws_belong_to_clips_whatever_the_batch(order: list[int], cut: int) -> None:
    """Ranks and micro-batches change nothing: any split and order of draw numbers gives the same numbers."""
    whole = drawn(NoiseKey(7, 11, tuple(range(6))))
    parts = [drawn(NoiseKey(7, 11, tuple(part))) for part in (order[:cut], order[cut:])]
    assert torch.equal(torch.cat([part.noise for part in parts], dim=1), whole.noise[:, order])
    assert torch.equal(torch.cat([part.tau for part in parts], dim=1), whole.tau[:, order])


def test_trap_21_every_copy_strategy_step_seed_and_clip_has_its_own_draws() -> None:
    found = [
        drawn(NoiseKey(seed, step, (draw,)), strategy, copies=2).noise[copy].flatten()
        for seed in (0, 1)
        for step in (0, 1)
        for draw in (0, 1)
        for strategy in (0, 1)
        for copy in (0, 1)
    ]
    assert len(torch.unique(torch.stack(found), dim=0)) == 32
    tau = drawn(NoiseKey(0, 0, tuple(range(8))), copies=4).tau
    assert (tau != tau[:1]).any(dim=0).all()  # copies
    assert (tau != tau[:, :1]).any(dim=(0, 1)).all()  # clips
    assert (tau != tau[:, :, :1]).any()  # tubelets


def test_one_time_a_clip_where_asked() -> None:
    tau = drawn(NoiseKey(0, 0, tuple(range(8))), losses=LossConfig(tau_share="clip")).tau
    assert torch.equal(tau, tau[:, :, :1].expand_as(tau))
    assert len(tau[:, :, 0].unique()) > 1


def test_trap_21_each_copy_is_noised_by_its_own_time() -> None:
    """Copies at 0, .25, .5, .75 of targets 10: mean and spread of h_tau follow, and losses differ."""
    target = torch.full((2, *SHAPE), 10.0)
    times = torch.tensor([0.0, 0.25, 0.5, 0.75])
    tau = times[:, None, None].expand(4, 2, SHAPE[0])
    noise = torch.randn(4, 2, *SHAPE, generator=torch.Generator().manual_seed(0))
    noisy = interpolate(FlowDraws(tau, noise), target)
    assert torch.allclose(noisy.mean(dim=(1, 2, 3, 4)), 10 * times, atol=0.3)
    assert torch.allclose(noisy.std(dim=(1, 2, 3, 4)), 1 - times, atol=0.15)


def test_trap_20_model_input_tends_to_data_and_starts_as_noise() -> None:
    target, noise = torch.randn(2, *SHAPE), torch.randn(1, 2, *SHAPE)
    ends = [interpolate(FlowDraws(torch.full((1, 2, 3), tau), noise), target) for tau in (0.0, 1.0)]
    assert torch.equal(ends[0], noise)
    assert torch.equal(ends[1][0], target)


def test_trap_29_loss_is_a_mean_over_every_element() -> None:
    target, noise = torch.randn(2, *SHAPE), torch.randn(3, 2, *SHAPE)
    draws = FlowDraws(torch.zeros(3, 2, 3), noise)
    velocity = torch.randn(3, 2, *SHAPE)
    by_hand = sum(
        (float(velocity[k, b].flatten()[i]) - (float(target[b].flatten()[i]) - float(noise[k, b].flatten()[i]))) ** 2
        for k in range(3)
        for b in range(2)
        for i in range(60)
    ) / (3 * 2 * 60)
    assert abs(float(flow_loss(velocity, draws, target)) - by_hand) < 1e-4
    assert float(flow_loss(target - noise, draws, target)) == 0.0


def test_trap_20_euler_recovers_a_gaussian() -> None:
    """Data N(3, 0.5^2): the exact velocity E[h1 - h0 | h_tau] carries N(0, 1) to it."""
    mean, sd = 3.0, 0.5

    def velocity(h: Tensor, tau: float) -> Tensor:
        variance = (1 - tau) ** 2 + tau**2 * sd**2
        deviation = h - tau * mean
        return mean + (tau * sd**2 - (1 - tau)) / variance * deviation

    noise = torch.randn(20000, generator=torch.Generator().manual_seed(0))
    out = euler(velocity, noise, steps=100)
    assert abs(float(out.mean()) - mean) < 0.02
    assert abs(float(out.std()) - sd) < 0.02
