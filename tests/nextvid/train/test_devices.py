"""A device is given out once at a time, and comes back when its holder dies."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from nextvid.train.devices import VISIBLE, leased, visible
from storage.errors import RefusedError

HOLDER = """
import time
from nextvid.train.devices import leased
with leased(1, "auto") as given:
    print(given["CUDA_VISIBLE_DEVICES"], flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _two_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE, "4,GPU-abc")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_two_runs_never_share_a_device() -> None:
    with leased(1, "cuda") as first, leased(1, "auto") as second:
        assert (first, second) == ({VISIBLE: "4"}, {VISIBLE: "GPU-abc"})
        with pytest.raises(RefusedError, match=f"0 of 2 are free.*4 \\(process {os.getpid()}\\)"), leased(1, "cuda"):
            pass
    with leased(2, "cuda") as both:
        assert both == {VISIBLE: "4,GPU-abc"}


def test_too_many_ranks_hold_nothing() -> None:
    with pytest.raises(RefusedError, match="3 GPUs are asked for and 2 of 2 are free"), leased(3, "cuda"):
        pass
    with leased(2, "cuda"):
        pass


def test_a_killed_run_gives_its_device_back() -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == b"4\n"
    with leased(1, "cuda") as given:
        assert given == {VISIBLE: "GPU-abc"}
    process.kill()
    process.wait()
    with leased(2, "cuda"):
        pass


def test_a_run_on_cpu_takes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with leased(9, "cpu") as given:
        assert given == {}
    monkeypatch.setenv(VISIBLE, "")
    assert visible() == []
    with leased(9, "auto") as given:
        assert given == {}
