"""What is counted of a step is what the cost formulas say, and fusing removes kernels and bytes, never FLOPs."""

import pytest

from benchmarks.roofline import DEVICES, by_part, fused, step_kernels
from nextvid.config.recipes import recipe
from nextvid.model.cost import stage_cost

CLIPS = 2


@pytest.mark.benchmarks
@pytest.mark.parametrize("stage", [0, 3])
def test_counted_flops_are_those_of_the_formulas(stage: int) -> None:
    config = recipe("demo")
    number = min(stage, len(config.stages) - 1)
    kernels = step_kernels(config, config.stages[number], CLIPS)
    wanted = CLIPS * stage_cost(config, config.stages[number]).clip_flops
    assert sum(kernel.flops for kernel in kernels) == pytest.approx(wanted, rel=0.05)
    less = fused(kernels)
    assert sum(kernel.flops for kernel in less) == sum(kernel.flops for kernel in kernels)
    for row in by_part(kernels, DEVICES["H200"]):
        assert row["fused"] <= row["kernels"]
        assert row["gb_fused"] <= row["gb"]
        assert row["compiled_ms"] <= row["eager_ms"]
