"""How the model's blocks are carried out: recomputed in backward, compiled one by one. What they compute stays.

Both are switches of HowConfig and change no parameter's name, so that checkpoints, the average and the optimiser meet
the model as it is. Recomputing goes around what is compiled: torch.compile does not look into a checkpoint from
outside. It holds no mathematics.
"""

from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from nextvid.config import HowConfig
from nextvid.model.nextvid import NExTVid


def blocks_of(model: NExTVid) -> list[nn.Module]:
    """Blocks of encoder, predictor and decoder, as far as the recipe has them."""
    parts: tuple[nn.Module | None, ...] = (model.encoder, model.predictor, model.decoder)
    return [block for part in parts if part is not None for block in part.get_submodule("blocks").children()]


def carry_out(model: NExTVid, how: HowConfig, backend: str = "inductor") -> None:
    """Change every block in place as `how` says. `backend` is torch.compile's."""
    for block in blocks_of(model):
        forward = block.forward
        if how.compile:
            forward = torch.compile(forward, fullgraph=True, backend=backend)
        if how.recompute_blocks:  # no random numbers are drawn inside a block, so none need to be remembered
            forward = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
        block.forward = forward
