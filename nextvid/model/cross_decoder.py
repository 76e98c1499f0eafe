"""Flow decoders without a predictor: they read the encoder by cross-attention (docs/method.md 10; Tab. 4 and 5).

Noisy target tokens read the encoder's output of earlier tubelets by cross-attention, modulated by tau. `xattn_self`
adds self-attention among all noisy tokens of a clip.

Axes: k copies, B clips, F predicted tubelets, n tokens per tubelet, Q = F*n, K context tokens, C target channels,
D encoder width, d width, p rotated pairs of a head; b and c are B or 1.
"""

from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

from nextvid.config.recipe import ModelConfig
from nextvid.model.attention import Attend, CrossAttention, Mlp, SelfAttention, rotary
from nextvid.model.decoder import MLP_RATIO, Head, Positions, TimeEmbedding, initialise_dit, modulate
from nextvid.model.encoder import NORM_EPS, causal


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
        context: Float[Tensor, "B K d"],
        time: Float[Tensor, "B F d"],
        query_table: Float[Tensor, "b 1 Q p 2"],
        key_table: Float[Tensor, "c 1 K p 2"],
        attend: Attend,
    ) -> Float[Tensor, "B F n d"]:
        mods = self.modulation(time).chunk(3 * self.parts, dim=-1)
        frames = x.shape[1]
        for part, norm in enumerate(self.norms):
            shift, scale, gate = mods[3 * part : 3 * part + 3]
            inner = rearrange(modulate(norm(x), shift, scale), "b f n d -> b (f n) d")
            if part == 0:
                inner = self.cross(inner, self.norm_context(context), query_table, key_table, attend)
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
        initialise_dit(self)

    def forward(
        self,
        condition: Float[Tensor, "B K D"],
        noisy: Float[Tensor, "k B F n C"],
        tau: Float[Tensor, "k B F"],
        positions: Positions,
    ) -> Float[Tensor, "k B F n C"]:
        """Velocities at (noisy, tau); `condition` is the encoder's output for the context."""
        model, copies = self.model, noisy.shape[0]
        context = repeat(self.embed_context(condition), "b j d -> (k b) j d", k=copies)
        x = rearrange(self.embed_noisy(noisy), "k b f n d -> (k b) f n d")
        time = silu(self.time(rearrange(tau, "k b f -> (k b) f")))
        head_dim = model.decoder.width // model.decoder.heads
        ids = [
            repeat(ids, "b j -> (k b) j", k=copies) if ids.shape[0] > 1 else ids
            for ids in (positions.query_ids, positions.context_ids)
        ]
        query_table, key_table = (rotary(i, head_dim, model.grid_height, model.grid_width) for i in ids)
        attend = causal(model, positions.frames, ids[0], ids[1], strict=True)
        for block in self.blocks:
            x = block(x, context, time, query_table, key_table, attend)
        return rearrange(self.head(x, time), "(k b) f n c -> k b f n c", k=copies)
