"""Prints how far compiled steps are from plain ones in each stage: `python -m tests.nextvid.train.compiled BACKEND`."""

import json
import sys
from functools import partial
from unittest.mock import patch

import torch
from torch import _dynamo as dynamo

from nextvid.config.recipe import ExecutionConfig, RecipeConfig
from nextvid.config.stages import stage_at
from nextvid.model.tokens import latent_tokens
from nextvid.train import step
from nextvid.train.diagnose import features_of, judged
from nextvid.train.step import Trained, carry_out
from tests.nextvid.train.tiny import ALONE, gradients_of, latents_of, random_batch, tiny_recipe

CPU = torch.device("cpu")


def four_copies() -> RecipeConfig:
    """The recipe `tiny` with k = 4 in its first two stages and 1 in the others."""
    recipe = tiny_recipe()
    copies = (4, 4, 1, 1)
    stages = [s.model_copy(update={"tau_copies": k}) for s, k in zip(recipe.stages, copies, strict=True)]
    return recipe.model_copy(update={"stages": tuple(stages)})


def looked_at(trained: Trained, clips: int, frames: int) -> torch.Tensor:
    """What else reads the encoders during training, and sampling; its shapes are no step's."""
    latents = latents_of(random_batch(99, clips, frames))
    tokens = latent_tokens(latents, 2)
    with step.uncompiled(trained.how, CPU):
        parts = (trained.reference, trained.model.encoder)
        numbers = [judged(features_of(encoder, tokens, 2, ALONE)) for encoder in parts]
        seen = trained.model.condition(tokens[:, :16], torch.arange(16)[None], 1)
        sampled = trained.model.sample(seen, 2, torch.Generator().manual_seed(0))
    return torch.cat([torch.tensor([*n.values()]) for n in numbers] + [sampled.flatten()])


def main(backend: str) -> None:
    """The largest difference to plain steps, the graphs that dynamo captured, where it broke, and those that came late:
    after the first step of a stage."""
    recipe = four_copies()
    how = ExecutionConfig(compile=True, recompute_blocks=True, fold_copies=backend == "inductor")
    plain = step.build(recipe, ALONE, ExecutionConfig(compile=False))

    with patch("nextvid.train.step.carry_out", partial(carry_out, backend=backend)):
        compiled = step.build(recipe, ALONE, how)
    stats, late, error = dynamo.utils.counters["stats"], 0, 0.0
    for number in range(recipe.steps):
        stage, inside = stage_at(recipe.stages, number)
        before, shape = stats["unique_graphs"], (recipe.stages[stage].batch, recipe.stages[stage].frames)
        found, wanted = (
            step.take_step(trained, random_batch(number, *shape), number, 2).losses | gradients_of(trained)
            for trained in (compiled, plain)
        )
        found["looked_at"], wanted["looked_at"] = (looked_at(trained, 3, shape[1]) for trained in (compiled, plain))
        late += stats["unique_graphs"] - before if inside else 0
        error = max(error, *(float((found[key] - value).abs().max()) for key, value in wanted.items()))
    breaks = sum(dynamo.utils.counters["graph_break"].values())
    print(json.dumps({"error": error, "graphs": stats["unique_graphs"], "breaks": breaks, "late": late}))  # noqa: T201


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
