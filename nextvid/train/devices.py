"""Which GPUs of this machine a run gets: each at most once at a time, among all runs of a user.

Holds a lock file a device (flock: freed by the kernel when its holder dies). Dagster's pool `gpu` bounds how many runs
there are; this sees to it that two of them, or one and a run by hand, never train on the same device. Ray and
Kubernetes give out devices themselves: then each job sees its own alone.
"""

import fcntl
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from storage.errors import RefusedError

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
    file = stack.enter_context(os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), "r+"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        return file.read().strip() or "unknown"
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return None
