"""k-NN against scikit-learn's, and its ties and edges."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from einops import rearrange
from sklearn.neighbors import KNeighborsClassifier

from nextvid.evaluate import fitting
from nextvid.evaluate.features import FrozenEncoder
from nextvid.evaluate.fitting import nearest_labels
from nextvid.evaluate.kept import vectors_of


@pytest.mark.parametrize("k", [1, 5, 20])
def test_agrees_with_scikit_learn(k: int) -> None:
    rng = np.random.default_rng(k)
    known, asked = rng.normal(size=(150, 8)), rng.normal(size=(60, 8))
    labels = rng.integers(0, 5, 150)
    theirs = KNeighborsClassifier(k, metric="cosine", algorithm="brute").fit(known, labels).predict(asked)
    np.testing.assert_array_equal(nearest_labels(known, labels, asked, k), theirs)


def test_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    known, asked, labels = rng.normal(size=(50, 4)), rng.normal(size=(31, 4)), rng.integers(0, 3, 50)
    whole = nearest_labels(known, labels, asked)
    monkeypatch.setattr(fitting, "QUERIES_AT_ONCE", 7)
    monkeypatch.setattr(fitting, "KNOWN_AT_ONCE", 11)
    np.testing.assert_array_equal(nearest_labels(known, labels, asked), whole)


def test_tie_goes_to_the_smallest_label() -> None:
    known = np.array([[1.0, 0.1], [1.0, -0.1]])
    assert nearest_labels(known, np.array([2, 1]), np.array([[1.0, 0.0]]), 2).tolist() == [1]


def test_length_of_a_feature_does_not_matter() -> None:
    known, labels = np.array([[1.0, 0.0], [0.0, 50.0]]), np.array([0, 1])
    assert nearest_labels(known, labels, np.array([[100.0, 90.0], [0.01, 0.02]]), 1).tolist() == [0, 1]


def test_fewer_clips_than_neighbours() -> None:
    known, labels = np.eye(3), np.array([1, 1, 0])
    assert nearest_labels(known, labels, np.eye(3), 20).tolist() == [1, 1, 1]


def test_zero_features_are_answered() -> None:
    assert nearest_labels(np.zeros((4, 2)), np.array([1, 1, 1, 0]), np.zeros((2, 2))).tolist() == [1, 1]


def test_changes_tell_what_a_mean_over_time_cannot() -> None:
    """Two classes that move in opposite directions, in clips that look unlike each other."""
    rng, times, segments = np.random.default_rng(0), 4, 2
    labels = rng.integers(0, 2, 120)
    moved = np.arange(times) - (times - 1) / 2
    ramps = np.where(labels[:, None] == 1, moved, -moved)  # n t
    features = np.zeros((120, segments, times, 3, 8), np.float32)
    features[..., 0] += ramps[:, None, :, None]
    features[..., 1:] += 20 * rng.normal(size=(120, 1, 1, 1, 7))  # a clip's own look
    features += 0.1 * rng.normal(size=features.shape)
    encoder = FrozenEncoder("moves", "latents", times, 8, times, lambda clips: clips)
    found = vectors_of(torch.from_numpy(rearrange(features, "n g t s d -> n (g t s) d")), encoder, segments)
    right = {
        name: (nearest_labels(v[:80].numpy(), labels[:80], v[80:].numpy()) == labels[80:]).mean()
        for name, v in found.items()
    }
    assert right["change"] == 1.0
    assert right["mean"] < 0.75
    assert {name: v.shape[1] for name, v in found.items()} == {"mean": 8, "by_time": 32, "change": 24}
    assert set(vectors_of(torch.zeros(1, 6, 8), replace(encoder, times=1), 2)) == {"mean", "by_time"}
