"""Masked generation: from the visible cells of real tubelets 0..t-1, tubelet t, all t in one pass (teacher forcing).

Holds no files and no pictures. The predictor was trained on exactly this, with the online encoder (method.md 11).

Axes: B clips, F frames, C channels of one frame, h and w cells of the grid, T tubelets, S = h w cells, n visible cells.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nextvid.model.flow import ODE_STEPS
from nextvid.model.nextvid import Conditioned, NExTVid
from nextvid.model.tokens import gather_tokens, latent_tokens, tube_ids, unstack_target


@torch.no_grad()
def generate_masked(
    model: NExTVid,
    latents: Float[Tensor, "B F C h w"],
    cells: Int[Tensor, "B n"],
    generator: torch.Generator,
    steps: int = ODE_STEPS,
) -> Float[Tensor, "B F C h w"]:
    """Normalised latents whose tubelets 1..T-1 are generated; tubelet 0 is the given one.

    `cells` are visible, ascending, the same in every tubelet. `steps=1` is the one-step mean h0 + v at tau 0.
    """
    config = model.recipe.model
    seen = _look(model, latents, cells)
    generated = unstack_target(model.sample(seen, steps, generator), config.tubelet, config.grid_height)
    return torch.cat([latents[:, : config.tubelet], generated], dim=1)


def _look(model: NExTVid, latents: Tensor, cells: Tensor) -> Conditioned:
    """Predictions for tubelets 1..T-1 from what is visible of 0..T-2."""
    config = model.recipe.model
    before = latents.shape[1] // config.tubelet - 1
    tokens = latent_tokens(latents, config.tubelet)
    ids = tube_ids(cells, before, config.cells)
    return model.condition(gather_tokens(tokens, ids), ids, before)
