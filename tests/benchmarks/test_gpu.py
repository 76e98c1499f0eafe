"""`make gpu` on a machine without one: it says so, and with --quick each of its parts runs on the CPU."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu

pytestmark = pytest.mark.benchmarks


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("gpu: this machine has no GPU that torch can use, so nothing was run")


def test_every_part_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu.main(quick=True, json=tmp_path / "gpu.json")
    said = capsys.readouterr().out
    assert ended.value.code == 0, said
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["failed"] == []
    assert [row["backend"] for row in found["rows"]["attention"]][:3] == ["loop", "dense", "block"]
    assert found["rows"]["two lengths"][0]["last_loss"] > 0
    assert found["rows"]["encode"][0]["frames_per_s"] > 0
    for stage in gpu.STAGES:
        (step,) = found["rows"][f"step, {stage}"]
        assert step["step_ms"] > 0
        assert 0 <= step["waiting"] <= 1


def test_the_parts_for_a_gpu_have_the_same_names() -> None:
    """They are built without one: a recipe or stage that is gone would stop them."""
    whole, small = gpu.whole_parts(torch.device("cpu")), gpu.small_parts(torch.device("cpu"))
    assert {name.removesuffix(", as written").removesuffix(", compiled") for name in whole} == set(small)
