"""Training of probes: what must be learnt, what must not, and that probes side by side do not touch each other."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import Float, Int

from nextvid.config.benchmarks import SweepConfig
from nextvid.evaluate import fitting
from nextvid.evaluate.attentive import Pair, Probes, ProbeSettings
from nextvid.evaluate.fitting import Lesson, fit, normalise, rate_at, right_answers, whole_groups
from nextvid.evaluate.stream import Stored
from nextvid.train.distributed import Ranks
from storage.errors import RefusedError

SMALL = ProbeSettings(epochs=8, warm_up_steps=10)


def one(rate: float, decay: float = 0.05) -> tuple[SweepConfig, ...]:
    """A sweep of a single pair."""
    return (SweepConfig(rates=(rate,), weight_decays=(decay,)),)


def learn(tokens: np.ndarray, labels: np.ndarray, settings: ProbeSettings, seeds: list[int], **more: Any) -> Probes:
    """Probes that learnt from features in memory."""
    stored = Stored(tokens.astype(np.float16), torch.device("cpu"), threads=0)
    lesson = Lesson(stored, labels, np.arange(len(tokens)), int(labels.max()) + 1, *tokens.shape[1:])
    return fit(lesson, settings, seeds, **more)


def shares(probes: Probes, tokens: np.ndarray, labels: np.ndarray, groups: np.ndarray | None = None) -> np.ndarray:
    """Accuracy by seed and pair."""
    groups = np.arange(len(labels)) if groups is None else groups
    right = right_answers(probes, torch.from_numpy(tokens).half(), labels, groups)
    found: np.ndarray = right.numpy() / len(np.unique(groups))
    return found


def clips_with_a_mark(clips: int, classes: int, seed: int) -> tuple[Float[np.ndarray, "N L D"], Int[np.ndarray, "N"]]:
    """Noise, with the class's direction in one token at a random place: pooling dilutes it, attention finds it."""
    rng = np.random.default_rng(seed)
    marks = np.random.default_rng(99).normal(size=(classes, 32)) * 4
    tokens, labels = rng.normal(size=(clips, 24, 32)), rng.integers(0, classes, clips)
    tokens[np.arange(clips), rng.integers(0, 24, clips)] += marks[labels]
    return tokens.astype(np.float32), labels


def test_one_probe_learns_as_if_alone() -> None:
    """Pairs and seeds trained side by side must not touch each other: clipping, batches, moments, decay."""
    tokens, labels = clips_with_a_mark(96, 3, seed=1)
    both = SMALL.model_copy(update={"sweep": (SweepConfig(rates=(1e-3, 3e-3), weight_decays=(0.05, 0.4)),)})
    together = learn(tokens, labels, both, seeds=[5, 6])
    alone = learn(tokens, labels, both.model_copy(update={"sweep": one(3e-3, 0.4)}), seeds=[6])
    for name, parameter in alone.named_parameters():
        torch.testing.assert_close(
            together.get_parameter(name)[3 * 2 + 1], parameter[0], rtol=1e-2, atol=2e-3, msg=name
        )


def test_seeds_that_share_an_order_learn_as_if_alone() -> None:
    """In the order of the first seed."""
    tokens, labels = clips_with_a_mark(96, 3, seed=1)
    shared = SMALL.model_copy(update={"own_orders": False})
    together, alone = learn(tokens, labels, shared, seeds=[5, 6]), learn(tokens, labels, SMALL, seeds=[5])
    for name, parameter in alone.named_parameters():
        torch.testing.assert_close(together.get_parameter(name)[::2], parameter, rtol=1e-2, atol=2e-3, msg=name)


def test_separable_labels_are_learnt_and_generalise() -> None:
    train, labels = clips_with_a_mark(400, 4, seed=1)
    test, answers = clips_with_a_mark(200, 4, seed=2)
    right = shares(learn(train, labels, SMALL, seeds=[0, 1]), test, answers)
    assert right.shape == (2, 2)
    assert (right[:, 1] > 0.9).all()


def test_random_labels_stay_at_chance() -> None:
    """4 classes, 400 test clips: chance is .25 with a standard error of .022; 5 of those bound the best of 4 probes."""
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(2, 400, 24, 32)).astype(np.float32)
    probes = learn(train, rng.integers(0, 4, 400), SMALL, seeds=[0, 1])
    assert (np.abs(shares(probes, test, rng.integers(0, 4, 400)) - 0.25) < 0.11).all()


def test_same_seed_same_probe_and_a_batch_in_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, labels = clips_with_a_mark(64, 3, seed=1)
    first, second = (learn(tokens, labels, SMALL, seeds=[7, 8]) for _ in range(2))
    monkeypatch.setattr(fitting, "HEADS_BYTES", 2 * 24 * 32 * 4 * 5)  # 5 clips of each seed at a time
    pieces = learn(tokens, labels, SMALL, seeds=[7, 8])
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name)), name
        torch.testing.assert_close(parameter, pieces.get_parameter(name), rtol=1e-3, atol=1e-4, msg=name)


def test_a_killed_training_goes_on_and_ends_with_the_same_bits(tmp_path: Path) -> None:
    tokens, labels = clips_with_a_mark(64, 3, seed=1)
    whole = learn(tokens, labels, SMALL, seeds=[7, 8])

    def die(epoch: int, loss: float) -> None:
        if epoch == 4:
            raise KeyboardInterrupt

    told: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        learn(tokens, labels, SMALL, seeds=[7, 8], resume=tmp_path / "heads.safetensors", on_epoch=die)
    resumed = learn(
        tokens, labels, SMALL, seeds=[7, 8], resume=tmp_path / "heads.safetensors",
        on_epoch=lambda epoch, loss: told.append(epoch),
    )  # fmt: skip
    assert told == [5, 6, 7]
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(name)), name


def test_views_are_averaged_before_the_vote() -> None:
    """Two views, one of them sure and wrong in the other direction: the average decides, and the clip counts once."""
    tokens, labels = clips_with_a_mark(300, 3, seed=1)
    probes = learn(tokens, labels, SMALL.model_copy(update={"sweep": one(3e-3)}), seeds=[0])
    test, answers = clips_with_a_mark(60, 3, seed=4)
    twice = shares(probes, np.repeat(test, 2, 0), np.repeat(answers, 2), np.repeat(np.arange(60), 2))
    np.testing.assert_allclose(shares(probes, test, answers), twice)
    views = np.stack([test[:30], test[30:]], 1).reshape(60, 24, 32)  # two different clips as views of one
    softmaxes = probes(normalise(torch.from_numpy(views).half())[None])[0, 0].softmax(-1)
    expected = (softmaxes.detach().numpy().reshape(30, 2, 3).mean(1).argmax(-1) == answers[:30]).mean()
    seen = shares(probes, views, np.repeat(answers[:30], 2), np.repeat(np.arange(30), 2))
    np.testing.assert_allclose(seen, expected)


@given(st.lists(st.integers(1, 5), max_size=20), st.integers(1, 8))
def test_pieces_of_whole_groups(sizes: list[int], at_once: int) -> None:
    """Every sample once, in order; no group is cut; no piece is larger than asked, unless it is one group."""
    groups = np.repeat(np.arange(len(sizes)), sizes)
    pieces = list(whole_groups(groups, at_once))
    assert [n for piece in pieces for n in piece.tolist()] == list(range(len(groups)))
    owners = [set(groups[piece].tolist()) for piece in pieces]
    assert sum(map(len, owners)) == len(sizes)
    assert all(len(piece) <= at_once or len(own) == 1 for piece, own in zip(pieces, owners, strict=True))


def test_rates_follow_warm_up_and_cosine() -> None:
    settings = ProbeSettings(epochs=10, warm_up_steps=40)
    shares = [rate_at(step, 10, Pair(1.0, 0.0, 0.0, 0.0), settings) for step in range(100)]
    assert shares[0] == pytest.approx(1 / 40)
    assert shares[39] == shares[40] == 1.0
    assert shares[70] == pytest.approx(0.5)
    assert shares[99] < 0.01
    plain = settings.model_copy(update={"warm_up_steps": 0})
    assert rate_at(0, 10, Pair(1.0, 0.0, 0.0, 0.0), plain) == 1.0
    raised = [rate_at(step, 10, Pair(1.0, 0.0, 0.5, 0.2), plain) for step in range(6)]
    np.testing.assert_allclose(raised, [0.36, 0.52, 0.68, 0.84, 1.0, 1.0])


def test_clipping_is_by_probe() -> None:
    probes = Probes(16, 3, SMALL, seeds=[0])
    for parameter in probes.parameters():
        parameter.grad = torch.ones_like(parameter)
        parameter.grad[1] *= 1e-6
    fitting._clip_each(probes, 1.0)
    norms = [sum(float(p.grad[k].square().sum()) for p in probes.parameters() if p.grad is not None) for k in range(2)]
    assert norms[0] == pytest.approx(1.0, rel=1e-3)
    assert 0 < norms[1] < 1e-6


def test_ranks_beyond_the_batch_are_refused() -> None:
    tokens, labels = clips_with_a_mark(10, 2, seed=1)
    with pytest.raises(RefusedError, match="10 clips cannot be shared by 11 ranks"):
        learn(tokens, labels, SMALL, seeds=[0], ranks=Ranks(0, 11, torch.device("cpu")))
