"""Numbers that tell a collapsed encoder from a healthy one (research: training 3, demo 5).

Both are relative to the data and to initialisation; the alarm that compares them is the trainer's. It holds no logging.

Axes: M tokens, D width.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import layer_norm


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
