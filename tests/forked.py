"""Processes to be killed, there at once: a parent that has imported everything forks one for each call.

A start costs milliseconds instead of seconds, so that hundreds of kills fit a test and the moment of a kill falls into
the work, not into imports. The parent only imports: what keeps threads (polars' pool, torch's, zarr's loop) begins in
the children. A child leads a process group of its own, by which those that it started are found.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

ENDS_WITHIN_S = 60.0  # orphans of a killed child notice within a second alone

# A line of JSON in: module, function, arguments. Out: the child's id and, after an empty line in, its status. It is
# collected only then, so that nobody else gets its id meanwhile. What a child prints it is asked to write elsewhere.
PARENT = """
import importlib, json, os, sys, traceback
for name in sys.argv[1:]:
    importlib.import_module(name)
print("ready", flush=True)
while line := sys.stdin.readline():
    module, function, arguments = json.loads(line)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setpgid(0, 0)
            getattr(importlib.import_module(module), function)(*arguments)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    print(pid, flush=True)
    sys.stdin.readline()
    print(os.waitpid(pid, 0)[1], flush=True)
"""


class Forks:
    """The parent of children, one at a time; `parent_of` starts and ends it."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self._child = 0

    def start(self, module: str, function: str, *arguments: str | int | float) -> None:
        """Have a child call a function by its name."""
        self._child = int(self._ask(json.dumps([module, function, arguments])))

    def kill(self) -> None:
        """SIGKILL to the child alone, whatever it is doing; what it started learns it by itself."""
        os.kill(self._child, signal.SIGKILL)

    def ended(self) -> int:
        """0 where the child came to its end, minus the signal where one killed it; waits, for its orphans too."""
        status = os.waitstatus_to_exitcode(int(self._ask("")))
        until = time.monotonic() + ENDS_WITHIN_S
        while _living(self._child):
            if time.monotonic() > until:
                os.killpg(self._child, signal.SIGKILL)
                raise AssertionError(f"processes that a killed one had started ran on for {ENDS_WITHIN_S:.0f} s")
            time.sleep(0.005)
        return status

    def call(self, module: str, function: str, *arguments: str | int | float) -> float:
        """Have a child call a function to its end; the seconds it took."""
        began = time.monotonic()
        self.start(module, function, *arguments)
        status = self.ended()
        assert status == 0, f"{function} ended with {status}"
        return time.monotonic() - began

    def _ask(self, line: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the parent of the children died"
        return answer


def alive(pid: int) -> bool:
    """Whether a process runs; a dead one may wait to be collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return False


def _living(group: int) -> bool:
    """Whether a process of the group runs; the dead may wait for a second until somebody collects them."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # ended meanwhile
            state, _, found, *_ = stat.read_text().rpartition(")")[2].split()
            if int(found) == group and state not in "ZX":
                return True
    return False


@contextmanager
def parent_of(repository: Path, modules: Sequence[str]) -> Iterator[Forks]:
    """A parent that has imported these modules, ended with the block."""
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # no threads before a fork
    command = [sys.executable, "-c", PARENT, *modules]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=repository, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield Forks(process)
        assert process.stdin is not None
        process.stdin.close()
