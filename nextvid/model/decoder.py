"""The flow decoder: a DiT inside each tubelet, conditioned by concatenating channels (docs/method.md 4.3, 6.1).

AdaLN-Zero modulates on tau alone. The prediction z enters through the input layer only, as W_z z + W_x h_tau + b, with
W_z z computed once for all copies.

The decoders of Tab. 4 and 5 have no predictor before them (docs/method.md 10): noisy target tokens read the encoder's
output of earlier tubelets by cross-attention, modulated by tau. `xattn_self` adds self-attention among all noisy tokens
of a clip.

Axes: k copies, B clips (in CrossBlock k times the C clips of the context), F predicted tubelets, n tokens per tubelet,
Q = F*n, K context tokens, N = k*B*F sequences, C target channels, c condition channels, D encoder width, d width, p
rotated pairs of a head; b and c are B or 1.
"""

import math
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

from nextvid.config.recipe import ModelConfig
from nextvid.model.attention import Attend, CrossAttention, Mlp, SelfAttention, rotary
from nextvid.model.encoder import NORM_EPS, WIDE, WIDE_STD, causal, normed

MLP_RATIO = 4  # DiT, docs/method.md 6.1
SINUSOID = 256  # width of the timestep's sinusoid, DiT
MAX_PERIOD = 10000.0  # of the sinusoid, DiT
TIME_SCALE = 1000.0  # tau is embedded on a scale of 0..1000, docs/method.md 4.2
EMBED_STD = 0.02  # of the timestep MLP, DiT


@dataclass(frozen=True)
class Positions:
    """Original ids of predicted tokens and of the context; `frames` tubelets of equal size in each, or None."""

    query_ids: Int[Tensor, "b Q"]
    context_ids: Int[Tensor, "c K"]
    frames: int | None


def condition_width(model: ModelConfig) -> int:
    """Channels of the decoder's condition: z, the predictor's hidden state, or the encoder's output."""
    reads_hidden = model.decoder.kind == "dit_iso" and model.decoder.condition == "hidden"
    return model.predictor.width if reads_hidden else model.encoder.width


def sinusoid(tau: Float[Tensor, "*N"]) -> Float[Tensor, "*N 256"]:
    """Cosines and sines of 1000*tau at 128 frequencies, fp32."""
    half = SINUSOID // 2
    rates = torch.exp(-math.log(MAX_PERIOD) * torch.arange(half, device=tau.device, dtype=torch.float32) / half)
    angles = TIME_SCALE * tau.float()[..., None] * rates
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class TimeEmbedding(nn.Module):
    """Sinusoid and two linear layers, in fp32 even under autocast: bf16 cannot tell timesteps 998 and 999 apart."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(SINUSOID, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, tau: Float[Tensor, "*N"]) -> Float[Tensor, "*N d"]:
        with torch.autocast(tau.device.type, enabled=False):
            return self.fc2(silu(self.fc1(sinusoid(tau).to(self.fc1.weight.dtype))))


def modulate(
    x: Float[Tensor, "*N n d"], shift: Float[Tensor, "*N d"], scale: Float[Tensor, "*N d"]
) -> Float[Tensor, "*N n d"]:
    """Scale and shift normalised tokens, as DiT does."""
    return x * (1 + scale[..., None, :]) + shift[..., None, :]


class DiTBlock(nn.Module):
    """Self-attention inside one tubelet and MLP, both scaled, shifted and gated by tau (AdaLN-Zero)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=False)
        self.attn = SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=False)
        self.mlp = Mlp(width, MLP_RATIO * width, approximate="tanh")
        self.modulation = nn.Linear(width, 6 * width)

    def forward(
        self, x: Float[Tensor, "N n d"], time: Float[Tensor, "N d"], table: Float[Tensor, "b 1 n p 2"]
    ) -> Float[Tensor, "N n d"]:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(time).chunk(6, dim=-1)
        inner = self.attn(modulate(normed(self.norm1, x), shift1, scale1), table, scaled_dot_product_attention)
        x = x + gate1[:, None] * inner
        return x + gate2[:, None] * self.mlp(modulate(normed(self.norm2, x), shift2, scale2))


class Head(nn.Module):
    """Last modulated normalisation and the linear map to a velocity."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, channels)

    def forward(self, x: Float[Tensor, "*N n d"], time: Float[Tensor, "*N d"]) -> Float[Tensor, "*N n C"]:
        shift, scale = self.modulation(time).chunk(2, dim=-1)
        return self.out(modulate(normed(self.norm, x), shift, scale))


class FlowDecoder(nn.Module):
    """DiT over the tokens of one tubelet. Tubelets, clips and copies are batch entries: none attends another."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        config = model.decoder
        self.model = model
        self.embed_condition = nn.Linear(condition_width(model), config.width, bias=False)
        self.embed_noisy = nn.Linear(model.target_channels, config.width)
        self.time = TimeEmbedding(config.width)
        self.blocks = nn.ModuleList(DiTBlock(config.width, config.heads) for _ in range(config.depth))
        self.head = Head(config.width, model.target_channels)
        initialise_dit(self, model.encoder.width)
        if model.encoder.width < WIDE:
            # together the two are one linear layer on concatenated channels, with its Xavier initialisation
            bound = math.sqrt(6.0 / (condition_width(model) + model.target_channels + config.width))
            for embed in (self.embed_condition, self.embed_noisy):
                nn.init.uniform_(embed.weight, -bound, bound)

    def forward(
        self,
        condition: Float[Tensor, "B Q c"],
        noisy: Float[Tensor, "k B F n C"],
        tau: Float[Tensor, "k B F"],
        positions: Positions,
    ) -> Float[Tensor, "k B F n C"]:
        """Velocities at (noisy, tau); `condition` is z or the predictor's hidden state of the same positions."""
        model = self.model
        copies, clips, frames, cells, _ = noisy.shape
        once = rearrange(self.embed_condition(condition), "b (f n) d -> b f n d", f=frames)
        x = rearrange(self.embed_noisy(noisy) + once, "k b f n d -> (k b f) n d")
        # Inside one tubelet the rotation by time cancels (docs/method.md 5), so the first tubelet's ids serve all.
        head_dim = model.decoder.width // model.decoder.heads
        table = rotary(positions.query_ids[:, :cells], head_dim, model.grid_height, model.grid_width)
        if table.shape[0] > 1:
            table = repeat(table, "b one n p c -> (k b f) one n p c", k=copies, f=frames)
        time = silu(self.time(rearrange(tau, "k b f -> (k b f)")))
        for block in self.blocks:
            x = block(x, time, table)
        return rearrange(self.head(x, time), "(k b f) n c -> k b f n c", k=copies, b=clips)


class CrossBlock(nn.Module):
    """Cross-attention, with `joined` also self-attention, and MLP, all modulated by tau."""

    def __init__(self, width: int, heads: int, joined: bool) -> None:
        super().__init__()
        self.parts = 3 if joined else 2
        self.norms = nn.ModuleList(
            nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=False) for _ in range(self.parts)
        )
        self.norm_context = nn.LayerNorm(width, eps=NORM_EPS)
        self.cross = CrossAttention(width, heads)
        self.attn = SelfAttention(width, heads) if joined else None
        self.mlp = Mlp(width, MLP_RATIO * width, approximate="tanh")
        self.modulation = nn.Linear(width, 3 * self.parts * width)

    def forward(
        self,
        x: Float[Tensor, "B F n d"],
        context: Float[Tensor, "C K d"],
        time: Float[Tensor, "B F d"],
        query_table: Float[Tensor, "b 1 Q p 2"],
        key_table: Float[Tensor, "c 1 K p 2"],
        attend: Attend,
    ) -> Float[Tensor, "B F n d"]:
        mods = self.modulation(time).chunk(3 * self.parts, dim=-1)
        frames = x.shape[1]
        for part, norm in enumerate(self.norms):
            assert isinstance(norm, nn.LayerNorm)
            shift, scale, gate = mods[3 * part : 3 * part + 3]
            inner = rearrange(modulate(normed(norm, x), shift, scale), "b f n d -> b (f n) d")
            if part == 0:
                inner = self.cross(inner, normed(self.norm_context, context), query_table, key_table, attend)
            elif part == 1 and self.attn is not None:
                inner = self.attn(inner, query_table, scaled_dot_product_attention)
            else:
                inner = self.mlp(inner)
            x = x + gate[:, :, None] * rearrange(inner, "b (f n) d -> b f n d", f=frames)
        return x


class CrossFlowDecoder(nn.Module):
    """Velocity of each noisy token from the encoder's tokens of strictly earlier tubelets."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        config = model.decoder
        self.model = model
        self.embed_context = nn.Linear(model.encoder.width, config.width)
        self.embed_noisy = nn.Linear(model.target_channels, config.width)
        self.time = TimeEmbedding(config.width)
        joined = config.kind == "xattn_self"
        self.blocks = nn.ModuleList(CrossBlock(config.width, config.heads, joined) for _ in range(config.depth))
        self.head = Head(config.width, model.target_channels)
        initialise_dit(self, model.encoder.width)

    def forward(
        self,
        condition: Float[Tensor, "B K D"],
        noisy: Float[Tensor, "k B F n C"],
        tau: Float[Tensor, "k B F"],
        positions: Positions,
    ) -> Float[Tensor, "k B F n C"]:
        """Velocities at (noisy, tau); `condition` is the encoder's output for the context."""
        model, copies = self.model, noisy.shape[0]
        context = self.embed_context(condition)
        x = rearrange(self.embed_noisy(noisy), "k b f n d -> (k b) f n d")
        time = silu(self.time(rearrange(tau, "k b f -> (k b) f")))
        head_dim = model.decoder.width // model.decoder.heads
        ids = [
            repeat(ids, "b j -> (k b) j", k=copies) if ids.shape[0] > 1 else ids
            for ids in (positions.query_ids, positions.context_ids)
        ]
        tables = (ids[0], positions.context_ids)
        query_table, key_table = (rotary(i, head_dim, model.grid_height, model.grid_width) for i in tables)
        attend = causal(model, positions.frames, ids[0], ids[1], strict=True)
        for block in self.blocks:
            x = block(x, context, time, query_table, key_table, attend)
        return rearrange(self.head(x, time), "(k b) f n c -> k b f n c", k=copies)


def initialise_dit(module: nn.Module, encoder_width: int) -> None:
    """Timestep MLP normal 0.02, zero modulations and output layer; other linears Xavier-uniform, as DiT.

    After a wide encoder these are normal 0.02, as the encoder's own (docs/method.md 6.1).
    """
    for name, layer in module.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        last = name.rsplit(".", 1)[-1]
        if last == "modulation" or name == "head.out":
            nn.init.zeros_(layer.weight)
        elif name.startswith("time."):
            nn.init.normal_(layer.weight, std=EMBED_STD)
        elif encoder_width >= WIDE:
            nn.init.trunc_normal_(layer.weight, std=WIDE_STD)
        else:
            nn.init.xavier_uniform_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
