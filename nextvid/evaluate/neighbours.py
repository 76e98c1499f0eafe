"""k-nearest-neighbour accuracy on mean-pooled tokens: what features say without any training.

Plain numpy, cosine similarity, k = 20. Holds no torch and no files. It is reported beside the attentive probe and never
as the headline: on the demo it stays near chance in every arm (research demo 5).

Axes: N reference clips, M asked clips, D width, Y classes.
"""

import numpy as np
from jaxtyping import Float, Int

NEIGHBOURS = 20  # DINO's k-NN protocol, and the demo study's
_ASKED_AT_ONCE = 1024  # bounds the similarity matrix, nothing else


def predict(
    known: Float[np.ndarray, "N D"],
    labels: Int[np.ndarray, "N"],
    asked: Float[np.ndarray, "M D"],
    neighbours: int = NEIGHBOURS,
) -> Int[np.ndarray, "M"]:
    """Majority label of each clip's nearest known clips; a tie goes to the smallest label."""
    neighbours = min(neighbours, len(known))
    classes = int(labels.max()) + 1
    known = _unit(known)
    answers = []
    for first in range(0, len(asked), _ASKED_AT_ONCE):
        similarity = _unit(asked[first : first + _ASKED_AT_ONCE]) @ known.T
        nearest = np.argpartition(-similarity, neighbours - 1, axis=1)[:, :neighbours]
        votes = np.zeros((len(nearest), classes), np.int64)
        np.add.at(votes, (np.arange(len(nearest))[:, None], labels[nearest]), 1)
        answers.append(votes.argmax(axis=1))
    return np.concatenate(answers) if answers else np.empty(0, np.int64)


def accuracy(
    known: Float[np.ndarray, "N D"],
    labels: Int[np.ndarray, "N"],
    asked: Float[np.ndarray, "M D"],
    answers: Int[np.ndarray, "M"],
    neighbours: int = NEIGHBOURS,
) -> float:
    """Share of asked clips whose neighbours vote for the right label."""
    return float((predict(known, labels, asked, neighbours) == answers).mean())


def _unit(features: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    unit: np.ndarray = features / np.maximum(lengths, np.finfo(np.float32).tiny)
    return unit
