"""k-nearest-neighbour accuracy on mean-pooled tokens: what features tell without any training.

Cosine similarity, k = 20. It is reported beside the attentive probe and never as the headline: on the demo it stays
near chance in every arm (docs/demo.md).

Axes: N reference clips, M queried clips, D width, Y classes.
"""

import numpy as np
from jaxtyping import Float, Int

NEIGHBOURS = 20  # as in DINO and in the demo's study
_AT_ONCE = 1024  # clips; bounds the memory of the similarity matrix


def predict(
    known: Float[np.ndarray, "N D"],
    labels: Int[np.ndarray, "N"],
    queries: Float[np.ndarray, "M D"],
    neighbours: int = NEIGHBOURS,
) -> Int[np.ndarray, "M"]:
    """Majority label of each clip's nearest known clips; a tie goes to the smallest label."""
    neighbours = min(neighbours, len(known))
    classes = int(labels.max()) + 1
    known = _unit(known)
    answers = []
    for first in range(0, len(queries), _AT_ONCE):
        similarity = _unit(queries[first : first + _AT_ONCE]) @ known.T
        nearest = np.argpartition(-similarity, neighbours - 1, axis=1)[:, :neighbours]
        votes = np.zeros((len(nearest), classes), np.int64)
        np.add.at(votes, (np.arange(len(nearest))[:, None], labels[nearest]), 1)
        answers.append(votes.argmax(axis=1))
    return np.concatenate(answers) if answers else np.empty(0, np.int64)


def accuracy(
    known: Float[np.ndarray, "N D"],
    labels: Int[np.ndarray, "N"],
    queries: Float[np.ndarray, "M D"],
    answers: Int[np.ndarray, "M"],
    neighbours: int = NEIGHBOURS,
) -> float:
    """Share of queried clips whose neighbours vote for the right label."""
    return float((predict(known, labels, queries, neighbours) == answers).mean())


def _unit(features: np.ndarray) -> np.ndarray:
    """Rows of length one."""
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    unit: np.ndarray = features / np.maximum(lengths, np.finfo(np.float32).tiny)
    return unit
