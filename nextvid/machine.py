"""This machine: how work shares its cores and memory, child processes that end with their launcher, leases of GPUs.

- `available_cores`, `workers`, `taken_cores`: how many processes or threads a stage starts (docs/decisions/0052).
- `die_with`: a trainer or encoder ends when the process that started it ends, however that happened.
- `leased_gpus`: each GPU of this machine is used by at most one process of a user at a time, and its children. A lease
  is a lock file per GPU (flock), which the kernel releases when its holder dies.
"""

import ctypes
import math
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

from nextvid.plain_text import printable
from nextvid.stopping import OUTSIDE
from storage.errors import LOST, ConfigError, RefusedError, exit_code
from storage.limits import explained
from storage.locks import locked_or_holder

PR_SET_PDEATHSIG = 1  # linux/prctl.h
WATCH_S = 0.5  # our choice: far below the 10 s within which a cancelled run must have ended
VISIBLE = "CUDA_VISIBLE_DEVICES"
CORES = "NEXTVID_CORES"  # bounds the cores of every process that has it in its environment
CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# A batch's steps in Dagster are processes that know nothing of each other, so each gets a fixed share. 16 lies between
# what a batch of 1,000 files pays for: 2 workers that probe, 40 that decode (nextvid/corpus/media.py and shots.py).
BATCH_CORES = 16
WORKER_BYTES = 1 << 30  # our measurement: 0.35 GB of a process that decodes 1080p, 1.07 GB of one at 4K

Tell = Callable[[str], None]  # shows a line to whoever waits


def available_cores(most: int | None = None) -> int:
    """Cores that this process may use, at least one: by affinity, cgroup quota, NEXTVID_CORES and `most`.

    Half a core counts as one, two and a half as three: processes that wait for a quota still use all of it. Raises
    ConfigError where NEXTVID_CORES is no whole number from 1.
    """
    known = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # not on macOS
    bounds = [known, *([] if most is None else [most])]
    if (asked := os.environ.get(CORES)) is not None:
        if not asked.isdecimal() or int(asked) < 1:
            raise ConfigError(f"{CORES}='{asked}' is no number of cores: set it to 1 or more, or unset it")
        bounds.append(int(asked))
    for group in _cgroups("cpu"):
        quota, period = "max", "100000"
        if (group / "cpu.max").is_file():  # cgroup v2
            quota, period = (group / "cpu.max").read_text().split()
        elif (group / "cpu.cfs_quota_us").is_file():  # cgroup v1, where -1 is no quota
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        if quota.isdecimal():
            bounds.append(math.ceil(int(quota) / int(period)))
    return max(1, min(bounds))


def memory_bytes() -> int:
    """Memory of this machine, or of the container or job that this process is in."""
    bounds = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for group in _cgroups("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):  # cgroup v2, where "max" is no limit, and v1
            if (group / name).is_file() and (limit := (group / name).read_text().strip()).isdecimal():
                bounds.append(int(limit))
    return min(bounds)


def _cgroups(controller: str) -> Iterator[Path]:
    """Folders of this process's control groups for a controller and of those above them, whose limits hold too."""
    for line in OWN_CGROUPS.read_text().splitlines() if OWN_CGROUPS.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = CGROUPS / controllers
        own = top / path.lstrip("/")  # absent in a container that sees its own group as the top
        yield from dict.fromkeys(folder for folder in (own, *own.parents, top) if folder.is_relative_to(top))


def workers(worth: int, cores: int) -> int:
    """Processes for work that is worth starting so many: no more than cores, nor than memory has room for."""
    return max(1, min(worth, cores, memory_bytes() // WORKER_BYTES))


def batches_at_once(cores: int) -> int:
    """Batches that Dagster works on at once on so many cores: each has an equal share (BATCH_CORES)."""
    return max(1, cores // BATCH_CORES)


_TAKEN = threading.Condition()
_taken_cores = 0  # by all threads of this process


@contextmanager
def taken_cores(worth: int, most: int | None = None) -> Iterator[int]:
    """Of this process's cores as many as `workers` says and are free: batches that are made at once share them.

    Waits while fewer than a quarter of the cores are free, so that a batch does not begin, and stay, on the last one.
    """
    global _taken_cores
    cores = available_cores(most)
    wanted = workers(worth, cores)
    least = min(wanted, max(1, cores // 4))
    with _TAKEN:
        _TAKEN.wait_for(lambda: cores - _taken_cores >= least)
        taken = min(wanted, cores - _taken_cores)
        _taken_cores += taken
    try:
        yield taken
    finally:
        with _TAKEN:
            _taken_cores -= taken
            _TAKEN.notify_all()


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


def run_rank(main: Callable[..., None], module: str) -> None:
    """Run the entry point of one rank: an error becomes one line on stderr and the command line's exit code."""
    import tyro

    try:
        tyro.cli(main, prog=f"python -m {module}")
    except Exception as error:
        if (known := explained(error)) is None:
            raise
        sys.stderr.write(printable(f"{known.kind}: {known}\n", keep="\n"))
        sys.exit(exit_code(known))


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
    os._exit(LOST)  # no clean-up: everything on disk is safe against a kill at any moment


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
    holds them, and `who` names this process to the others. Raises RefusedError where there are not so many.
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
    folder = Path(os.environ.get(OUTSIDE) or tempfile.gettempdir(), f"nextvid-devices-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise RefusedError(f"{folder} is not a folder of this user: have it removed, or set TMPDIR to another folder")
    with ExitStack() as attempt:
        holder = attempt.enter_context(locked_or_holder(folder / f"{name.replace('/', '_')}.lock", 0o600, who))
        if holder is None:
            stack.push(attempt.pop_all())
        return holder
