"""Prints how far steps of a model cut over ranks, with recomputed and perhaps compiled blocks, are from plain steps.

`torchrun --nproc-per-node 2 -m tests.nextvid.train.fsdp fp32|bf16 plain|compiled`. Both are taken here: plain ones by
every rank alone on whole batches, the others by all ranks on shares. bf16 is autocast on the CPU, which training
itself keeps for GPUs.
"""

import json
import sys
from unittest.mock import patch

import torch

from nextvid.config.recipe import ExecutionConfig
from nextvid.train import step
from nextvid.train.distributed import Ranks, join, whole
from tests.nextvid.train.tiny import ALONE, random_batch, tiny_recipe

STEPS = 3


def stepped(ranks: Ranks, how: ExecutionConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses of every step, gradients of the last one, and the weights after it."""
    trained = step.build(tiny_recipe(), ranks, how)
    losses = []
    for number in range(STEPS):
        share = random_batch(number).split(4 // ranks.count)[ranks.rank]
        found = step.take_step(trained, share, number, 0)
        losses.append(ranks.mean(torch.stack(list(found.losses.values()))))
    weights = list(trained.model.parameters())
    gradients = [whole(weight.grad).flatten() for weight in weights if weight.grad is not None]
    return torch.cat(losses), torch.cat(gradients), torch.cat([whole(weight.detach()).flatten() for weight in weights])


def main(precision: str, blocks: str) -> None:
    """Relative differences of the whole vectors."""

    how = ExecutionConfig(device="cpu", ranks=2, shard=True, recompute_blocks=True, compile=blocks == "compiled")
    with join(how) as ranks, patch.object(step, "lowered", lambda *_: precision == "bf16"):
        pairs = zip(stepped(ranks, how), stepped(ALONE, ExecutionConfig()), strict=True)
        losses, gradients, weights = (float((a - b).norm() / b.norm()) for a, b in pairs)
        if ranks.first:
            print(json.dumps({"losses": losses, "gradients": gradients, "weights": weights}))  # noqa: T201


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
