"""Patches, latent cells and stacked targets: from stored arrays to tokens and back (docs/method.md 1 and 13, trap 15).

Channels of a token run frame by frame: 0..C-1 are the first frame of the tubelet, C..2C-1 the second. Flat ids are
t*S + h*W + w.

Axes: B clips, F frames, u frames per tubelet, T tubelets, C channels of one frame, H and W pixels or unfolded cells,
h and w cells, C2 = C*s*s for s sub-cells per side, S = h*w cells, N = T*S tokens, L tokens gathered, n cells of a
tubelet, i numbers in a token; b is B or 1.
"""

import torch
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from torch import Tensor


def pixel_values(frames: UInt8[Tensor, "B F H W 3"]) -> Float[Tensor, "B F 3 H W"]:
    """Bytes as encoder, decoder targets and autoencoders read them: (u/255 - 0.5) / 0.5 (docs/method.md 1)."""
    return rearrange(frames.float() / 127.5 - 1.0, "b f h w c -> b f c h w")


def pixel_bytes(values: Float[Tensor, "B F 3 H W"]) -> UInt8[Tensor, "B F H W 3"]:
    """The inverse of `pixel_values`, rounded; values outside [-1, 1] are clipped (docs/method.md 11)."""
    return rearrange((values * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8), "b f c h w -> b f h w c")


def pixel_tokens(pixels: Float[Tensor, "B F 3 H W"], patch: int, tubelet: int) -> Float[Tensor, "B N i"]:
    """Patches of `tubelet` frames and `patch` x `patch` pixels, flat in a convolution kernel's order (c, u, y, x)."""
    return rearrange(pixels, "b (t u) c (h y) (w x) -> b (t h w) (c u y x)", u=tubelet, y=patch, x=patch)


def latent_tokens(latents: Float[Tensor, "B F C h w"], tubelet: int) -> Float[Tensor, "B N i"]:
    """Latent cells as encoder input, the frames of a tubelet stacked on channels."""
    return rearrange(latents, "b (t u) c h w -> b (t h w) (u c)", u=tubelet)


def stack_target(latents: Float[Tensor, "B F C h w"], tubelet: int) -> Float[Tensor, "B T S i"]:
    """Latents as targets: the frames of a tubelet stacked on channels."""
    return rearrange(latents, "b (t u) c h w -> b t (h w) (u c)", u=tubelet)


def unstack_target(tokens: Float[Tensor, "B T S i"], tubelet: int, height: int) -> Float[Tensor, "B F C h w"]:
    """The inverse of `stack_target`."""
    return rearrange(tokens, "b t (h w) (u c) -> b (t u) c h w", u=tubelet, h=height)


def space_to_depth(latents: Float[Tensor, "B F C H W"], factor: int) -> Float[Tensor, "B F C2 h w"]:
    """Fold `factor` x `factor` cells into channels: stride-8 latents to a grid of 16 pixels, pixels to targets."""
    return rearrange(latents, "b f c (h y) (w x) -> b f (c y x) h w", y=factor, x=factor)


def depth_to_space(folded: Float[Tensor, "B F C2 h w"], factor: int) -> Float[Tensor, "B F C H W"]:
    """The inverse of `space_to_depth`."""
    return rearrange(folded, "b f (c y x) h w -> b f c (h y) (w x)", y=factor, x=factor)


def gather_tokens(tokens: Float[Tensor, "B N i"], ids: Int[Tensor, "b L"]) -> Float[Tensor, "B L i"]:
    """The tokens with these ids, in the order of the ids; one row of ids serves all clips."""
    if ids.shape[0] == 1:
        return tokens[:, ids[0]]
    rows = torch.arange(tokens.shape[0], device=tokens.device)[:, None]
    return tokens[rows, ids]


def tube_ids(cells: Int[Tensor, "B n"], tubelets: int, per_tubelet: int) -> Int[Tensor, "B L"]:
    """The same cells in every tubelet, as flat ids in the order t, cell; `per_tubelet` is S."""
    starts = per_tubelet * torch.arange(tubelets, device=cells.device, dtype=cells.dtype)
    return (starts[None, :, None] + cells[:, None, :]).flatten(1)


def normalise(
    latents: Float[Tensor, "B F C h w"], mean: Float[Tensor, " C"], std: Float[Tensor, " C"]
) -> Float[Tensor, "B F C h w"]:
    """Per-channel (x - mean) / std, shared by the frames of a tubelet (docs/method.md 4.2)."""
    return (latents - mean[:, None, None]) / std[:, None, None]


def denormalise(
    latents: Float[Tensor, "B F C h w"], mean: Float[Tensor, " C"], std: Float[Tensor, " C"]
) -> Float[Tensor, "B F C h w"]:
    """The inverse of `normalise`, before decoding."""
    return latents * std[:, None, None] + mean[:, None, None]
