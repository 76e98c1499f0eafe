"""One writer a run folder, and no writer without its launcher.

Holds the exclusive lock of a run folder (fcntl: freed by the kernel when its holder dies, however it dies) and the two
ways in which a trainer notices that whoever started it is gone (design, 4 "Training"): the kernel's signal on the
parent's death, and a thread that watches the launcher, since torchrun stands between trainer and launcher and survives
the latter. Where there is no /proc, the parent's id alone is watched.
"""

import ctypes
import fcntl
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from storage.errors import ConflictError

PR_SET_PDEATHSIG = 1  # linux/prctl.h
WATCH_S = 0.5  # our choice: far below the 10 s within which a cancelled run must be gone (design 4)
ORPHANED = 75  # exit code of a trainer whose launcher is gone (EX_TEMPFAIL: asking again resumes)


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold `<folder>/lock` exclusively; raises ConflictError, naming the holder, if another process has it."""
    with (folder / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise ConflictError(
                f"{folder}: another process (id {holder}) trains this run; wait for it, or end it and ask again"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def ancestors() -> list[int]:
    """Process ids from the parent up; the parent alone where there is no /proc."""
    chain = [os.getppid()]
    while chain[-1] > 1:
        try:
            # "pid (name) state ppid ...": the name may hold spaces and brackets, so count from its last bracket
            fields = Path(f"/proc/{chain[-1]}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            break
        chain.append(int(fields[1]))
    return chain


def launcher_id() -> int:
    """The process whose end ends the trainers that this one starts: itself, or the one that spawned it for the work.

    A Dagster step is a child of its run's process. A killed run leaves the step behind, and with it whatever it
    started; so that one is watched, which stands above both.
    """
    parent = multiprocessing.parent_process()
    return os.getpid() if parent is None or parent.pid is None else parent.pid


def orphaned() -> bool:
    """Whether the process that spawned this one for a piece of work is gone; a program started by hand never is."""
    parent = multiprocessing.parent_process()
    return parent is not None and os.getppid() != parent.pid


def die_with(launcher: int) -> None:
    """From now on this process ends as soon as its parent or the process `launcher` above it does. Call it first."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_watch, args=(os.getppid(), launcher), name="launcher-watch", daemon=True).start()


def _watch(parent: int, launcher: int) -> None:
    while os.getppid() == parent and (launcher in ancestors() or not Path("/proc").exists()):
        time.sleep(WATCH_S)
    os._exit(ORPHANED)  # no clean-up: everything on disk is safe against a kill at any moment
