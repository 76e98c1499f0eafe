"""`make gpu` on a machine without one: it says so, and each of its parts runs on the CPU at a size that it can bear."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.encode import DEMO
from nextvid.config.recipes import recipe

CPU = torch.device("cpu")
pytestmark = pytest.mark.benchmarks


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_in_one_line(repository: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.splitlines() == ["gpu: this machine has no GPU that torch can use, so nothing was run"]


def test_backends_agree() -> None:
    rows = gpu.attention(CPU, (gpu.Shape("small", 3, 5, 4, 2, 16, 2),), torch.float32)
    assert [row["backend"] for row in rows][:3] == ["loop", "dense", "block"]
    assert max(row["error"] for row in rows) < 1e-5


def test_steps_of_two_lengths() -> None:
    row = gpu.two_lengths(CPU, recipe("demo"), 4, {4: 2, 8: 1}, compiled=False)
    assert row["last_loss"] > 0


def test_the_ring_gives_what_host_memory_has() -> None:
    assert gpu.ring(CPU, 3, clips=96)["batches"] == 3


def test_a_step_of_the_trainers_loop() -> None:
    row = gpu.step_of("demo", 0, 4, 20, compiled=False)
    assert row["step_ms"] > 0
    assert 0 <= row["waiting"] <= 1


def test_an_autoencoders_rate() -> None:
    assert gpu.encode_rate("cpu", DEMO, 64, 16, at_once=8)["frames_per_s"] > 0
