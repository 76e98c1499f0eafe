"""Is the representation collapsing? Feature spread and effective rank of clips that never change, and an alarm.

All ranks compute features, each of its share of the clips. The eigenvalues (1.8 s for ViT-L on a CPU) are for a thread.

Both numbers depend on the data, so the alarm compares the rank with the rank at initialisation.

Axes: B clips, N tokens of a clip, i numbers in a token, M tokens, D width.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import layer_norm

from nextvid.config.project import Project
from nextvid.model.encoder import Encoder
from nextvid.train.distributed import Ranks
from nextvid.train.run import Run

CLIPS = 48  # our choice
ALARM_RATIO = 0.3  # our choice: of the rank at initialisation; the demo's online encoder dips to .36 of it ...
ALARM_AFTER = 0.25  # ... at a tenth of its steps, so the alarm begins after this share
MAX_TOKENS = 16384  # our choice: enough for a covariance of width 1408, and small on any device

Scores = Callable[[], dict[str, Any]]  # computes the values of a `scores` event


@dataclass(frozen=True)
class Scorer:
    """What scores an encoder on benchmarks at each diagnosis, and why benchmarks are left out, by name, on rank 0.

    `encode` computes features by all ranks; what it returns is for a thread of rank 0.
    """

    encode: Callable[[Encoder], Scores]
    left_out: Mapping[str, str]


# Of a run, by its reference encoder (nextvid/evaluate/training_scores.py, which training must not import).
OpenScorer = Callable[[Project, Run, Encoder, Ranks], AbstractContextManager[Scorer]]


def share(ranks: Ranks) -> range:
    """The clips that this rank looks at."""
    return range(CLIPS * ranks.rank // ranks.count, CLIPS * (ranks.rank + 1) // ranks.count)


@torch.no_grad()
def features_of(encoder: Encoder, tokens: Float[Tensor, "B N i"], batch: int, ranks: Ranks) -> Float[Tensor, "M D"]:
    """Features of all ranks' clips, the same on each rank: every n-th token, at most MAX_TOKENS, on the device.

    `tokens` are those of this rank's share, `batch` clips at a time. Every rank must call this.
    """
    length, width = tokens.shape[1], encoder.model.encoder.width
    every, before = -(-CLIPS * length // MAX_TOKENS), share(ranks).start * length
    found = torch.zeros(-(-CLIPS * length // every), width, device=tokens.device)
    if len(tokens):
        parts = [encoder(part, length // encoder.model.cells).float().flatten(0, 1) for part in tokens.split(batch)]
        mine = torch.cat(parts)[-before % every :: every]
        found[-(-before // every) :][: len(mine)] = mine
    return ranks.sum(found)


def judged(features: Float[Tensor, "M D"]) -> dict[str, float]:
    """`feature_std` and `effective_rank`, computed on the CPU; NaN if a feature is not finite."""
    features = features.cpu()
    if not torch.isfinite(features).all():
        return {"feature_std": math.nan, "effective_rank": math.nan}
    return {"feature_std": feature_std(features), "effective_rank": effective_rank(features)}


def collapsed(rank: float, first_rank: float, step: int, steps: int) -> bool:
    """Whether the effective rank is an alarm at this step; NaN is one."""
    return step >= ALARM_AFTER * steps and not rank >= ALARM_RATIO * first_rank


@torch.no_grad()
def effective_rank(features: Float[Tensor, "*M D"]) -> float:
    """Exponential of the entropy of the covariance's eigenvalues, after a LayerNorm without affine.

    1 if all tokens lie on one line or are equal, D if all directions have equal variance.
    """
    tokens = layer_norm(features.float(), features.shape[-1:]).flatten(0, -2)
    centred = (tokens - tokens.mean(dim=0)).double()
    eigenvalues = torch.linalg.eigvalsh(centred.T @ centred).clamp_min(0)
    total = eigenvalues.sum()
    if total <= 0:
        return 1.0
    share = eigenvalues / total
    return float(torch.exp(-torch.xlogy(share, share).sum()))


@torch.no_grad()
def feature_std(features: Float[Tensor, "*M D"]) -> float:
    """Standard deviation over tokens, averaged over channels; 0 is collapse to one point."""
    return float(features.float().flatten(0, -2).std(dim=0, correction=0).mean())
