"""A device is given out once at a time, and comes back when its holder dies."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from nextvid.machine import VISIBLE, leased_gpus, visible_gpus
from storage.errors import RefusedError

HOLDER = """
import time
from nextvid.machine import leased_gpus
with leased_gpus(1, "auto") as given:
    print(given["CUDA_VISIBLE_DEVICES"], flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _two_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE, "4,GPU-abc")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_two_runs_never_share_a_device() -> None:
    with leased_gpus(1, "cuda") as first, leased_gpus(1, "auto") as second:
        assert (first, second) == ({VISIBLE: "4"}, {VISIBLE: "GPU-abc"})
        with (
            pytest.raises(RefusedError, match=f"0 of 2 are free.*4 \\(process {os.getpid()}\\)"),
            leased_gpus(1, "cuda"),
        ):
            pass
    with leased_gpus(2, "cuda") as both:
        assert both == {VISIBLE: "4,GPU-abc"}


def test_too_many_ranks_hold_nothing() -> None:
    with pytest.raises(RefusedError, match="3 GPUs are asked for and 2 of 2 are free"), leased_gpus(3, "cuda"):
        pass
    with leased_gpus(2, "cuda"):
        pass


def test_a_killed_run_gives_its_device_back() -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == b"4\n"
    with leased_gpus(1, "cuda") as given:
        assert given == {VISIBLE: "GPU-abc"}
    process.kill()
    process.wait()
    with leased_gpus(2, "cuda"):
        pass


def test_a_place_that_somebody_else_prepared_is_refused(tmp_path: Path) -> None:
    folder, precious = tmp_path / f"nextvid-devices-{os.getuid()}", tmp_path / "precious"
    precious.write_text("mine")
    folder.mkdir()
    (folder / "4.lock").symlink_to(precious)
    with pytest.raises(OSError, match="symbolic link"), leased_gpus(1, "cuda"):
        pass
    (folder / "4.lock").unlink()
    folder.rmdir()
    folder.symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(RefusedError, match="is not a folder of this user"), leased_gpus(1, "cuda"):
        pass
    assert precious.read_text() == "mine"


def test_the_place_is_this_user_s_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with leased_gpus(1, "cuda"):
        assert (tmp_path / f"nextvid-devices-{os.getuid()}").stat().st_mode & 0o777 == 0o700
    other = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: other)
    (tmp_path / f"nextvid-devices-{os.getuid()}").mkdir()  # ours, and so not that user's
    with pytest.raises(RefusedError, match="is not a folder of this user"), leased_gpus(1, "cuda"):
        pass


def test_a_run_on_cpu_takes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with leased_gpus(9, "cpu") as given:
        assert given == {}
    monkeypatch.setenv(VISIBLE, "")
    assert visible_gpus() == []
    with leased_gpus(9, "auto") as given:
        assert given == {}
