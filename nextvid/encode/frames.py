"""Rows of the clips table to frames: one pass over each file, in killable processes, a bounded number of bytes ahead.

Holds which task decodes which rows, how far decoding runs ahead of whoever takes the rows, the copy of a remote file,
and the retry; what runs inside the sandbox is decode_task.py. Every retry goes to PyAV, never to decord: decord reads
hazardous files wrongly and without an error (research video 4).

Axes: F frames, R pixels a side.
"""

import os
import tempfile
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import polars as pl

from nextvid.encode.decode_task import CropBox, Look, Task, View, decode
from nextvid.video.fetch import local_file
from nextvid.video.sandbox import START_S, Sandbox
from storage.errors import MediaError

TASK_BYTES = 1 << 27  # frames that one task may return: 42 clips of 16 frames at 256 pixels
TASKS_AHEAD = 2  # of TASK_BYTES a process: one is decoded while another waits to be taken
OF_THE_FILE = frozenset({"missing", "changed", "unreachable"})  # reasons that no other decoder mends

Decoded = tuple[list[View], float]  # views of a task's looks, and the seconds they took


@dataclass(frozen=True)
class Seen:
    """One row decoded, or the reason why not."""

    frames: View | None
    decode_s: float  # its share of its task
    reason: str | None = None


@dataclass
class Job:
    """What is asked of one file, and, once it was begun, its result to come."""

    uri: str
    task: Task
    future: "Future[Decoded] | None" = field(default=None, repr=False)

    @property
    def size_bytes(self) -> int:
        """Of all views together."""
        return sum(self.row_bytes(look) for look in self.task.looks)

    def row_bytes(self, look: Look) -> int:
        return len(look.times_us) * self.task.resolution**2 * 3


class Decoding:
    """Processes that decode rows in the order in which they were asked for; use as a context manager, from any thread.

    A job begins only while less than `bound_bytes` of views are begun and not yet taken, or when somebody waits for it:
    memory stays bounded whatever the corpus holds, and who is slower decides the pace.
    """

    def __init__(self, workers: int, bound_bytes: int | None = None) -> None:
        self._sandbox = Sandbox(workers)
        for _ in range(workers):  # started now, while the caller loads its model
            self._sandbox.submit(os.getpid, timeout_s=START_S)
        # twice the processes: a remote file is copied while another is decoded
        self._threads = ThreadPoolExecutor(2 * workers, thread_name_prefix="decoding")
        self._lock = threading.Lock()
        self._waiting: deque[Job] = deque()
        self._bound_bytes = TASKS_AHEAD * workers * TASK_BYTES if bound_bytes is None else bound_bytes
        self._held_bytes = 0
        self.peak_bytes = 0  # most that was ever held

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._waiting.clear()
        if kind is not None:
            self._sandbox.close(kill=True)
        self._threads.shutdown(cancel_futures=True)
        self._sandbox.close()

    def start(self, rows: pl.DataFrame, resolution: int) -> "Rows":
        """Ask for rows of schema Clips, behind those asked for before."""
        jobs = jobs_of(rows, resolution)
        with self._lock:
            self._waiting.extend(jobs)
        self.begin()
        return Rows(self, jobs)

    def begin(self, wanted: Job | None = None) -> None:
        """Begin what the bound allows, and all jobs up to `wanted`, which somebody waits for."""
        with self._lock:
            while self._waiting and (
                self._held_bytes < self._bound_bytes or (wanted is not None and wanted.future is None)
            ):
                job = self._waiting.popleft()
                self._held_bytes += job.size_bytes
                self.peak_bytes = max(self.peak_bytes, self._held_bytes)
                job.future = self.submit(job)

    def submit(self, job: Job) -> "Future[Decoded]":
        """Begin one job at once, outside the bound."""
        return self._threads.submit(self._run, job.uri, job.task)

    def forget(self, jobs: Iterable[Job]) -> None:
        """What of these has not begun never will."""
        gone = {id(job) for job in jobs}
        with self._lock:
            self._waiting = deque(job for job in self._waiting if id(job) not in gone)

    def release(self, size_bytes: int) -> None:
        """Views of so many bytes were taken."""
        with self._lock:
            self._held_bytes -= size_bytes
        self.begin()

    def _run(self, uri: str, task: Task) -> Decoded:
        with tempfile.TemporaryDirectory(prefix="nextvid-") as folder, local_file(uri, Path(folder)) as path:
            size_bytes = path.stat().st_size if path.exists() else 0  # a missing file is the task's own error
            return self._sandbox.call(decode, replace(task, path=path), timeout_s=task.timeout_s(size_bytes))


class Rows:
    """Rows on their way; each is taken once, by one thread."""

    def __init__(self, decoding: Decoding, jobs: Sequence[Job]) -> None:
        self._decoding = decoding
        self._jobs = {look.row_id: (job, look) for job in jobs for look in job.task.looks}
        self._seen: dict[bytes, Seen] = {}

    def __contains__(self, row: bytes) -> bool:
        """Whether it was asked for and not yet taken."""
        return row in self._jobs

    def take(self, row_ids: Iterable[bytes]) -> dict[bytes, Seen]:
        """Wait for these rows, in any order; those that were not asked for are left out."""
        taken = {}
        for row in row_ids:
            if row not in self._jobs:
                continue
            job, look = self._jobs.pop(row)
            if row not in self._seen:
                self._seen |= self._settled(job)
            taken[row] = self._seen.pop(row)
            self._decoding.release(job.row_bytes(look))
        return taken

    def collect(self) -> dict[bytes, Seen]:
        """Every row that was not taken yet."""
        return self.take(list(self._jobs))

    def drop(self) -> None:
        """No row of these will be taken any more."""
        left = [self._jobs.pop(row) for row in list(self._jobs)]
        self._decoding.forget(job for job, _ in left)
        self._decoding.release(sum(job.row_bytes(look) for job, look in left if job.future is not None))

    def _settled(self, job: Job) -> dict[bytes, Seen]:
        """All rows of a job. Those of a failed one are tried once more, each alone: one spoils no other."""
        self._decoding.begin(job)
        assert job.future is not None, "begin starts every job up to this one"
        try:
            return _shares(job.task, *job.future.result())
        except MediaError as error:
            if error.reason in OF_THE_FILE:
                return {look.row_id: Seen(None, 0.0, error.reason) for look in job.task.looks}
        seen: dict[bytes, Seen] = {}
        again = [(alone, self._decoding.submit(alone)) for alone in _alone(job)]
        for alone, future in again:
            try:
                seen |= _shares(alone.task, *future.result())
            except MediaError as error:
                seen |= {look.row_id: Seen(None, 0.0, error.reason) for look in alone.task.looks}
        return seen


def jobs_of(rows: pl.DataFrame, resolution: int) -> list[Job]:
    """Rows of schema Clips grouped by file, each group cut so that a task returns at most TASK_BYTES."""
    found = []
    for group in rows.partition_by("uri", "media_id", "decoder", maintain_order=True):
        looks = [
            Look(row["row_id"], tuple(row["times_us"]), CropBox(*(row[f"crop_{e}"] for e in "xywh")), row["flip"])
            for row in group.iter_rows(named=True)
        ]
        first = group.row(0, named=True)
        most = max(1, TASK_BYTES // (max(len(look.times_us) for look in looks) * resolution**2 * 3))
        for at in range(0, len(looks), most):
            some = tuple(looks[at : at + most])
            task = Task(Path(), first["media_id"], first["decoder"], resolution, some)  # the path comes with the copy
            found.append(Job(first["uri"], task))
    return found


def _shares(task: Task, views: Sequence[View], seconds: float) -> dict[bytes, Seen]:
    share = seconds / len(task.looks)
    return {look.row_id: Seen(frames, share) for look, frames in zip(task.looks, views, strict=True)}


def _alone(job: Job) -> list[Job]:
    decoder = job.task.decoder if job.task.decoder == "pillow" else "pyav"
    return [Job(job.uri, replace(job.task, decoder=decoder, looks=(look,))) for look in job.task.looks]
