"""A device is given out once at a time, whoever asks, and comes back when its holder dies."""

import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from nextvid import machine
from nextvid.machine import VISIBLE, leased_devices, leased_gpus, visible_gpus
from nextvid.train.pretrain import PreparedRun, trainers
from storage.errors import ConfigError, RefusedError

HOLDER = """
import sys, time
from nextvid.machine import leased_gpus
with leased_gpus(int(sys.argv[1]), "auto", sys.argv[2], lambda line: print(line, flush=True)) as held:
    print(",".join(held), flush=True)
    time.sleep(60)
"""


class WaitsError(Exception):
    """Ends what would wait, with the line that it shows."""


def stop(line: str) -> NoReturn:
    raise WaitsError(line)


@pytest.fixture(autouse=True)
def _two_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE, "4,GPU-abc")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def holding(stack: ExitStack, count: int, who: str) -> "subprocess.Popen[str]":
    """A process that holds so many devices for a minute, once it has them."""
    command = [sys.executable, "-c", HOLDER, str(count), who]
    process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    stack.callback(process.kill)
    return process


def line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_two_never_share_a_device_and_a_line_says_who_holds_it() -> None:
    with leased_gpus(1, "cuda", "pretrain 1", stop) as first, leased_gpus(1, "auto", "probes demo", stop) as second:
        assert (first, second) == (["4"], ["GPU-abc"])
        me = os.getpid()
        with pytest.raises(WaitsError) as waits, leased_gpus(1, "cuda", "latents a", stop):
            pass
        assert str(waits.value) == (
            f"waiting for 1 GPUs: 4 is held by process {me} (pretrain 1), GPU-abc is held by process {me} (probes demo)"
        )
    with leased_gpus(2, "cuda", "pretrain 1", stop) as both:
        assert both == ["4", "GPU-abc"]


def test_who_asks_for_all_takes_what_is_free() -> None:
    with leased_gpus(1, "cuda", "pretrain 1", stop), leased_gpus(0, "cuda", "latents a", stop) as rest:
        assert rest == ["GPU-abc"]
    with leased_gpus(0, "cuda", "latents a", stop) as free:
        assert free == ["4", "GPU-abc"]


def test_more_than_there_are_is_refused_at_once_and_holds_nothing() -> None:
    with (
        pytest.raises(RefusedError, match="pretrain 1 asks for 3 GPUs, and there are 2 here: lower `ranks`"),
        leased_gpus(3, "cuda", "pretrain 1", stop),
    ):
        pass
    with leased_gpus(2, "cuda", "pretrain 1", stop):
        pass


def test_killed_holders_give_way_to_those_that_wait_in_turn() -> None:
    with ExitStack() as stack:
        first = holding(stack, 1, "latents a")
        assert line(first) == "4"
        big = holding(stack, 2, "pretrain 1")
        assert line(big) == f"waiting for 1 GPUs: 4 is held by process {first.pid} (latents a)"
        small = holding(stack, 1, "probes demo")  # it waits too, though it asks for less: `big` would wait for ever
        assert line(small) == f"waiting for a GPU behind process {big.pid} (pretrain 1), which waits too"
        first.kill()
        assert line(big) == "4,GPU-abc"
        held = f"is held by process {big.pid} (pretrain 1)"
        assert line(small) == f"waiting for 1 GPUs: 4 {held}, GPU-abc {held}"
        big.kill()
        assert line(small) == "4"


def test_what_waits_for_nobody_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "orphaned", lambda: True)
    with (
        leased_gpus(2, "cuda", "pretrain 1", stop),
        pytest.raises(RefusedError, match="latents a was waiting for a GPU, and the process that asked for it is gone"),
        leased_gpus(1, "cuda", "latents a", print),
    ):
        pass


def test_training_takes_its_devices_from_the_same_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = f"import os; open({str(tmp_path / 'seen')!r}, 'w').write(os.environ[{VISIBLE!r}])"
    run = PreparedRun("0" * 12, "0" * 32, str(tmp_path), [sys.executable, "-c", code], complete=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with leased_devices(1, "auto", "probes demo", stop) as first:
        assert first == ["cuda:0"]
        with leased_devices(0, "auto", "latents a", stop) as rest:
            assert rest == ["cuda:1"]
            with pytest.raises(WaitsError, match=r"probes demo.*latents a"), trainers(run, 1, 2, stop):
                pass
        with trainers(run, 1, 2, stop) as process:
            assert process.wait() == 0
    assert (tmp_path / "seen").read_text() == "GPU-abc"


def test_a_place_that_somebody_else_prepared_is_refused(tmp_path: Path) -> None:
    folder, precious = tmp_path / f"nextvid-devices-{os.getuid()}", tmp_path / "precious"
    precious.write_text("mine")
    folder.mkdir()
    (folder / "4.lock").symlink_to(precious)
    with pytest.raises(OSError, match="symbolic link"), leased_gpus(1, "cuda", "pretrain 1", stop):
        pass
    (folder / "4.lock").unlink()
    shutil.rmtree(folder)
    folder.symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(RefusedError, match="is not a folder of this user"), leased_gpus(1, "cuda", "pretrain 1", stop):
        pass
    assert precious.read_text() == "mine"


def test_the_place_is_this_user_s_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with leased_gpus(1, "cuda", "pretrain 1", stop):
        assert (tmp_path / f"nextvid-devices-{os.getuid()}").stat().st_mode & 0o777 == 0o700
    other = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: other)
    (tmp_path / f"nextvid-devices-{os.getuid()}").mkdir()  # ours, and so not that user's
    with pytest.raises(RefusedError, match="is not a folder of this user"), leased_gpus(1, "cuda", "pretrain 1", stop):
        pass


def test_a_run_on_cpu_takes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with leased_gpus(9, "cpu", "pretrain 1", stop) as held:
        assert held == []
    monkeypatch.setenv(VISIBLE, "")
    assert visible_gpus() == []
    with leased_gpus(9, "auto", "pretrain 1", stop) as held:
        assert held == []


def test_models_in_this_process_need_no_lease_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with leased_gpus(2, "auto", "pretrain 1", stop):
        for asked, count, wanted in (("cpu", 0, 1), ("cpu", 3, 3), ("auto", 1, 1)):
            with leased_devices(count, asked, "latents a", stop) as devices:
                assert devices == ["cpu"] * wanted
    monkeypatch.setenv(VISIBLE, "")
    with pytest.raises(ConfigError, match="torch sees no GPU here"), leased_devices(0, "cuda", "latents a", stop):
        pass
