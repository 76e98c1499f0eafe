"""This machine: cores, child processes that end with their launcher, and leases of GPUs.

- How many cores this process may use, and which device `auto` is.
- `die_with`: a trainer or encoder ends when the process that started it ends, however that happened.
- `leased_gpus`: each GPU of this machine is used by at most one process of a user at a time, and its children. A lease
  is a lock file per GPU (flock), which the kernel releases when its holder dies.
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
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from storage.errors import ConfigError, NExTVidError, RefusedError, exit_code
from storage.locks import locked_or_holder

PR_SET_PDEATHSIG = 1  # linux/prctl.h
WATCH_S = 0.5  # our choice: far below the 10 s within which a cancelled run must have ended
ORPHANED = 75  # exit code of a child whose launcher is gone (EX_TEMPFAIL of sysexits.h: starting again resumes)
VISIBLE = "CUDA_VISIBLE_DEVICES"

Tell = Callable[[str], None]  # shows a line to whoever waits


def available_cores() -> int:
    """Cores that this process may use, at least one: fewer than the machine has in a container or under `taskset`."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # not on macOS


def device_of(asked: str) -> str:
    """`asked`, or for `auto` the GPU if torch sees one, else the CPU."""
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked


def memory_bytes() -> int:
    """Memory of this machine, or of the container that this process is in."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # cgroup v2: a number, or "max"
    given = limit.read_text().strip() if limit.is_file() else "max"
    return min(whole, int(given)) if given.isdigit() else whole


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


def run_rank(main: Callable[..., None], module: str) -> None:
    """Run the entry point of one rank: an error becomes one line on stderr and the command line's exit code."""
    import tyro

    try:
        tyro.cli(main, prog=f"python -m {module}")
    except NExTVidError as error:
        sys.stderr.write(f"{error.kind}: {error}\n")
        sys.exit(exit_code(error))
    except OSError as error:
        sys.stderr.write(f"system: {error}\n")
        sys.exit(exit_code(error))


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
def leased_devices(count: int, asked: str, who: str, tell: Tell) -> Iterator[list[str]]:
    """`leased_gpus` for models in this process, by torch's names (`cuda:0`, ...); `cpu`, `count` times, needs no lease.

    Raises ConfigError for `cuda` where torch sees no GPU.
    """
    import torch

    if device_of(asked) == "cpu":
        yield ["cpu"] * max(1, count)
        return
    if not (known := visible_gpus()):
        raise ConfigError("execution.device is 'cuda', but torch sees no GPU here: use 'auto' or 'cpu'")
    with leased_gpus(count, asked, who, tell) as held:
        try:
            yield [f"cuda:{known.index(name)}" for name in held]
        finally:
            torch.cuda.empty_cache()  # what torch keeps for later is for the next holder


@contextmanager
def leased_gpus(count: int, device: str, who: str, tell: Tell) -> Iterator[list[str]]:
    """Hold `count` GPUs of this machine for the block, 0 for all that are free; none for device `cpu`.

    Encoding, training, probes and samples take their GPUs here, so that two of them never compute on the same one,
    whether Dagster started them or a person. Dagster's pool `gpu` bounds how many there are. On Ray and Kubernetes a
    step sees only the GPUs that the cluster gave it. Waits while too few are free; `tell` gets a line that says who
    holds them, and `who` is what the others are told of this process. Raises RefusedError where there are not so many.
    """
    known = [] if device == "cpu" else visible_gpus()
    if known and count > len(known):
        raise RefusedError(
            f"{who} asks for {count} GPUs, and there are {len(known)} here: lower `ranks`, or `execution.devices`"
        )
    with ExitStack() as leases:
        yield _collect(leases, known, count, who, tell) if known else []


def _collect(leases: ExitStack, known: list[str], count: int, who: str, tell: Tell) -> list[str]:
    """Lock `count` of the known GPUs. One process at a time collects (docs/decisions/0042)."""
    held: set[str] = set()
    told = ""
    with ExitStack() as turn:
        ahead: str | None = "not asked yet"
        while True:
            ahead = ahead and _lock(turn, "turn", who)
            busy = []
            for name in known if ahead is None else []:
                if name in held or len(held) == (count or len(known)):
                    continue
                if (holder := _lock(leases, name, who)) is None:
                    held.add(name)
                else:
                    busy.append(f"{name} is held by process {holder}")
            if (missing := (count or 1) - len(held)) <= 0:
                return [name for name in known if name in held]
            line = f"waiting for {missing} GPUs: {', '.join(busy)}"
            if ahead:
                line = f"waiting for a GPU behind process {ahead}, which waits too"
            if line != told:
                tell(told := line)
            if orphaned():
                raise RefusedError(f"{who} was waiting for a GPU, and the process that asked for it is gone")
            time.sleep(WATCH_S)


def visible_gpus() -> list[str]:
    """Names of the GPUs that this process may use: from CUDA_VISIBLE_DEVICES, else their numbers."""
    if (listed := os.environ.get(VISIBLE)) is not None:
        return [name.strip() for name in listed.split(",") if name.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def _lock(stack: ExitStack, name: str, who: str) -> str | None:
    """Hold the lock of this name until the stack closes; if another process does, say which."""
    # a local folder, since a home may be shared between machines; another user may have created one of this name
    folder = Path(tempfile.gettempdir(), f"nextvid-devices-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise RefusedError(f"{folder} is not a folder of this user: have it removed, or set TMPDIR to another folder")
    with ExitStack() as attempt:
        holder = attempt.enter_context(locked_or_holder(folder / f"{name.replace('/', '_')}.lock", 0o600, who))
        if holder is None:
            stack.push(attempt.pop_all())
        return holder
