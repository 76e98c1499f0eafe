"""Attention by tubelet, and the self- and cross-attention modules of encoder, predictor and decoder (docs/method.md 3).

Tokens are ordered by tubelet, [frames * n], with n tokens in each. The predictor's queries are tubelets 1..T-1 and its
context is tubelets 0..T-2, so its rule "strictly earlier" has the same block structure as the encoder's "not later".

Axes: B clips, h heads, Q and K tokens of queries and keys, L tokens, e head dimension, d width, p rotated pairs of a
head; b, c, r are B or 1.
"""

from collections.abc import Callable
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from nextvid.config.recipe import ConfigError
from nextvid.model.rope import rotate

Backend = Literal["loop", "dense", "flash"]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # (q, k, v) -> values, all [B, h, L, e]


def frame_attention(
    q: Float[Tensor, "B h Q e"],
    k: Float[Tensor, "B h K e"],
    v: Float[Tensor, "B h K e"],
    frames: int,
    backend: Backend = "loop",
) -> Float[Tensor, "B h Q e"]:
    """Queries of block t attend the keys of blocks 0..t; queries and keys may differ in tokens per block.

    `loop` is one unmasked call a block (0.57 to 0.72 of the dense mask's time, docs/performance.md), `dense` the slow
    reference, `flash` the loop with flash-attn's kernel. Raises ConfigError if flash-attn is asked for and missing.
    """
    assert q.shape[2] % frames == 0, f"{q.shape[2]} queries are not {frames} equal blocks"
    assert k.shape[2] % frames == 0, f"{k.shape[2]} keys are not {frames} equal blocks"
    match backend:
        case "loop":
            return _by_block(q, k, v, frames, scaled_dot_product_attention)
        case "dense":
            return scaled_dot_product_attention(q, k, v, attn_mask=_block_mask(q, k, frames))
        case "flash":
            return _by_block(q, k, v, frames, flash_kernel())


def masked_attention(
    q: Float[Tensor, "B h Q e"],
    k: Float[Tensor, "B h K e"],
    v: Float[Tensor, "B h K e"],
    allow: Bool[Tensor, "b Q K"],
) -> Float[Tensor, "B h Q e"]:
    """Attention under any mask (True = may attend), for ablations and ragged context. No row may be all False."""
    return scaled_dot_product_attention(q, k, v, attn_mask=allow[:, None])


def allow_by_id(
    query_ids: Int[Tensor, "b Q"], key_ids: Int[Tensor, "c K"], cells: int, strict: bool
) -> Bool[Tensor, "r Q K"]:
    """Mask from original ids: True where the key's tubelet is earlier than the query's, or the same unless `strict`."""
    query, key = query_ids[:, :, None] // cells, key_ids[:, None, :] // cells
    return key < query if strict else key <= query


def flash_kernel() -> Attend:
    """flash-attn's kernel for tensors [B, h, L, e]. Raises ConfigError if flash-attn is not installed."""
    try:
        from flash_attn import flash_attn_func  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise ConfigError(
            "model.attention = 'flash' needs the package flash-attn, which is not installed: "
            "pip install 'nextvid[flash]' on a machine with CUDA, or set model.attention = 'loop'"
        ) from None

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (rearrange(x.to(v.dtype), "b h l e -> b l h e") for x in (q, k, v))
        return rearrange(flash_attn_func(q, k, v), "b l h e -> b h l e")

    return attend


class SelfAttention(nn.Module):
    """Multi-head self-attention with biases and rotary positions (docs/method.md 6.1)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(
        self, x: Float[Tensor, "B L d"], table: Float[Tensor, "b 1 L p 2"], attend: Attend
    ) -> Float[Tensor, "B L d"]:
        q, k, v = rearrange(self.qkv(x), "b l (c h e) -> c b h l e", c=3, h=self.heads)
        out = attend(rotate(q, table), rotate(k, table), v)
        return self.proj(rearrange(out, "b h l e -> b l (h e)"))


class CrossAttention(nn.Module):
    """Cross-attention with rotary positions: queries and keys are rotated by their own ids (docs/method.md 3, 6.1)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(
        self,
        x: Float[Tensor, "B Q d"],
        context: Float[Tensor, "B K d"],
        query_table: Float[Tensor, "b 1 Q p 2"],
        key_table: Float[Tensor, "c 1 K p 2"],
        attend: Attend,
    ) -> Float[Tensor, "B Q d"]:
        q = rearrange(self.q(x), "b l (h e) -> b h l e", h=self.heads)
        k, v = rearrange(self.kv(context), "b l (c h e) -> c b h l e", c=2, h=self.heads)
        out = attend(rotate(q, query_table), rotate(k, key_table), v)
        return self.proj(rearrange(out, "b h l e -> b l (h e)"))


class Mlp(nn.Module):
    """Linear, GELU (exact, or its tanh form in the decoder), Linear."""

    def __init__(self, width: int, hidden: int, approximate: Literal["none", "tanh"] = "none") -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU(approximate)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Float[Tensor, "*B d"]) -> Float[Tensor, "*B d"]:
        return self.fc2(self.act(self.fc1(x)))


def _by_block(q: Tensor, k: Tensor, v: Tensor, frames: int, attend: Attend) -> Tensor:
    if frames == 1:
        return attend(q, k, v)
    rows, keys = q.shape[2] // frames, k.shape[2] // frames
    blocks = []
    # From the last block to the first, each prefix a slice of the one before: backward then pads a gradient to the next
    # longer prefix, not to full length (T=8, 256 cells: .57 of the dense mask's time, else .61; docs/performance.md).
    for t, block in reversed(list(enumerate(q.split(rows, dim=2)))):
        k, v = k[:, :, : (t + 1) * keys], v[:, :, : (t + 1) * keys]
        blocks.append(attend(block, k, v))
    return torch.cat(blocks[::-1], dim=2)


def _block_mask(q: Tensor, k: Tensor, frames: int) -> Tensor:
    row = torch.arange(q.shape[2], device=q.device) // (q.shape[2] // frames)
    column = torch.arange(k.shape[2], device=k.device) // (k.shape[2] // frames)
    return column[None, :] <= row[:, None]
