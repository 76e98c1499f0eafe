"""The re-associated probe against the plain one, and its settings."""

import pytest
import torch

from nextvid.config.benchmarks import BenchmarkConfig, SweepConfig
from nextvid.config.datasets import ClipPolicy
from nextvid.evaluate import attentive
from nextvid.evaluate.attentive import Probes, ProbeSettings, reference_logits
from nextvid.evaluate.fitting import normalise


def scramble(probes: Probes, seed: int = 0) -> Probes:
    """Give every parameter a value of its own, so that no term is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in probes.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return probes


def test_fast_path_equals_the_plain_probe() -> None:
    settings = ProbeSettings(heads=4)
    probes = scramble(Probes(32, 5, settings, seeds=[3, 4, 5]))
    tokens = 3 * torch.randn(7, 11, 32) + 1
    fast = probes(normalise(tokens).expand(3, -1, -1, -1))
    for seed in range(3):
        for rate in range(2):
            plain = reference_logits(probes, rate * 3 + seed, tokens)
            torch.testing.assert_close(fast[seed, rate], plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(probes(normalise(tokens)[None]), fast)  # one batch for all seeds


def test_attention_is_that_of_projected_keys() -> None:
    probes = scramble(Probes(16, 3, ProbeSettings(heads=2), seeds=[3, 4]))
    tokens = 3 * torch.randn(5, 7, 16) + 1
    fast = probes.attention(normalise(tokens).expand(2, -1, -1, -1))
    for seed in range(2):
        for pair in range(2):
            p = {name: parameter[pair * 2 + seed] for name, parameter in probes.parts.items()}
            x = torch.nn.functional.layer_norm(tokens, (16,), p["norm_weight"], p["norm_bias"], attentive.LN_EPS)
            query = (p["ask"] @ p["query"] + p["ask_bias"]).unflatten(0, (2, 8))
            keys = (x @ p["key"].T).unflatten(2, (2, 8))
            plain = (torch.einsum("he,blhe->bhl", query, keys) / 8**0.5).softmax(-1).mean(1)
            torch.testing.assert_close(fast[seed, pair], plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(probes.attention(normalise(tokens)[None]), fast)


def test_gradients_of_fast_and_plain_agree() -> None:
    probes = scramble(
        Probes(16, 3, ProbeSettings(heads=2, sweep=(SweepConfig(rates=(1e-3,), weight_decays=(0.05,)),)), seeds=[0])
    )
    tokens, labels = torch.randn(6, 5, 16), torch.randint(0, 3, (6,))
    torch.nn.functional.cross_entropy(reference_logits(probes, 0, tokens), labels).backward()
    plain = {name: parameter.grad for name, parameter in probes.named_parameters()}
    probes.zero_grad()
    torch.nn.functional.cross_entropy(probes(normalise(tokens)[None])[0, 0], labels).backward()
    for name, parameter in probes.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, plain[name], rtol=1e-3, atol=1e-5, msg=name)


def test_each_seed_sees_its_own_batch() -> None:
    probes = scramble(Probes(16, 3, ProbeSettings(heads=2), seeds=[0, 1]))
    tokens = normalise(torch.randn(4, 5, 16))
    both = probes(torch.stack([tokens[:2], tokens[2:]]))
    swapped = probes(torch.stack([tokens[2:], tokens[2:]]))
    assert torch.equal(both[1], swapped[1])
    assert not torch.allclose(both[0], swapped[0])


def test_seeds_differ_and_rates_start_equal() -> None:
    probes = Probes(16, 3, ProbeSettings(), seeds=[0, 1])
    start = probes.parts["last"].detach()  # pair-major
    assert torch.equal(start[0], start[2])
    assert torch.equal(start[1], start[3])
    assert not torch.equal(start[0], start[1])


def test_width_must_be_heads_times_something() -> None:
    with pytest.raises(ValueError, match="multiple of 4 probe heads"):
        Probes(30, 3, ProbeSettings(), seeds=[0])


def test_settings_follow_the_width_and_what_the_benchmark_says() -> None:
    policy = ClipPolicy(frames=16, stride=4)
    plain = BenchmarkConfig(datasets=("d",), target="t", policy=policy)
    images = plain.model_copy(update={"policy": ClipPolicy(frames=1)})
    assert attentive.probe_settings(128, "latents", plain) == ProbeSettings()
    assert attentive.probe_settings(1024, "pixels", plain).augment == "video"  # the paper's encoders read pixels
    assert attentive.probe_settings(1024, "pixels", images).augment == "image"
    paper = attentive.probe_settings(1024, "pixels", plain)
    assert (paper.heads, paper.init, paper.query_std, paper.warm_up_steps) == (16, "trunc_normal", 0.02, 0)
    assert len(paper.pairs) == 20
    dives = BenchmarkConfig.model_validate({"datasets": ["d"], "protocol": "diving48"})
    diving = attentive.probe_settings(128, "latents", dives)
    assert [pair[:2] for pair in diving.pairs] == [(1e-3, 0.8), (3e-4, 0.8), (1e-4, 0.8)]
    assert (diving.held_out, paper.held_out) == (0.05, 0.2)
    assert (diving.heads, diving.augment, diving.epochs, diving.batch, diving.init) == (16, "none", 100, 48, "xavier")
    still = BenchmarkConfig.model_validate({"datasets": ["d"], "protocol": "in1k", "augment": "none"})
    assert attentive.probe_settings(1024, "pixels", still).augment == "none"
    assert attentive.probe_settings(1024, "pixels", still).pairs[1] == (5e-4, 5e-4, 5.0, 2e-4)
