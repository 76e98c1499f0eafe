"""The context encoder: a frame-causal ViT over visible patches, trained and probed (docs/method.md 3, 5, 6.1).

Patches are gathered before the first linear layer, so masked tokens cost nothing; token ids say which ones it gets. It
ends in its own affine LayerNorm. Its width decides how it, the predictor and the decoder are initialised.

Axes: B clips, T tubelets, n tokens per tubelet, L = T*n tokens, i input numbers of a token, D width, p rotated pairs of
a head; b is B or 1.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from nextvid.config.recipe import ModelConfig
from nextvid.model.attention import (
    Attend,
    Mlp,
    SelfAttention,
    allow_by_id,
    block_attention,
    frame_attention,
    frame_mask,
    masked_attention,
    rotary,
)

NORM_EPS = 1e-6  # docs/method.md 6.1
WIDE = 512  # an encoder of this width or wider, and what reads it, starts with std 0.02: docs/method.md 6.1
WIDE_STD = 0.02  # docs/method.md 6.1
PIXEL_CHANNELS = 3


def input_width(model: ModelConfig) -> int:
    """Numbers in one input token: a patch's pixel values, or a latent cell's channels, over a tubelet's frames."""
    match model.encoder.input:
        case "pixels":
            return model.tubelet * model.patch**2 * PIXEL_CHANNELS
        case "latents":
            return model.tubelet * model.frame_channels


def all_ids(tubelets: int, cells: int, device: torch.device | str | None = None) -> Int[Tensor, "1 L"]:
    """Ids of every token of `tubelets` tubelets, from 0."""
    return torch.arange(tubelets * cells, device=device)[None]


def normed(layer: nn.LayerNorm, x: Float[Tensor, "*B d"]) -> Float[Tensor, "*B d"]:
    """The layer in the dtype of `x`; its kernels compute statistics in fp32. Autocast would read and write fp32."""
    with torch.autocast(x.device.type, enabled=False):
        weight, bias = (None if p is None else p.to(x.dtype) for p in (layer.weight, layer.bias))
        return layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)


class EncoderBlock(nn.Module):
    """Pre-norm attention and MLP; also the block of the `joint` predictor."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = Mlp(width, hidden)

    def forward(
        self, x: Float[Tensor, "B L D"], table: Float[Tensor, "b 1 L p 2"], attend: Attend
    ) -> Float[Tensor, "B L D"]:
        x = x + self.attn(normed(self.norm1, x), table, attend)
        return x + self.mlp(normed(self.norm2, x))


class Encoder(nn.Module):
    """ViT in which tokens of tubelet t attend tubelets 0..t."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        config = model.encoder
        self.model = model
        self.embed = nn.Linear(input_width(model), config.width)
        self.blocks = nn.ModuleList(
            EncoderBlock(config.width, config.heads, config.mlp_hidden) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width, eps=NORM_EPS)
        initialise(self, config.width)

    def forward(
        self, tokens: Float[Tensor, "B L i"], frames: int | None, ids: Int[Tensor, "b L"] | None = None
    ) -> Float[Tensor, "B L D"]:
        """Features of the tokens given, after the final norm.

        `frames`: tubelets, if each has equally many tokens; None if not (`flat` masks), then the attention mask is
        built from `ids`. Without `ids` the tokens are those of the whole clip.
        """
        ids, attends = self._layout(tokens, frames, ids)
        return self.norm(self._run(tokens, ids, attends, levels=())[0])

    def extend(
        self, tokens: Float[Tensor, "B n i"], ids: Int[Tensor, "b n"], attends: Sequence[Attend]
    ) -> Float[Tensor, "B n D"]:
        """Features of later tokens; `attends` is one attention per block, which caches the earlier (incremental.py)."""
        return self.norm(self._run(tokens, ids, attends, levels=())[0])

    def levels(
        self, tokens: Float[Tensor, "B L i"], frames: int, levels: tuple[int, ...]
    ) -> list[Float[Tensor, "B L D"]]:
        """Outputs of some blocks, each through the final norm: probe features of whole clips (docs/method.md 9)."""
        ids, attends = self._layout(tokens, frames, None)
        return [self.norm(x) for x in self._run(tokens, ids, attends, levels)[1]]

    def _layout(self, tokens: Tensor, frames: int | None, ids: Tensor | None) -> tuple[Tensor, list[Attend]]:
        """Ids of the tokens, and the frame-causal attention of every block."""
        model = self.model
        if ids is None:
            assert frames is not None, "a whole clip has tubelets of equal size"
            assert tokens.shape[1] == frames * model.cells, "a whole clip has every cell"
            ids = all_ids(frames, model.cells, tokens.device)
        return ids, [causal(model, frames, ids, ids, strict=False)] * len(self.blocks)

    def _run(
        self, tokens: Tensor, ids: Tensor, attends: Sequence[Attend], levels: tuple[int, ...]
    ) -> tuple[Tensor, list[Tensor]]:
        model = self.model
        table = rotary(ids, model.encoder.width // model.encoder.heads, model.grid_height, model.grid_width)
        x, taken = self.embed(tokens), []
        for index, (block, attend) in enumerate(zip(self.blocks, attends, strict=True)):
            x = block(x, table, attend)
            if index in levels:
                taken.append(x)
        return x, taken


def causal(model: ModelConfig, frames: int | None, queries: Tensor, keys: Tensor, strict: bool) -> Attend:
    """Frame-causal attention: by block if each tubelet has equally many tokens (`frames`), else by a mask of ids."""
    if frames is not None and model.attention == "block" and queries.device.type != "cpu":
        # made here, once a shape: a block that is compiled takes the mask as an argument
        return partial(block_attention, mask=frame_mask(frames, queries.shape[1], keys.shape[1], queries.device))
    if frames is not None:
        return partial(frame_attention, frames=frames, backend=model.attention)
    return partial(masked_attention, allow=allow_by_id(queries, keys, model.cells, strict))


def initialise(module: nn.Module, encoder_width: int) -> None:
    """Truncated normal, zero biases, residual outputs of block l (from 1) divided by sqrt(2l).

    Std 0.02 in encoder and predictor of a wide encoder, else 1/sqrt(fan_in). As V-JEPA 2's code, whose truncation at
    +-2 is absolute (docs/method.md 6.1). Blocks are those in `module.blocks`.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            std = WIDE_STD if encoder_width >= WIDE else 1.0 / math.sqrt(layer.in_features)
            nn.init.trunc_normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    blocks = module.get_submodule("blocks")
    assert isinstance(blocks, nn.ModuleList)
    with torch.no_grad():
        for number, block in enumerate(blocks, start=1):
            for name in ("attn.proj", "mlp.fc2"):
                block.get_submodule(name).get_parameter("weight").div_(math.sqrt(2 * number))
