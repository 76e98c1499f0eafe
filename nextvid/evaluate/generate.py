"""Generation of next tubelets: masked, from real ones before each, and autoregressive, from the first one alone.

Masked: from the visible cells of real tubelets 0..t-1, tubelet t, for all t in one pass (teacher forcing); the
predictor was trained on exactly this, with the online encoder (docs/method.md 11).

Autoregressive: one tubelet after the other, each from those generated before. Every tubelet is encoded once, by the
online encoder, whose keys and values are kept (nextvid/model/incremental.py). What the encoder reads of a generated
tubelet is `ReadBack`: the latents themselves, or for encoders of pixels the decoded frames as bytes, as if they had
been stored (docs/method.md 11).

Axes: B clips, f frames of a tubelet, F frames of tubelets 1..T-1, C channels of one frame, h and w cells of the grid,
S = h w cells, n visible cells, N = T S tokens of whole clips, i numbers in a token, H and W pixels.
"""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from nextvid.config.recipe import ModelConfig
from nextvid.model.flow import ODE_STEPS
from nextvid.model.incremental import IncrementalPredictor
from nextvid.model.nextvid import NExTVid
from nextvid.model.tokens import gather_tokens, latent_tokens, pixel_tokens, pixel_values, tube_ids, unstack_target

ReadBack = Callable[[Float[Tensor, "B f C h w"]], Float[Tensor, "B S i"]]
Decode = Callable[[Float[Tensor, "B f C h w"]], UInt8[Tensor, "B f H W 3"]]


@torch.no_grad()
def generate_onward(
    model: NExTVid,
    seed: Float[Tensor, "B S i"],
    tubelets: int,
    cells: Int[Tensor, "B n"],
    generator: torch.Generator,
    read_back: ReadBack,
    steps: int = ODE_STEPS,
) -> Float[Tensor, "B F C h w"]:
    """Targets of tubelets 1..tubelets-1, normalised as in training; `seed` are the encoder's tokens of tubelet 0.

    `cells` are what the encoder sees of every tubelet, ascending: all of them, or fewer, since more context than in
    training shifts the distribution too (docs/method.md 11).
    """
    config = model.recipe.model
    assert seed.shape[1] == config.cells, f"the seed is one tubelet, {config.cells} tokens"
    predictor, tokens, generated = IncrementalPredictor(model), seed, []
    for known in range(1, tubelets):
        seen = predictor.predict(gather_tokens(tokens, cells), cells)
        following = unstack_target(model.sample(seen, steps, generator), config.tubelet, config.grid_height)
        generated.append(following)
        if known < tubelets - 1:
            tokens = read_back(following)
    return torch.cat(generated, dim=1)


def reading_back(model: ModelConfig, decode: Decode) -> ReadBack:
    """The encoder reads the generated latents themselves, or frames that `decode` makes of the generated targets."""
    if model.encoder.input == "latents":
        return partial(latent_tokens, tubelet=model.tubelet)
    return lambda latents: pixel_tokens(pixel_values(decode(latents)), model.patch, model.tubelet)


def random_tube(cells: int, share: float, clips: int, generator: torch.Generator) -> Int[Tensor, "B n"]:
    """Random cells of each clip, the same in every tubelet: a share of them, at least one, ascending."""
    kept = max(1, round(share * cells))
    order = torch.rand(clips, cells, generator=generator, device=generator.device).argsort(dim=1)
    return order[:, :kept].sort(dim=1).values


@torch.no_grad()
def generate_masked(
    model: NExTVid,
    tokens: Float[Tensor, "B N i"],
    cells: Int[Tensor, "B n"],
    generator: torch.Generator,
    steps: int,
) -> Float[Tensor, "B F C h w"]:
    """Targets of tubelets 1..T-1, normalised as in training; `tokens` are the encoder's of whole clips.

    `cells` are visible, ascending, the same in every tubelet. `steps=1` is the one-step mean h0 + v at tau 0.
    """
    config = model.recipe.model
    before = tokens.shape[1] // config.cells - 1
    ids = tube_ids(cells, before, config.cells)
    seen = model.condition(gather_tokens(tokens, ids), ids, before)
    return unstack_target(model.sample(seen, steps, generator), config.tubelet, config.grid_height)
