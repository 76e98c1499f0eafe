"""What the benchmarks share: time and CPU time of a piece of work, a cold page cache, tables and the JSON file.

Shared machines swing by a factor of two within minutes, so arms are measured in turns and only ratios inside
one turn are compared; a median over turns is what is printed.
"""

import ctypes
import mmap
import multiprocessing
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from storage.atomic import publish_json

T = TypeVar("T")


@dataclass(frozen=True)
class Took:
    """Seconds by the wall clock, and of CPU in this process and its children, workers that live on included."""

    wall_s: float
    cpu_s: float


def timed(work: Callable[[], None]) -> Took:
    """Run a piece of work once."""
    cpu_before, before = _cpu_s(), time.perf_counter()
    work()
    return Took(time.perf_counter() - before, _cpu_s() - cpu_before)


def evict(folder: Path) -> float:
    """Drop the folder's files from the page cache; the share of their pages that stayed, since somebody maps them.

    What is below a virtual disk may be warm all the same.
    """
    pages = stayed = 0
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_size:
            with path.open("rb") as file:
                os.fsync(file.fileno())  # dirty pages cannot be dropped
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
                    resident = _resident(memory)
            pages += len(resident)
            stayed += int(resident.sum())
    return stayed / max(1, pages)


def _resident(memory: mmap.mmap) -> np.ndarray:
    """Whether each page of a file is in the page cache: mincore(2), which Python does not offer."""
    libc = ctypes.CDLL(None, use_errno=True)
    found = np.zeros(-(-len(memory) // mmap.PAGESIZE), np.uint8)
    data = np.frombuffer(memory, np.uint8)
    start, length = ctypes.c_void_p(data.ctypes.data), ctypes.c_size_t(len(memory))
    if libc.mincore(start, length, ctypes.c_void_p(found.ctypes.data)):
        raise OSError(ctypes.get_errno(), "mincore failed")
    return found & 1


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Median over turns of above / below within a turn."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def machine() -> dict[str, Any]:
    """What a reader of a figure has to know of the machine; `load` says whether it was shared."""
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "load_1min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "processor": platform.machine(),
        "date": time.strftime("%Y-%m-%d"),
    }


def show(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table: text to the left, numbers to the right with three digits that count."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=index == 0)  # names stay whole
    for row in rows:
        table.add_row(
            *(f"{cell:.3g}" if isinstance(cell, float) and cell < 1000 else escape(_plain(cell)) for cell in row)
        )
    Console(width=max(100, Console().width)).print(table)


def shown(items: Sequence[T], title: str) -> Iterable[T]:
    """The items one by one, with a bar on stderr where that is a terminal."""
    console = Console(stderr=True)
    return track(items, title, console=console, transient=True, disable=not console.is_terminal)


def write(path: Path | None, found: Mapping[str, Any]) -> None:
    """Write the JSON file, if one was asked for."""
    if path is not None:
        publish_json(str(path), found)


def _plain(cell: object) -> str:
    return f"{cell:.0f}" if isinstance(cell, float) else "-" if cell is None else str(cell)


def _cpu_s() -> float:
    living = sum(_cpu_s_of(child.pid) for child in multiprocessing.active_children() if child.pid is not None)
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime + living


def _cpu_s_of(process: int) -> float:
    """User and system seconds of proc(5), fields 14 and 15; the second ends with the last bracket."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
