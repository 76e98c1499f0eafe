"""Whiten an autoencoder's latents by folding the whitening into its own weights.

Without it, three directions have 91 % of the latents' variance, and a predictor learns those first (docs/demo.md). ZCA,
z' = C^(-1/2) (z - m), goes into the mean rows of `quant_conv` and its inverse into `post_quant_conv`: both are 1x1
convolutions, so reconstructions do not change. Axes: c, d channels; n samples.
"""

import torch
from diffusers import AutoencoderKL
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor


def moments(latents: Float[Tensor, "n c h w"]) -> tuple[Float[Tensor, " c"], Float[Tensor, "c c"]]:
    """Mean and covariance over frames and cells, in float64."""
    flat = rearrange(latents, "n c h w -> (n h w) c").double()
    return flat.mean(dim=0), torch.cov(flat.T)


@torch.no_grad()
def fold_whitening(
    model: AutoencoderKL, mean: Float[Tensor, " c"], covariance: Float[Tensor, "c c"], variance: Float[Tensor, " c"]
) -> None:
    """Make `model` give whitened latents, in place.

    `variance` is the posterior's mean variance per channel [c] before. A full matrix turns a diagonal posterior into
    one that is not; its diagonal, averaged over the data, becomes the constant log-variance of the new one.
    """
    values, vectors = torch.linalg.eigh(covariance.double())
    assert float(values.min()) > 0, "latents do not span their channels"
    whiten = einsum(vectors, values**-0.5, vectors, "c k, k, d k -> c d")
    restore = einsum(vectors, values**0.5, vectors, "c k, k, d k -> c d")
    channels = len(mean)
    weight = rearrange(model.quant_conv.weight, "c d 1 1 -> c d").double()
    bias = model.quant_conv.bias.double()
    weight[:channels] = whiten @ weight[:channels]
    bias[:channels] = whiten @ (bias[:channels] - mean.double())
    weight[channels:] = 0
    bias[channels:] = (whiten**2 @ variance.double()).log()
    after = rearrange(model.post_quant_conv.weight, "c d 1 1 -> c d").double()
    model.post_quant_conv.bias.copy_(model.post_quant_conv.bias.double() + after @ mean.double())
    model.post_quant_conv.weight.copy_(rearrange(after @ restore, "c d -> c d 1 1"))
    model.quant_conv.weight.copy_(rearrange(weight, "c d -> c d 1 1"))
    model.quant_conv.bias.copy_(bias)
