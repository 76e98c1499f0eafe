"""Prints how far a step with compiled blocks is from a plain one: `python -m tests.nextvid.train.compiled BACKEND`."""

import json
import sys
from unittest.mock import patch

import torch
from torch import _dynamo as dynamo

from nextvid.config.recipe import ExecutionConfig
from nextvid.train import step
from nextvid.train.step import carry_out
from tests.nextvid.train.tiny import ALONE, gradients_of, random_batch, tiny_recipe


def stepped(how: ExecutionConfig) -> dict[str, torch.Tensor]:
    """Losses and gradients of a second step, whose decoder is past its zero initialisation."""
    trained = step.build(tiny_recipe(), ALONE, how)
    step.take_step(trained, random_batch(0), 0, 0)
    return step.take_step(trained, random_batch(1), 1, 2).losses | gradients_of(trained)


def main(backend: str) -> None:
    """The largest difference to the plain step, and how many graphs dynamo captured and where it broke."""
    wanted = stepped(ExecutionConfig())
    with patch("nextvid.train.step.carry_out", lambda model, how: carry_out(model, how, backend)):
        found = stepped(ExecutionConfig(compile=True, recompute_blocks=True, fold_copies=True))
    error = max(float((found[key] - value).abs().max()) for key, value in wanted.items())
    counters = dynamo.utils.counters
    graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    print(json.dumps({"error": error, "graphs": graphs, "breaks": breaks}))  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1])
