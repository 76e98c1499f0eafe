"""One writer a folder; a trainer ends with its launcher, whatever stands between."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nextvid.machine import ancestors, launcher_id, orphaned
from nextvid.train.run import run_lock
from storage.errors import ConflictError
from tests.forked import alive

HOLDER = """
import sys, time
from pathlib import Path
from nextvid.train.run import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""

TRAINER = """
import os, sys, time
from nextvid.machine import die_with
die_with(int(sys.argv[1]))
print(os.getpid(), flush=True)
time.sleep(60)
"""

# a launcher that starts an agent, in a session of its own, that starts the trainer: as Dagster, torchrun and we stand
AGENT = f"""
import subprocess, sys
subprocess.run([sys.executable, "-c", {TRAINER!r}, sys.argv[1]])
"""
LAUNCHER = f"""
import os, subprocess, sys
subprocess.run([sys.executable, "-c", {AGENT!r}, str(os.getpid())], start_new_session=True)
"""


def test_second_writer_is_told_who_the_first_is(tmp_path: Path) -> None:
    with (
        run_lock(tmp_path),
        pytest.raises(ConflictError, match=f"process \\(id {os.getpid()}\\) is at work here"),
        run_lock(tmp_path),
    ):
        pass
    with run_lock(tmp_path):  # freed at the end of the block
        pass


def test_a_killed_holder_frees_the_lock(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == b"held\n"
    with pytest.raises(ConflictError), run_lock(tmp_path):
        pass
    process.kill()
    process.wait()
    with run_lock(tmp_path):
        pass


def test_ancestors_begin_with_the_parent_and_end_at_the_root() -> None:
    chain = ancestors()
    assert chain[0] == os.getppid()
    assert len(set(chain)) == len(chain)


@pytest.fixture
def chain() -> Iterator[tuple[subprocess.Popen[bytes], int, int]]:
    """Launcher process, id of the agent, id of the trainer."""
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER], stdout=subprocess.PIPE)
    assert launcher.stdout is not None
    with launcher.stdout:
        trainer = int(launcher.stdout.readline())
    agent = int(Path(f"/proc/{trainer}/stat").read_text().rpartition(")")[2].split()[1])
    yield launcher, agent, trainer
    for pid in (trainer, agent, launcher.pid):
        if alive(pid):
            os.kill(pid, signal.SIGKILL)
    launcher.wait()


def _ends_within(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(pid)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("killed", ["launcher", "agent"])
def test_trainer_dies_with_launcher_and_agent(chain: tuple[subprocess.Popen[bytes], int, int], killed: str) -> None:
    launcher, agent, trainer = chain
    time.sleep(0.7)  # longer than one look of the watch: it must not end by itself
    assert alive(trainer)
    os.kill(launcher.pid if killed == "launcher" else agent, signal.SIGKILL)
    assert _ends_within(trainer, 60)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_launcher_that_is_no_ancestor_ends_the_trainer() -> None:
    process = subprocess.run([sys.executable, "-c", TRAINER, "999999999"], timeout=120, capture_output=True)
    assert process.returncode == 75


def _report(answers: "multiprocessing.SimpleQueue[tuple[int, bool]]") -> None:
    answers.put((launcher_id(), orphaned()))


def test_what_a_spawned_process_starts_ends_with_whoever_spawned_it() -> None:
    context = multiprocessing.get_context("fork")
    answers: multiprocessing.SimpleQueue[tuple[int, bool]] = context.SimpleQueue()
    child = context.Process(target=_report, args=(answers,))
    child.start()
    child.join()
    assert answers.get() == (os.getpid(), False)


def test_a_program_started_by_hand_is_its_own_launcher() -> None:
    code = "import os; from nextvid import machine; print(machine.launcher_id() == os.getpid(), machine.orphaned())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True False\n"
