"""Steps and draws of a recipe's stages: which stage a step is in, and which draws come before it."""

from collections.abc import Sequence

from nextvid.config.recipe import StageConfig


def stage_at(stages: Sequence[StageConfig], step: int) -> tuple[int, int]:
    """Index of the stage that `step` (from 0) belongs to, and the step's number within it."""
    first = 0
    for index, stage in enumerate(stages):
        if step < first + stage.steps:
            return index, step - first
        first += stage.steps
    raise AssertionError(f"step {step} is behind the last stage ({first} steps)")


def draws_before(stages: Sequence[StageConfig], step: int) -> int:
    """Draw number of the first clip of `step`: clips of all earlier steps, across stages. `step` may be the end."""
    draws, left = 0, step
    for stage in stages:
        here = min(left, stage.steps)
        draws, left = draws + here * stage.batch, left - here
    assert left == 0, f"step {step} is behind the last stage"
    return draws
