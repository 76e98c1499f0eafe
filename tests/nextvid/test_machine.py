"""Cores are counted and shared; a GPU is leased once at a time, whoever asks, and comes back when its holder dies."""

import os
import shutil
import subprocess
import sys
import tempfile
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

import polars as pl
import pytest
import torch

from nextvid import machine
from nextvid.corpus import media, shots
from nextvid.encode.pipeline import shares
from nextvid.machine import (
    CORES,
    VISIBLE,
    available_cores,
    batches_at_once,
    leased_devices,
    leased_gpus,
    memory_bytes,
    taken_cores,
    visible_gpus,
)
from nextvid.train.node import PreparedRun, trainers
from storage.errors import ConfigError, RefusedError
from tests.factories import write_project

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


def pretend(monkeypatch: pytest.MonkeyPatch, cores: int, memory: int = 1 << 40) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setattr(machine, "memory_bytes", lambda: memory)
    monkeypatch.delenv(CORES, raising=False)


def cgroups(monkeypatch: pytest.MonkeyPatch, folder: Path, own: str, files: dict[str, str]) -> None:
    (folder / "own").write_text(own)
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.setattr(machine, "OWN_CGROUPS", folder / "own")
    monkeypatch.setattr(machine, "CGROUPS", folder)


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        ("0::/pod/job\n", {"pod/cpu.max": "50000 100000\n", "pod/job/cpu.max": "max 100000\n"}, 1),
        ("0::/pod/job\n", {"pod/job/cpu.max": "250000 100000\n"}, 3),
        ("0::/\n", {"cpu.max": "400000 100000\n"}, 4),
        ("5:cpu,cpuacct:/job\n0::/\n", {f"cpu,cpuacct/job/cpu.cfs_{n}_us": q for n, q in
         (("quota", "50000\n"), ("period", "100000\n"))}, 1),
        ("5:cpu:/elsewhere\n", {f"cpu/cpu.cfs_{n}_us": q for n, q in (("quota", "-1\n"), ("period", "100000\n"))}, 8),
        ("1:name=systemd:/\n", {}, 8),
    ],
)  # fmt: skip
def test_a_quota_counts_as_the_cores_that_it_pays_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, files: dict[str, str], cores: int
) -> None:
    """A group's limit holds for those within it; half a core is one."""
    pretend(monkeypatch, 8)
    cgroups(monkeypatch, tmp_path, own, files)
    assert available_cores() == cores
    assert shares("cpu", 1) == (max(1, cores // 4), max(1, cores - max(1, cores // 4)))


def test_memory_is_that_of_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cgroups(monkeypatch, tmp_path, "0::/pod\n", {"memory.max": "max\n", "pod/memory.max": "2147483648\n"})
    assert memory_bytes() == 2 << 30
    cgroups(monkeypatch, tmp_path, "4:memory:/pod\n", {"memory/pod/memory.limit_in_bytes": "1073741824\n"})
    assert memory_bytes() == 1 << 30


def test_cores_are_bounded_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 64)
    cgroups(monkeypatch, tmp_path, "", {})
    project = write_project(tmp_path, {"stills": {"uri": "stills"}}, execution={"cores": 6})
    assert available_cores(project.corpus.execution.cores) == 6
    assert project.on_cores(16).corpus.execution.cores == 6
    assert project.on_cores(2).corpus.execution.cores == 2
    monkeypatch.setenv(CORES, "3")
    assert (available_cores(), available_cores(6), available_cores(2)) == (3, 3, 2)
    for wrong in ("0", "half", "-1", ""):
        monkeypatch.setenv(CORES, wrong)
        with pytest.raises(ConfigError, match="is no number of cores: set it to 1 or more, or unset it"):
            available_cores()
    with pytest.raises(ConfigError, match=r"(?s)execution.*cores.*greater than or equal to 1"):
        write_project(tmp_path, {"stills": {"uri": "stills"}}, execution={"cores": 0})


@pytest.mark.parametrize(
    ("cores", "memory", "first_pass", "probe", "encode", "batches"),
    [(2, 1 << 40, 2, 2, (1, 1), 1), (64, 1 << 40, 64, 4, (16, 48), 4), (64, 8 << 30, 8, 4, (8, 56), 4)],
)
def test_every_stage_plans_by_cores_and_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: int, memory: int, first_pass: int, probe: int,
    encode: tuple[int, int], batches: int,
) -> None:  # fmt: skip
    """Of 2,000 files of 10 s: as many processes as cores and memory allow, and as the work is worth."""
    pretend(monkeypatch, cores, memory)
    started: list[int] = []

    class Counting:
        def __init__(self, workers: int) -> None:
            started.append(workers)
            raise InterruptedError

    files = [{"uri": f"/nowhere/{n}", "duration_us": 10_000_000, "size_bytes": 10, "path": f"{n}"} for n in range(2000)]
    config = write_project(tmp_path, {"films": {"uri": "films"}}).corpus
    for module, work in (
        (shots, lambda: list(shots._first_passes(files, config.curation.shots, None))),
        (media, lambda: media._inspect(
            pl.DataFrame(files).with_columns(fingerprint=pl.lit("one")), config.datasets["films"], None, lambda n: None
        )),
    ):  # fmt: skip
        monkeypatch.setattr(module, "Sandbox", Counting)
        with pytest.raises(InterruptedError):
            work()
    assert started == [first_pass, probe]
    assert shares("cpu", 1) == encode
    assert batches_at_once(cores) == batches


def test_batches_share_the_cores_and_none_begins_on_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 8)
    begun, go = threading.Event(), threading.Event()
    taken: list[int] = []

    def third() -> None:
        begun.set()
        with taken_cores(100) as some:
            taken.append(some)
            go.wait(60)

    with taken_cores(0) as one:
        with taken_cores(6) as six:
            assert (one, six) == (1, 6)
            waiting = threading.Thread(target=third)
            waiting.start()
            assert begun.wait(60)
            waiting.join(0.2)
            assert taken == []  # one core is left, a quarter are two
        go.set()
        waiting.join(60)
        assert taken == [7]
