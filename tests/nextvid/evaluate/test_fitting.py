"""Training of probes: what must be learnt, what must not, and that probes side by side do not touch each other."""

import numpy as np
import pytest
import torch
from jaxtyping import Float, Int

from nextvid.evaluate import fitting
from nextvid.evaluate.attentive import Probes, ProbeSettings
from nextvid.evaluate.fitting import accuracies, fit, normalise

SMALL = ProbeSettings(epochs=8, warm_up_steps=10)


def clips_with_a_mark(clips: int, classes: int, seed: int) -> tuple[Float[np.ndarray, "N L D"], Int[np.ndarray, "N"]]:
    """Noise, with the class's direction in one token at a random place: pooling dilutes it, attention finds it."""
    rng = np.random.default_rng(seed)
    marks = np.random.default_rng(99).normal(size=(classes, 32)) * 4
    tokens, labels = rng.normal(size=(clips, 24, 32)), rng.integers(0, classes, clips)
    tokens[np.arange(clips), rng.integers(0, 24, clips)] += marks[labels]
    return tokens.astype(np.float32), labels


def test_one_probe_learns_as_if_alone() -> None:
    """Rates and seeds trained side by side must not touch each other: clipping, batches, moments."""
    tokens, labels = clips_with_a_mark(96, 3, seed=1)
    together = fit(normalise(tokens), labels, 3, SMALL, seeds=[5, 6])
    alone = fit(normalise(tokens), labels, 3, SMALL.model_copy(update={"rates": SMALL.rates[1:]}), seeds=[6])
    for name, parameter in alone.named_parameters():
        torch.testing.assert_close(
            together.get_parameter(name)[1 * 2 + 1], parameter[0], rtol=1e-2, atol=2e-3, msg=name
        )


def test_separable_labels_are_learnt_and_generalise() -> None:
    train, labels = clips_with_a_mark(400, 4, seed=1)
    test, answers = clips_with_a_mark(200, 4, seed=2)
    probes = fit(normalise(train), labels, 4, SMALL, seeds=[0, 1])
    right = accuracies(probes, normalise(test), answers)
    assert right.shape == (2, 2)
    assert (right[:, 1] > 0.9).all()


def test_random_labels_stay_at_chance() -> None:
    """4 classes, 400 test clips: chance is .25 with a standard error of .022; 5 of those bound the best of 4 probes."""
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(2, 400, 24, 32)).astype(np.float32)
    probes = fit(normalise(train), rng.integers(0, 4, 400), 4, SMALL, seeds=[0, 1])
    right = accuracies(probes, normalise(test), rng.integers(0, 4, 400))
    assert (np.abs(right - 0.25) < 0.11).all()


def test_same_seed_same_probe() -> None:
    tokens, labels = clips_with_a_mark(64, 3, seed=1)
    first, second = (fit(normalise(tokens), labels, 3, SMALL, seeds=[7]) for _ in range(2))
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name)), name


def test_each_epoch_is_asked_for_its_own_tokens() -> None:
    """Once each, in order; where they are the same in every epoch the probes are those of tokens that stand."""
    tokens, labels = clips_with_a_mark(64, 3, seed=1)
    asked: list[int] = []

    def of_epoch(epoch: int) -> torch.Tensor:
        asked.append(epoch)
        return normalise(tokens)

    varied, standing = fit(of_epoch, labels, 3, SMALL, seeds=[7]), fit(normalise(tokens), labels, 3, SMALL, seeds=[7])
    assert asked == list(range(SMALL.epochs))
    for name, parameter in varied.named_parameters():
        assert torch.equal(parameter, standing.get_parameter(name)), name
    other = fit(lambda epoch: normalise(tokens + (epoch == 3)), labels, 3, SMALL, seeds=[7])
    assert not torch.equal(other.parts["query"], varied.parts["query"])


def test_views_are_averaged_before_the_vote() -> None:
    """Two views, one of them sure and wrong in the other direction: the average decides, and the clip counts once."""
    tokens, labels = clips_with_a_mark(300, 3, seed=1)
    probes = fit(normalise(tokens), labels, 3, SMALL.model_copy(update={"rates": (3e-3,)}), seeds=[0])
    test, answers = clips_with_a_mark(60, 3, seed=4)
    doubled = np.concatenate([test, test])
    groups = np.tile(np.arange(60), 2)
    once = accuracies(probes, normalise(test), answers)
    twice = accuracies(probes, normalise(doubled), np.tile(answers, 2), groups)
    np.testing.assert_allclose(once, twice)
    views = np.stack([test[:30], test[30:]], 1).reshape(60, 24, 32)  # two different clips as views of one
    shares = probes(normalise(views)[None])[0, 0].softmax(-1).detach().numpy().reshape(30, 2, 3).mean(1)
    expected = (shares.argmax(-1) == answers[:30]).mean()
    seen = accuracies(probes, normalise(views), np.repeat(answers[:30], 2), np.repeat(np.arange(30), 2))
    np.testing.assert_allclose(seen, expected)


def test_rates_follow_warm_up_and_cosine() -> None:
    shares = [fitting._share_of_peak(step, 100, 40) for step in range(100)]
    assert shares[0] == pytest.approx(1 / 40)
    assert shares[39] == shares[40] == 1.0
    assert shares[70] == pytest.approx(0.5)
    assert shares[99] < 0.01
    assert fitting._share_of_peak(0, 100, 0) == 1.0


def test_clipping_is_by_probe() -> None:
    probes = Probes(16, 3, SMALL, seeds=[0])
    for parameter in probes.parameters():
        parameter.grad = torch.ones_like(parameter)
        parameter.grad[1] *= 1e-6
    fitting._clip_each(probes, 1.0)
    norms = [sum(float(p.grad[k].square().sum()) for p in probes.parameters() if p.grad is not None) for k in range(2)]
    assert norms[0] == pytest.approx(1.0, rel=1e-3)
    assert 0 < norms[1] < 1e-6


def test_fewer_clips_than_a_batch_still_train() -> None:
    tokens, labels = clips_with_a_mark(10, 2, seed=1)
    assert accuracies(fit(normalise(tokens), labels, 2, SMALL, seeds=[0]), normalise(tokens), labels).shape == (1, 2)
