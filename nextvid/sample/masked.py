"""Masked generation: from the visible cells of real tubelets 0..t-1, tubelet t, all t in one pass (teacher forcing).

Holds no files and no pictures. The predictor was trained on exactly this, with the online encoder (method.md 11).

Axes: B clips, N = T*S tokens of whole clips, i numbers in a token, n visible cells, F frames of tubelets 1..T-1,
C channels of one frame, h and w cells of the grid.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nextvid.model.flow import ODE_STEPS
from nextvid.model.nextvid import NExTVid
from nextvid.model.tokens import gather_tokens, tube_ids, unstack_target


@torch.no_grad()
def generate_masked(
    model: NExTVid,
    tokens: Float[Tensor, "B N i"],
    cells: Int[Tensor, "B n"],
    generator: torch.Generator,
    steps: int = ODE_STEPS,
) -> Float[Tensor, "B F C h w"]:
    """Targets of tubelets 1..T-1, normalised as in training; `tokens` are the encoder's of whole clips.

    `cells` are visible, ascending, the same in every tubelet. `steps=1` is the one-step mean h0 + v at tau 0.
    """
    config = model.recipe.model
    before = tokens.shape[1] // config.cells - 1
    ids = tube_ids(cells, before, config.cells)
    seen = model.condition(gather_tokens(tokens, ids), ids, before)
    return unstack_target(model.sample(seen, steps, generator), config.tubelet, config.grid_height)
