"""Autoregressive generation: from tubelet 0 alone, one tubelet after the other, each seeing what was generated before.

Holds no files and no pictures. Tubelets generated so far are encoded anew at each step by the online encoder; the
encoder being frame-causal, keeping their keys and values would give the same and cost less. Recipes with latents as
input take the generated latents themselves (method.md 11 re-encodes pixels, for encoders that read pixels).

Axes: B clips, F frames, C channels of one frame, h and w cells of the grid, n visible cells.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nextvid.model.flow import ODE_STEPS
from nextvid.model.nextvid import NExTVid
from nextvid.model.tokens import gather_tokens, latent_tokens, tube_ids, unstack_target


@torch.no_grad()
def generate_onward(
    model: NExTVid,
    seed: Float[Tensor, "B f C h w"],
    tubelets: int,
    cells: Int[Tensor, "B n"],
    generator: torch.Generator,
    steps: int = ODE_STEPS,
) -> Float[Tensor, "B F C h w"]:
    """Normalised latents of `tubelets` tubelets, the first of which is `seed`.

    `cells` are what the encoder sees of every tubelet, ascending: all of them, or as many as in training, since more
    context than in training is a shift too (method.md 11).
    """
    config = model.recipe.model
    assert seed.shape[1] == config.tubelet, f"the seed is one tubelet, {config.tubelet} frames"
    latents = seed
    for known in range(1, tubelets):
        ids = tube_ids(cells, known, config.cells)
        tokens = gather_tokens(latent_tokens(latents, config.tubelet), ids)
        seen = model.last(model.condition(tokens, ids, known))
        following = unstack_target(model.sample(seen, steps, generator), config.tubelet, config.grid_height)
        latents = torch.cat([latents, following], dim=1)
    return latents
