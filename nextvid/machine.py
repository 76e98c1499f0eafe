"""How many cores this process may use: less than the machine has in a container or under `taskset`.

One writer a run folder, and no writer without its launcher.

Holds the exclusive lock of a run folder (fcntl: freed by the kernel when its holder dies, however it dies) and the two
ways in which a trainer notices that whoever started it is gone (design, 4 "Training"): the kernel's signal on the
parent's death, and a thread that watches the launcher, since torchrun stands between trainer and launcher and survives
the latter. Where there is no /proc, the parent's id alone is watched.

Which GPUs of this machine a run gets: each at most once at a time, among all runs of a user.

Holds a lock file a device (flock: freed by the kernel when its holder dies). Dagster's pool `gpu` bounds how many runs
there are; this sees to it that two of them, or one and a run by hand, never train on the same device. Ray and
Kubernetes give out devices themselves: then each job sees its own alone.
"""

import ctypes
import multiprocessing
import os
import signal
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from storage.errors import RefusedError
from storage.locks import locked_or_holder


def available_cores() -> int:
    """At least one."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # not on macOS


def device_of(asked: str) -> str:
    """`auto` is a GPU where there is one."""
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked


PR_SET_PDEATHSIG = 1  # linux/prctl.h
WATCH_S = 0.5  # our choice: far below the 10 s within which a cancelled run must be gone (design 4)
ORPHANED = 75  # exit code of a trainer whose launcher is gone (EX_TEMPFAIL: asking again resumes)


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


VISIBLE = "CUDA_VISIBLE_DEVICES"


@contextmanager
def leased(count: int, device: str) -> Iterator[dict[str, str]]:
    """Hold `count` free GPUs for the block; what to add to a child's environment. Nothing for runs on CPU.

    Raises RefusedError, naming the holders, where fewer are free.
    """
    known = [] if device == "cpu" else visible()
    if not known:
        yield {}
        return
    with ExitStack() as stack:
        held: list[str] = []
        busy: list[str] = []
        for name in known:
            if len(held) == count:
                break
            holder = _take(stack, name)
            (held if holder is None else busy).append(name if holder is None else f"{name} (process {holder})")
        if len(held) < count:
            raise RefusedError(
                f"{count} GPUs are asked for and {len(held)} of {len(known)} are free; taken: "
                f"{', '.join(busy) or 'none'}; wait for those runs, or ask for fewer ranks"
            )
        yield {VISIBLE: ",".join(held)}


def visible() -> list[str]:
    """Names of the GPUs that this process may use: as CUDA_VISIBLE_DEVICES lists them, else by number."""
    if (said := os.environ.get(VISIBLE)) is not None:
        return [name.strip() for name in said.split(",") if name.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def _take(stack: ExitStack, name: str) -> str | None:
    """Lock a device until the stack ends; the holder's process id if it is taken."""
    # of this machine alone, where a home may be shared between machines; others can put their own thing there first
    folder = Path(tempfile.gettempdir(), f"nextvid-devices-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise RefusedError(f"{folder} is not a folder of this user: have it removed, or set TMPDIR to another place")
    path = folder / f"{name.replace('/', '_')}.lock"
    return stack.enter_context(locked_or_holder(path, 0o600))
