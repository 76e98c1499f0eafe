"""Is the representation collapsing? Feature spread and effective rank, on clips that never change.

The numbers are the model's (nextvid/train/diagnose.py); here stand the clips' count and the alarm. The alarm is
relative to the rank at initialisation, since the number itself depends on the data (research: demo 5; design 8).

Axes: B clips, N tokens, i numbers in a token.

Numbers that tell a collapsed encoder from a healthy one (research: training 3, demo 5).

Both are relative to the data and to initialisation; the alarm that compares them is the trainer's. It holds no logging.

Axes: M tokens, D width.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import layer_norm

from nextvid.model.encoder import Encoder

CLIPS = 48  # research demo (2): "48 test clips"
ALARM_RATIO = 0.3  # research demo (5): alarm below .3 of the rank at initialisation ...
ALARM_AFTER = 0.25  # ... once a quarter of the steps is done
MAX_TOKENS = 16384  # our choice: enough for a covariance of width 1408, and small on any device


@torch.no_grad()
def diagnose(encoder: Encoder, tokens: Float[Tensor, "B N i"], batch: int) -> dict[str, float]:
    """Both numbers of an encoder's features of whole clips, `batch` clips at a time; NaN where features are."""
    frames = tokens.shape[1] // encoder.model.cells
    features = torch.cat([encoder(part, frames).float().flatten(0, 1) for part in tokens.split(batch)])
    features = features[:: -(-len(features) // MAX_TOKENS)].cpu()
    if not torch.isfinite(features).all():
        return {"feature_std": math.nan, "effective_rank": math.nan}
    return {"feature_std": feature_std(features), "effective_rank": effective_rank(features)}


def collapsed(rank: float, first_rank: float, step: int, steps: int) -> bool:
    """Whether the alarm sounds. A rank that is no number is an alarm too."""
    return step >= ALARM_AFTER * steps and not rank >= ALARM_RATIO * first_rank


@torch.no_grad()
def effective_rank(features: Float[Tensor, "*M D"]) -> float:
    """Exponential of the entropy of the covariance's eigenvalues, of features through a LayerNorm without affine.

    1 when all tokens lie on one line, D when every direction holds as much. Raises nothing on constant features: 1.
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
