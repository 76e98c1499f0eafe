"""Attention by tubelet, rotary positions, and the attention modules of encoder, predictor and decoder.

Tokens are ordered by tubelet, [frames * n], with n tokens in each. The predictor's queries are tubelets 1..T-1 and its
context is tubelets 0..T-2, so its rule "strictly earlier" has the same block structure as the encoder's "not later"
(docs/method.md 3).

Positions are a true rotation in three dimensions (docs/method.md 5): each pair (2i, 2i+1) of a head turns by one angle,
so norms are kept and scores depend on relative positions alone (the public V-JEPA 2 code tiles its table and does
neither). Angles are fp32 whatever the activations are. Positions come from original ids: dropping tokens shifts none.

Axes: B clips, h heads, Q and K tokens of queries and keys, L tokens, e head dimension, d width, p = e/2 rotated pairs;
b, c, r are B or 1.
"""

from collections.abc import Callable
from functools import cache
from typing import Literal

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from nextvid.config.recipe import ConfigError

MAX_PERIOD = 10000.0  # base of the rotary frequencies, docs/method.md 5

Backend = Literal["loop", "dense", "flash", "block"]
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
    reference, `flash` the loop with flash-attn's kernel, `block` one call of `block_attention`, which is `dense` on the
    CPU: flex attention has no backward there (torch 2.13). Raises ConfigError if flash-attn is asked for and missing.
    """
    assert q.shape[2] % frames == 0, f"{q.shape[2]} queries are not {frames} equal blocks"
    assert k.shape[2] % frames == 0, f"{k.shape[2]} keys are not {frames} equal blocks"
    match backend:
        case "loop":
            return _by_block(q, k, v, frames, scaled_dot_product_attention)
        case "block" if q.device.type != "cpu":
            return block_attention(q, k, v, frame_mask(frames, q.shape[2], k.shape[2], q.device))
        case "dense" | "block":
            row, column = (torch.arange(x.shape[2], device=q.device) // (x.shape[2] // frames) for x in (q, k))
            return scaled_dot_product_attention(q, k, v, attn_mask=column[None, :] <= row[:, None])
        case "flash":
            return _by_block(q, k, v, frames, flash_kernel())


def block_attention(
    q: Float[Tensor, "B h Q e"], k: Float[Tensor, "B h K e"], v: Float[Tensor, "B h K e"], mask: BlockMask
) -> Float[Tensor, "B h Q e"]:
    """Flex attention in the dtype of `v`: one kernel, which skips tiles of 128 x 128 without an allowed pair."""
    q, k = q.to(v.dtype), k.to(v.dtype)
    if not torch.compiler.is_compiling():
        return _compiled_flex()(q, k, v, block_mask=mask)
    inside: Tensor = flex_attention(q, k, v, block_mask=mask)
    return inside


@cache
def frame_mask(frames: int, queries: int, keys: int, device: torch.device) -> BlockMask:
    """The tiles in which queries of block t may attend the keys of blocks 0..t, of `frames` equal blocks."""
    row, column = queries // frames, keys // frames
    return create_block_mask(
        lambda _clip, _head, query, key: key // column <= query // row, None, None, queries, keys, device=device
    )


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


def axis_width(head_dim: int) -> int:
    """Rotated dimensions for each of t, h, w; the rest at the end of the head is not rotated."""
    return 2 * ((head_dim // 3) // 2)


def rotary(ids: Int[Tensor, "B L"], head_dim: int, grid_height: int, grid_width: int) -> Float[Tensor, "B 1 L p 2"]:
    """Cosine and sine for each pair of each token; `ids` are flat: t*S + h*grid_width + w."""
    assert head_dim % 2 == 0, f"a head of {head_dim} dimensions has no pairs"
    cells = grid_height * grid_width
    cell = ids % cells
    pairs = axis_width(head_dim) // 2
    exponents = torch.arange(pairs, device=ids.device, dtype=torch.float32) / max(pairs, 1)
    omega = MAX_PERIOD**-exponents
    axes = [position.float()[..., None] * omega for position in (ids // cells, cell // grid_width, cell % grid_width)]
    tail = torch.zeros(*ids.shape, head_dim // 2 - 3 * pairs, device=ids.device)
    angles = torch.cat((*axes, tail), dim=-1)
    return torch.view_as_real(torch.polar(torch.ones_like(angles), angles))[:, None]


def rotate(x: Float[Tensor, "B h L e"], table: Float[Tensor, "b 1 L p 2"]) -> Float[Tensor, "B h L e"]:
    """Rotate queries or keys in fp32 at least; the result has the dtype of `x`. A table of one row serves all clips.

    As a complex product it is one pass over x; real arithmetic took 3.3 times as long (8x4x192x32, CPU).
    """
    precise = x.to(torch.promote_types(x.dtype, torch.float32))
    if torch.compiler.is_compiling():  # inductor fuses passes, but not complex numbers
        return rotate_by_parts(precise, table).to(x.dtype)
    turned = torch.view_as_complex(precise.unflatten(-1, (-1, 2))) * torch.view_as_complex(table)
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


def rotate_by_parts(x: Float[Tensor, "B h L e"], table: Float[Tensor, "b 1 L p 2"]) -> Float[Tensor, "B h L e"]:
    """The same with the complex product written out; in the dtype of `x`."""
    cosine, sine = table.unbind(-1)
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((first * cosine - second * sine, first * sine + second * cosine), dim=-1).flatten(-2)


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
    """Cross-attention with rotary positions: queries and keys are rotated by their own ids (docs/method.md 3, 6.1).

    The context may have C clips and the queries B = k*C: k copies read the same keys and values, which are made once.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(
        self,
        x: Float[Tensor, "B Q d"],
        context: Float[Tensor, "C K d"],
        query_table: Float[Tensor, "b 1 Q p 2"],
        key_table: Float[Tensor, "c 1 K p 2"],
        attend: Attend,
    ) -> Float[Tensor, "B Q d"]:
        q = rearrange(self.q(x), "b l (h e) -> b h l e", h=self.heads)
        k, v = rearrange(self.kv(context), "b l (c h e) -> c b h l e", c=2, h=self.heads)
        q, k = rotate(q, query_table), rotate(k, key_table)
        k, v = (repeat(each, "b h l e -> (k b) h l e", k=x.shape[0] // context.shape[0]) for each in (k, v))
        out = attend(q, k, v)
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


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    """The kernel for calls outside of compiled blocks; not compiled it would compute every score."""
    return torch.compile(flex_attention, fullgraph=True, dynamic=False)


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
