"""The context-isolated autoregressive predictor: from encoded tubelets to the next ones (docs/method.md 2.5, 4.3, 6).

`cross`: one learned query at every position reads the context of earlier tubelets and never writes to it; queries do
not attend each other (the paper's 22M parameters leave no room for that). `joint`: the ablation without context
isolation (docs/method.md 10). Gradients do flow back into the context.

Axes: B clips, K context tokens, Q query tokens, A = K + Q, D encoder width, d width, p rotated pairs of a head; b, c, e
are B or 1.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nextvid.config.recipe import ModelConfig
from nextvid.model.attention import Attend, CrossAttention, Mlp, allow_by_id, masked_attention, rotary
from nextvid.model.encoder import NORM_EPS, EncoderBlock, causal, initialise, normed

MLP_RATIO = 4  # docs/method.md 6.1


class Predicted(NamedTuple):
    """`z` is aligned with the reference features; `hidden` is the normalised state before the output projection."""

    z: Float[Tensor, "B Q D"]
    hidden: Float[Tensor, "B Q d"]


class PredictorBlock(nn.Module):
    """Cross-attention and MLP; each block normalises the context for itself and leaves it unchanged."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.norm_context = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = CrossAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = Mlp(width, MLP_RATIO * width)

    def forward(
        self,
        x: Float[Tensor, "B Q d"],
        context: Float[Tensor, "B K d"],
        query_table: Float[Tensor, "b 1 Q p 2"],
        key_table: Float[Tensor, "c 1 K p 2"],
        attend: Attend,
    ) -> Float[Tensor, "B Q d"]:
        x = x + self.attn(normed(self.norm1, x), normed(self.norm_context, context), query_table, key_table, attend)
        return x + self.mlp(normed(self.norm2, x))


class Predictor(nn.Module):
    """Predictions for the positions `query_ids` from context in strictly earlier tubelets."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        config = model.predictor
        self.model = model
        self.embed = nn.Linear(model.encoder.width, config.width)
        self.query = nn.Parameter(torch.zeros(1, 1, config.width))
        self.blocks = nn.ModuleList(
            PredictorBlock(config.width, config.heads)
            if config.kind == "cross"
            else EncoderBlock(config.width, config.heads, MLP_RATIO * config.width)
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.out = nn.Linear(config.width, model.encoder.width)
        initialise(self, model.encoder.width)

    def forward(
        self,
        context: Float[Tensor, "B K D"],
        context_ids: Int[Tensor, "b K"],
        query_ids: Int[Tensor, "c Q"],
        frames: int | None,
    ) -> Predicted:
        """`frames`: context is tubelets 0..frames-1, queries tubelets 1..frames; None: the mask is built from ids."""
        model = self.model
        attend: Attend
        if model.predictor.kind == "joint":
            attend = partial(masked_attention, allow=joint_mask(context_ids, query_ids, model.cells))
        else:
            attend = causal(model, frames, query_ids, context_ids, strict=True)
        return self.extend(context, context_ids, query_ids, [attend] * len(self.blocks))

    def extend(
        self,
        context: Float[Tensor, "B K D"],
        context_ids: Int[Tensor, "b K"],
        query_ids: Int[Tensor, "c Q"],
        attends: Sequence[Attend],
    ) -> Predicted:
        """`attends` is one attention per block, which may hold earlier context (incremental.py)."""
        model = self.model
        head_dim = model.predictor.width // model.predictor.heads
        embedded = self.embed(context)
        queries = self.query.to(embedded.dtype).expand(context.shape[0], query_ids.shape[1], -1)
        query_table = rotary(query_ids, head_dim, model.grid_height, model.grid_width)
        key_table = rotary(context_ids, head_dim, model.grid_height, model.grid_width)
        if model.predictor.kind == "joint":
            hidden = self._joint(embedded, queries, query_table, key_table, attends)
        else:
            hidden = queries
            for block, attend in zip(self.blocks, attends, strict=True):
                hidden = block(hidden, embedded, query_table, key_table, attend)
        hidden = self.norm(hidden)
        return Predicted(self.out(hidden), hidden)

    def _joint(
        self, context: Tensor, queries: Tensor, query_table: Tensor, key_table: Tensor, attends: Sequence[Attend]
    ) -> Tensor:
        """Self-attention over context and queries; context tokens are updated too."""
        rows = max(key_table.shape[0], query_table.shape[0])
        table = torch.cat([each.expand(rows, -1, -1, -1, -1) for each in (key_table, query_table)], dim=2)
        x = torch.cat((context, queries), dim=1)
        for block, attend in zip(self.blocks, attends, strict=True):
            x = block(x, table, attend)
        return x[:, context.shape[1] :]


def joint_mask(context_ids: Int[Tensor, "b K"], query_ids: Int[Tensor, "c Q"], cells: int) -> Bool[Tensor, "e A A"]:
    """Context attends context of its own and earlier tubelets; a query attends context of earlier ones and itself."""
    rows, keys, queries = max(len(context_ids), len(query_ids)), context_ids.shape[1], query_ids.shape[1]
    allow = torch.zeros(rows, keys + queries, keys + queries, dtype=torch.bool, device=context_ids.device)
    allow[:, :keys, :keys] = allow_by_id(context_ids, context_ids, cells, strict=False)
    allow[:, keys:, :keys] = allow_by_id(query_ids, context_ids, cells, strict=True)
    allow[:, keys:, keys:] = torch.eye(queries, dtype=torch.bool, device=context_ids.device)
    return allow
