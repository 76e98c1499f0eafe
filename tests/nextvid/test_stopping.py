"""Ctrl-C and SIGTERM: one line, the exit code, and nothing of a program is left, neither processes nor files."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nextvid.stopping import COMPILED, descendants

pytestmark = pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds processes in /proc")

# A main thread in C, a child in a session of its own that ignores SIGTERM, its child, and a process with a semaphore.
PROGRAM = """
import _multiprocessing, multiprocessing, os, pathlib, subprocess, sys, tempfile, threading, time
from nextvid.stopping import stoppable, when_stopped
stoppable("ask again")
child = "import signal, subprocess, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); " \\
    "subprocess.Popen(['sleep', '600']); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", child], start_new_session=True)
context = multiprocessing.get_context("spawn")
lock = context.Lock()
joblib_s = _multiprocessing.SemLock(1, 1, 1, f"/loky-{os.getpid()}-a", False)
context.Process(target=time.sleep, args=(600,)).start()
tempfile.mkdtemp(prefix="library-")
pathlib.Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).mkdir()
with when_stopped(lambda: print("job cancelled", flush=True)):
    while len(multiprocessing.active_children()) < 1: time.sleep(0.01)
    print(lock._semlock.name, flush=True)
    threading.Event().wait()
"""


def wait_for(found: "subprocess.Popen[str]", processes: int) -> set[int]:
    """Its descendants, once there are so many."""
    until = time.monotonic() + 60
    while len(known := descendants(found.pid)) < processes and time.monotonic() < until:
        time.sleep(0.02)
    return known


@pytest.mark.parametrize(("number", "said"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_a_stopped_program_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, said: str
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv(COMPILED, raising=False)  # a command that ran in this process sets it
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert program.stdout is not None
    semaphore = program.stdout.readline().strip().removeprefix("/")
    assert Path(f"/dev/shm/sem.{semaphore}").exists()
    children = wait_for(program, 4)  # of multiprocessing: its process, and the one that tracks semaphores
    assert len(children) == 4
    for _ in range(2):  # as `timeout` and a terminal with `make` do
        program.send_signal(number)
    out, err = program.stdout.read(), program.communicate(timeout=60)[1]
    assert program.returncode == 128 + number
    assert err == f"stopped by {said}; ask again\n"
    assert out == "job cancelled\n"
    assert not [process for process in children if alive(process)]
    assert not list(tmp_path.iterdir())
    assert not Path(f"/dev/shm/sem.{semaphore}").exists()
    assert not Path(f"/dev/shm/sem.loky-{program.pid}-a").exists()


def alive(process: int) -> bool:
    """Whether a process has not ended; one that nobody waited for has."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_command_is_stopped_before_it_has_read_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The entry point catches signals before it imports what takes time."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    command = [sys.executable, "-m", "nextvid", "status", "--corpus", str(tmp_path / "corpus.yaml")]
    program = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.iterdir()):
        time.sleep(0.005)
    time.sleep(0.05)
    program.send_signal(signal.SIGINT)
    _, err = program.communicate(timeout=60)
    assert (program.returncode, err.count("\n")) == (130, 1), err
    assert not list(tmp_path.iterdir())
