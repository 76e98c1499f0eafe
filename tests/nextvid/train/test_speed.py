"""FLOPs a second are the cost formulas over time; a share of a peak only where the peak is known."""

import pytest
import torch

from nextvid.model.cost import stage_cost
from nextvid.train.events import describe
from nextvid.train.loop import peak, speeds
from tests.nextvid.train.test_event_sinks import STEP
from tests.nextvid.train.tiny import tiny_recipe

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_a_cpu_has_flops_and_no_share() -> None:
    recipe = tiny_recipe()
    (stage, *_) = recipe.stages
    found = speeds(recipe, stage, 10.0, 1, CPU)
    assert found == {"tflop_per_s": pytest.approx(10 * stage_cost(recipe, stage).clip_flops / 1e12)}


@pytest.mark.parametrize(
    ("name", "flops"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12), ("Some GPU", None)],
)
def test_a_gpu_is_known_by_its_name(monkeypatch: pytest.MonkeyPatch, name: str, flops: float | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak(GPU) == flops
    recipe = tiny_recipe()
    found = speeds(recipe, recipe.stages[0], 1e9, 2, GPU)
    assert found.get("mfu") == (None if flops is None else pytest.approx(found["tflop_per_s"] * 1e12 / (2 * flops)))


def test_a_line_says_the_share_where_there_is_one() -> None:
    assert describe({"kind": "step", "step": 1, **STEP, "mfu": 0.384}, 4).endswith("clips/s wait 1.0% MFU 38.4%")
