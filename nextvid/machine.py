"""This machine: cores, child processes that end with their launcher, and leases of GPUs.

- How many cores this process may use, and which device `auto` is.
- `die_with`: a trainer or encoder ends when the process that started it ends, however that happened.
- `leased_gpus`: each GPU of this machine is used by at most one run of a user at a time. A lease is a lock file per GPU
  (flock), which the kernel releases when its holder dies.
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

PR_SET_PDEATHSIG = 1  # linux/prctl.h
WATCH_S = 0.5  # our choice: far below the 10 s within which a cancelled run must have ended
ORPHANED = 75  # exit code of a child whose launcher is gone (EX_TEMPFAIL of sysexits.h: starting again resumes)
VISIBLE = "CUDA_VISIBLE_DEVICES"


def available_cores() -> int:
    """Cores that this process may use, at least one: fewer than the machine has in a container or under `taskset`."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # not on macOS


def device_of(asked: str) -> str:
    """`asked`, or for `auto` the GPU if torch sees one, else the CPU."""
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked


def ancestors() -> list[int]:
    """Process ids from the parent up; the parent alone where there is no /proc."""
    chain = [os.getppid()]
    while chain[-1] > 1:
        try:
            # "pid (name) state ppid ...": the name may contain spaces and brackets, so split after its last bracket
            fields = Path(f"/proc/{chain[-1]}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            break
        chain.append(int(fields[1]))
    return chain


def launcher_id() -> int:
    """Id of the process with which children of this one must end: this process, or the one that spawned it.

    A Dagster step is a child of its run's process. If a run is killed, its step survives, and so would the trainers
    that the step started: therefore trainers watch the run's process.
    """
    parent = multiprocessing.parent_process()
    return os.getpid() if parent is None or parent.pid is None else parent.pid


def orphaned() -> bool:
    """Whether the process that spawned this one (multiprocessing) has ended; False for a program started by hand."""
    parent = multiprocessing.parent_process()
    return parent is not None and os.getppid() != parent.pid


def die_with(launcher: int) -> None:
    """End this process as soon as its parent or its ancestor `launcher` ends. Call it before anything else.

    Linux kills it when its parent dies. A thread watches the launcher, because torchrun is a process between launcher
    and trainer and survives the launcher. Without /proc only the parent is watched.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_watch, args=(os.getppid(), launcher), name="launcher-watch", daemon=True).start()


def _watch(parent: int, launcher: int) -> None:
    while os.getppid() == parent and (launcher in ancestors() or not Path("/proc").exists()):
        time.sleep(WATCH_S)
    os._exit(ORPHANED)  # no clean-up: everything on disk is safe against a kill at any moment


@contextmanager
def leased_gpus(count: int, device: str) -> Iterator[dict[str, str]]:
    """Reserve `count` free GPUs for the block and yield the environment variables for a child; none for device `cpu`.

    Dagster's pool `gpu` bounds how many runs there are. This ensures that two of them, or one and a run started by
    hand, never train on the same GPU. On Ray and Kubernetes a job sees only the GPUs that the cluster gave it.
    Raises RefusedError, naming the holders, if fewer are free.
    """
    known = [] if device == "cpu" else visible_gpus()
    if not known:
        yield {}
        return
    with ExitStack() as stack:
        held: list[str] = []
        busy: list[str] = []
        for name in known:
            if len(held) == count:
                break
            holder = _lock(stack, name)
            (held if holder is None else busy).append(name if holder is None else f"{name} (process {holder})")
        if len(held) < count:
            raise RefusedError(
                f"{count} GPUs are asked for and {len(held)} of {len(known)} are free; taken: "
                f"{', '.join(busy) or 'none'}; wait for those runs, or ask for fewer ranks"
            )
        yield {VISIBLE: ",".join(held)}


def visible_gpus() -> list[str]:
    """Names of the GPUs that this process may use: from CUDA_VISIBLE_DEVICES, else their numbers."""
    if (listed := os.environ.get(VISIBLE)) is not None:
        return [name.strip() for name in listed.split(",") if name.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def _lock(stack: ExitStack, name: str) -> str | None:
    """Lock a GPU until the stack closes; if another process holds it, return that process's id."""
    # a local folder, since a home may be shared between machines; another user may have created one of this name
    folder = Path(tempfile.gettempdir(), f"nextvid-devices-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise RefusedError(f"{folder} is not a folder of this user: have it removed, or set TMPDIR to another folder")
    path = folder / f"{name.replace('/', '_')}.lock"
    return stack.enter_context(locked_or_holder(path, 0o600))
