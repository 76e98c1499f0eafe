"""The attentive probe: one learned query attends to all tokens of a frozen encoder, then an MLP and a linear layer.

The architecture is docs/method.md 9 (V-JEPA 2's cross-attention block without its self-attention blocks); the settings
for small encoders are those of the demo's study (docs/demo.md). Since the query is one vector, `(LN(x) W_k) q` is
computed as `LN(x) (W_k q)` and `sum_n a_n (LN(x_n) W_v)` as `(sum_n a_n LN(x_n)) W_v`: the tokens are read twice
instead of projected twice. `reference_logits` is the plain form.

Axes: G seeds, R pairs of rate and weight decay, K = R G probes, O batches (one a seed, or one for all), B clips of a
batch, L tokens of a clip, D width, H heads, E = D / H, Y classes.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from nextvid.config.benchmarks import Augmentation, BenchmarkConfig, SweepConfig
from nextvid.config.strict import Strict

LN_EPS = 1e-6  # docs/method.md 6.1
MLP_RATIO = 4  # docs/method.md 9
SMALL_WIDTH = 512  # below this, initialisation and settings made for width 1024 fail: std 0.02 collapses at 128


class Pair(NamedTuple):
    """The rate and weight decay of one head, and its warm-up."""

    rate: float
    weight_decay: float
    warm_up_epochs: float
    warm_up_from: float


class ProbeSettings(Strict):
    """How probes are trained. The defaults are those of the demo's study (docs/demo.md)."""

    heads: int = 4
    sweep: tuple[SweepConfig, ...] = (SweepConfig(rates=(1e-3, 3e-3), weight_decays=(0.05,)),)
    warm_up_steps: int = 40  # beside the sweep's warm_up_epochs
    own_orders: bool = True  # each seed sees clips in an order of its own: as many passes over them as seeds
    clip: float = 1.0
    epochs: int = 20
    batch: int = 32
    init: Literal["xavier", "trunc_normal"] = "xavier"
    query_std: float = 1.0
    held_out: float = 0.2  # share of probe-train that chooses the pair of rate and weight decay
    augment: Augmentation = "none"  # how training clips are varied; latents never are

    @property
    def pairs(self) -> list[Pair]:
        """Every rate of a sweep with every weight decay: what learns side by side for each seed."""
        return [
            Pair(rate, decay, one.warm_up_epochs, one.warm_up_from)
            for one in self.sweep
            for rate, decay in itertools.product(one.rates, one.weight_decays)
        ]


def probe_settings(width: int, reads: Literal["latents", "pixels"], config: BenchmarkConfig) -> ProbeSettings:
    """How the heads of a benchmark learn on an encoder of this width, where the benchmark does not say it.

    By the demo study's settings below width 512; else the public probe's rates and initialisation (docs/method.md 9).
    Heads of encoders that read pixels learn from varied clips, of images or of videos.
    """
    small = ProbeSettings(epochs=config.epochs, batch=config.batch)
    public = {
        "heads": 16,  # the paper's Tab. 10
        "sweep": (SweepConfig(rates=(5e-3, 3e-3, 1e-3, 3e-4, 1e-4), weight_decays=(0.01, 0.1, 0.4, 0.8)),),
        "warm_up_steps": 0,
        "own_orders": False,
        "init": "trunc_normal",
        "query_std": 0.02,
    }
    written: dict[str, object] = {}
    if reads == "pixels":
        written["augment"] = config.augment or ("image" if config.policy.frames == 1 else "video")
    if config.sweep:
        written |= {"sweep": config.sweep, "warm_up_steps": 0, "own_orders": False}
    if config.held_out is not None:
        written["held_out"] = config.held_out
    if config.attention_heads is not None:
        written["heads"] = config.attention_heads
    if config.finetune is not None:  # whose head has no attention
        written["heads"] = 1
    return small.model_copy(update=written if width < SMALL_WIDTH else public | written)


class Probes(nn.Module):
    """K = pairs x seeds probes, each parameter stacked along a leading axis K (pair-major: a pair is one slice).

    Probes of one seed start equal, so that pairs are compared from one start.
    """

    def __init__(self, width: int, classes: int, settings: ProbeSettings, seeds: Sequence[int]) -> None:
        super().__init__()
        if width % settings.heads:
            raise ValueError(f"width {width} is not a multiple of {settings.heads} probe heads")
        self.heads, self.seeds, self.pairs = settings.heads, len(seeds), len(settings.pairs)
        starts = [_start(width, classes, settings, seed) for seed in seeds]
        self.parts = nn.ParameterDict()
        for name in starts[0]:
            stacked = torch.stack([start[name] for start in starts])
            self.parts[name] = nn.Parameter(repeat(stacked, "g ... -> (r g) ...", r=self.pairs).clone())

    def forward(self, tokens: Float[Tensor, "O B L D"]) -> Float[Tensor, "G R B Y"]:
        """Logits of every probe; `tokens` are normalised without affine (`normalise`)."""
        p, clips = self.parts, tokens.shape[1]
        # tokens weighted by attention, LN's affine part applied after the sum (the weights add up to one): [K, H, B, D]
        pooled = self._weights(tokens) @ rearrange(tokens, "o b l d -> (o b) l d")
        pooled = rearrange(pooled, "(o b) (r s h) d -> (r o s) h b d", b=clips, r=self.pairs, h=self.heads)
        pooled = pooled * p["norm_weight"][:, None, None] + p["norm_bias"][:, None, None]
        values = einsum(pooled, self._by_head(p["value"]), "k h b d, k h e d -> k b h e")
        values = rearrange(values, "k b h e -> k b (h e)") + p["value_bias"][:, None]
        hidden = p["query"][:, None] + values  # [K, B, D]
        x = functional.layer_norm(hidden, hidden.shape[-1:], eps=LN_EPS) * p["mlp_norm_weight"][:, None]
        x = x + p["mlp_norm_bias"][:, None]
        x = torch.baddbmm(p["up_bias"][:, None], x, rearrange(p["up"], "k f d -> k d f"))
        x = torch.baddbmm(p["down_bias"][:, None], functional.gelu(x), rearrange(p["down"], "k d f -> k f d"))
        hidden = hidden + x
        logits = torch.baddbmm(p["last_bias"][:, None], hidden, rearrange(p["last"], "k y d -> k d y"))
        return rearrange(logits, "(r g) b y -> g r b y", r=self.pairs)

    def attention(self, tokens: Float[Tensor, "O B L D"]) -> Float[Tensor, "G R B L"]:
        """How every probe's query shares its attention among tokens, normalised without affine: the mean over heads."""
        weights = rearrange(self._weights(tokens), "(o b) (r s h) l -> (o s) r b h l", o=len(tokens), r=self.pairs,
                            h=self.heads)  # fmt: skip
        return weights.mean(3)

    def _weights(self, tokens: Float[Tensor, "O B L D"]) -> Float[Tensor, "O*B R*S*H L"]:
        """Attention of every probe and head; S are the seeds that see the same batch."""
        p = self.parts
        query = einsum(p["ask"], p["query"], "k d c, k c -> k d") + p["ask_bias"]
        query = rearrange(query, "k (h e) -> k h e", h=self.heads)
        key = einsum(query, self._by_head(p["key"]), "k h e, k h e d -> k h d")
        key = key * p["norm_weight"][:, None] / math.sqrt(query.shape[-1])
        orders, clips = tokens.shape[:2]
        key = rearrange(key, "(r o s) h d -> o d (r s h)", r=self.pairs, o=orders)
        logits = rearrange(tokens, "o b l d -> o (b l) d") @ key
        return rearrange(logits, "o (b l) q -> (o b) q l", b=clips).softmax(-1)

    def _by_head(self, weight: Float[Tensor, "K D D"]) -> Float[Tensor, "K H E D"]:
        return rearrange(weight, "k (h e) d -> k h e d", h=self.heads)


def _start(width: int, classes: int, settings: ProbeSettings, seed: int) -> dict[str, Tensor]:
    """Parameters of one probe. Keys have no bias: it would shift all logits of a head alike, which softmax ignores."""
    generator = torch.Generator().manual_seed(seed)

    def linear(rows: int, columns: int) -> Tensor:
        weight = torch.empty(rows, columns)
        match settings.init:
            case "xavier":
                return nn.init.xavier_uniform_(weight, generator=generator)
            case "trunc_normal":
                return nn.init.trunc_normal_(weight, std=0.02, generator=generator)  # docs/method.md 9

    hidden = MLP_RATIO * width
    return {
        "query": settings.query_std * torch.randn(width, generator=generator),
        "ask": linear(width, width),
        "ask_bias": torch.zeros(width),
        "key": linear(width, width),
        "value": linear(width, width),
        "value_bias": torch.zeros(width),
        "norm_weight": torch.ones(width),
        "norm_bias": torch.zeros(width),
        "mlp_norm_weight": torch.ones(width),
        "mlp_norm_bias": torch.zeros(width),
        "up": linear(hidden, width),
        "up_bias": torch.zeros(hidden),
        "down": linear(width, hidden),
        "down_bias": torch.zeros(width),
        "last": linear(classes, width),
        "last_bias": torch.zeros(classes),
    }


def reference_logits(probes: Probes, probe: int, tokens: Float[Tensor, "B L D"]) -> Float[Tensor, "B Y"]:
    """Logits of one probe for raw tokens, the plain reference: project keys and values, attend, MLP, linear."""
    p = {name: parameter[probe] for name, parameter in probes.parts.items()}
    width = tokens.shape[-1]
    x = functional.layer_norm(tokens, (width,), p["norm_weight"], p["norm_bias"], LN_EPS)
    query = rearrange(functional.linear(p["query"], p["ask"], p["ask_bias"]), "(h e) -> h 1 e", h=probes.heads)
    key = rearrange(functional.linear(x, p["key"]), "b l (h e) -> b h l e", h=probes.heads)
    value = rearrange(functional.linear(x, p["value"], p["value_bias"]), "b l (h e) -> b h l e", h=probes.heads)
    seen = functional.scaled_dot_product_attention(query.expand(len(tokens), -1, -1, -1), key, value)
    hidden = p["query"] + rearrange(seen, "b h 1 e -> b (h e)")
    inner = functional.layer_norm(hidden, (width,), p["mlp_norm_weight"], p["mlp_norm_bias"], LN_EPS)
    inner = functional.gelu(functional.linear(inner, p["up"], p["up_bias"]))
    hidden = hidden + functional.linear(inner, p["down"], p["down_bias"])
    return functional.linear(hidden, p["last"], p["last_bias"])
