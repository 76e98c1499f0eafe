"""Ctrl-C, SIGTERM and a closed terminal end a command at once: one line, exit code 128 + signal, nothing left running.

Python's handlers wait for the main thread, which may be in a forward of seconds, and their exception unwinds, and is
caught, anywhere. So a thread waits for the signal and replaces this process by this file as a program (exec): no other
thread can act any more, and the process id and its children stay. The program freezes and kills all children, then
removes what they left. Everything on disk is safe against a kill at any moment (docs/decisions/0062).
"""

import atexit
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

CAUGHT = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "a closed terminal"}
OUTSIDE = "NEXTVID_TMPDIR"  # the folder of temporary files of whoever called the command, for what outlives it
CANCEL_S = 10.0  # our choice: what a cluster's server may take to cancel a job
KILLED_S = 5.0  # our choice: a killed process that waits for a file server ends later than that
COMPILED = "TORCHINDUCTOR_CACHE_DIR"  # torch keeps compiled kernels below TMPDIR, and they are for later runs too

_cancelled: list[Callable[[], object]] = []


def stoppable(remedy: str) -> None:
    """End this program by `CAUGHT` from now on, and say `remedy`. Call it first, once, in the main thread.

    Temporary files of this process and its children go to one folder, which is removed at the end.
    """
    folder = ""
    with contextlib.suppress(OSError):  # none can be made: whoever needs one says so
        outside = tempfile.gettempdir()
        folder = tempfile.mkdtemp(prefix="nextvid-")
        atexit.register(remove_temporary, folder)
        os.environ[OUTSIDE] = outside
        os.environ.setdefault(COMPILED, str(Path(outside, f"torchinductor_{os.getuid()}")))
        os.environ["TMPDIR"] = tempfile.tempdir = folder
    said = os.dup(2)  # what runs here may redirect its stderr, as Dagster does
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    threading.Thread(target=_wait, args=(read, said, folder, remedy), name="stopping", daemon=True).start()
    for number in CAUGHT:
        if number != signal.SIGHUP or signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores it
            signal.signal(number, lambda *_: None)  # C code has written its number to the pipe


@contextlib.contextmanager
def when_stopped(cancel: Callable[[], object]) -> Iterator[None]:
    """If the program is stopped within the block, `cancel` what is not a process of this machine."""
    _cancelled.append(cancel)
    try:
        yield
    finally:
        _cancelled.remove(cancel)


def _wait(read: int, said: int, folder: str, remedy: str) -> None:
    while (number := os.read(read, 1)[0]) not in CAUGHT:
        pass  # a signal of somebody else's
    signal.pthread_sigmask(signal.SIG_BLOCK, CAUGHT)  # also of the program that follows
    shown = "\r\x1b[J\x1b[?25h" if os.isatty(said) else ""  # the bar goes, the cursor comes back
    with contextlib.suppress(OSError):
        os.write(said, f"{shown}stopped by {CAUGHT[signal.Signals(number)]}; {remedy}\n".encode())
    for cancel in (*reversed(_cancelled), sys.stdout.flush):
        cancelling = threading.Thread(target=cancel, daemon=True)
        cancelling.start()
        cancelling.join(CANCEL_S)
    with contextlib.suppress(OSError):
        os.execv(sys.executable, [sys.executable, "-I", "-S", __file__, str(number), folder, *semaphores("self")])  # noqa: S606
    os._exit(128 + number)


def remove_temporary(folder: str) -> None:
    """Remove a command's folder of temporary files, and that of compiled kernels where there are none."""
    if folder:
        shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError, KeyError):
        Path(os.environ[COMPILED]).rmdir()  # torch makes it when it is imported


def semaphores(process: int | str) -> set[str]:
    """Files of semaphores of multiprocessing, and of joblib's copy of it, that a process has; none without /proc.

    They are found by their inode: the C library maps them under another name and then links them to theirs.
    """
    mapped, found = set[int](), set[str]()
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{process}/maps").read_text().splitlines()
        mapped = {int(line.split()[4]) for line in lines if "/dev/shm/sem." in line}  # noqa: S108
    for path in Path("/dev/shm").glob("sem.*") if mapped else ():  # noqa: S108
        with contextlib.suppress(OSError):  # another program's, gone by now
            if path.name.startswith(("sem.mp-", "sem.loky-")) and path.stat().st_ino in mapped:
                found.add(str(path))
    return found


def parents() -> dict[int, int]:
    """The parent of each process that has not ended; of none where there is no /proc."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # "pid (name) state ppid ...": the name may contain spaces and brackets
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if state not in "ZX":
                found[int(stat.parent.name)] = int(parent)
    return found


def descendants(process: int) -> set[int]:
    """Children of a process and theirs."""
    known, found = parents(), {process}
    while more := {child for child, parent in known.items() if parent in found} - found:
        found |= more
    return found - {process}


def end_descendants(left: set[str]) -> None:
    """Freeze all descendants, so that none starts another or acts on another's end; then kill them, and remove `left`.

    Semaphores of theirs are removed too: the process that would do so at their end is killed, and it would complain.
    """
    found: set[int] = set()
    while new := descendants(os.getpid()) - found:
        for process in new:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGSTOP)
        found |= new
    left = left.union(*map(semaphores, found))
    for process in found:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process, signal.SIGKILL)
    until = time.monotonic() + KILLED_S
    while found & parents().keys() and time.monotonic() < until:
        time.sleep(0.01)
    for path in left:
        Path(path).unlink(missing_ok=True)


def main(number: int, folder: str, *left: str) -> None:
    """What the process that is stopped becomes: end its children, remove its temporary folder, exit."""
    end_descendants(set(left))
    remove_temporary(folder)
    os._exit(128 + number)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
