"""Rows of the clips table to frames: one pass over each file, in killable processes, a bounded number of bytes ahead.

What runs inside the sandbox is decode_task.py. A row's frames are a function of its file and times, whatever is decoded
with it: where a pass fails, each of its rows is decoded alone, and what decord cannot read, PyAV tries. Never the other
way round: decord reads some damaged files wrongly and without an error.

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

from nextvid.encode.decode_task import READ_BYTES_PER_S, CropBox, Frames, RequestedRow, Task, decode
from nextvid.video.fetch import local_file
from nextvid.video.probe import Inspection, inspect_file
from nextvid.video.sandbox import START_S, Sandbox
from storage.errors import MediaError

TASK_BYTES = 1 << 27  # of frames that one task may return: 42 clips of 16 frames at 256 pixels
TASKS_AHEAD = 2  # of TASK_BYTES a process: one is decoded while another waits to be taken
OF_THE_FILE = frozenset({"missing", "changed", "unreachable"})  # reasons for which another decoder is no help
OF_THE_MACHINE = frozenset({"timeout", "memory", "crashed"})  # reasons that another day may not have

Decoded = tuple[list[Frames], float]  # the frames of each row of a task, and the seconds they took


@dataclass(frozen=True)
class DecodedRow:
    """One row decoded, or the reason why not."""

    frames: Frames | None
    decode_s: float  # its share of its task
    reason: str | None = None


@dataclass
class Job:
    """One task on one file, and its result to come once it was begun."""

    uri: str
    task: Task
    future: "Future[Decoded] | None" = field(default=None, repr=False)

    @property
    def size_bytes(self) -> int:
        """Bytes of the frames of all rows."""
        return sum(self.row_bytes(row) for row in self.task.rows)

    def row_bytes(self, row: RequestedRow) -> int:
        """Bytes of the frames of one row."""
        return len(row.times_us) * self.task.resolution**2 * 3


class Decoding:
    """Processes that decode rows in the order in which they were asked for; use as a context manager, from any thread.

    A job begins only while fewer than `bound_bytes` of frames are begun and not yet taken, or when its rows are waited
    for: memory is bounded whatever the corpus holds, and the slower side sets the pace.
    """

    def __init__(self, workers: int, bound_bytes: int | None = None) -> None:
        self.workers = workers
        self._sandbox = Sandbox(workers)
        for _ in range(workers):  # started now, while the caller loads its model
            self._sandbox.submit(os.getpid, timeout_s=START_S)
        # twice the processes: a remote file is copied while another is decoded
        self._threads = ThreadPoolExecutor(2 * workers, thread_name_prefix="decoding")
        self._lock = threading.Lock()
        self._waiting: deque[Job] = deque()
        self._bound_bytes = TASKS_AHEAD * workers * TASK_BYTES if bound_bytes is None else bound_bytes
        self._held_bytes = 0

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

    def start(self, rows: pl.DataFrame, resolution: int) -> "PendingRows":
        """Ask for rows of schema Clips, behind those asked for before."""
        asked = jobs_by_file(rows, resolution)
        with self._lock:
            self._waiting.extend(asked)
        self.begin()
        return PendingRows(self, asked)

    def begin(self, wanted: Job | None = None) -> None:
        """Begin what the bound allows, and all jobs up to `wanted`, whose rows are waited for."""
        with self._lock:
            while self._waiting and (
                self._held_bytes < self._bound_bytes or (wanted is not None and wanted.future is None)
            ):
                job = self._waiting.popleft()
                self._held_bytes += job.size_bytes
                job.future = self.submit(job)

    def submit(self, job: Job) -> "Future[Decoded]":
        """Begin one job at once, outside the bound."""
        return self._threads.submit(self._run, job.uri, job.task)

    def inspect(self, uri: str) -> "Future[Inspection]":
        """Digest and facts of a file, behind what was begun before; a MediaError where it has none."""
        return self._threads.submit(self._inspect, uri)

    def forget(self, jobs: Iterable[Job]) -> None:
        """Cancel those of these jobs that have not begun."""
        gone = {id(job) for job in jobs}
        with self._lock:
            self._waiting = deque(job for job in self._waiting if id(job) not in gone)

    def release(self, size_bytes: int) -> None:
        """Frames of so many bytes were taken."""
        with self._lock:
            self._held_bytes -= size_bytes
        self.begin()

    def _run(self, uri: str, task: Task) -> Decoded:
        with tempfile.TemporaryDirectory(prefix="nextvid-") as folder, local_file(uri, Path(folder)) as path:
            size_bytes = path.stat().st_size if path.exists() else 0  # a missing file is the task's own error
            return self._sandbox.call(decode, replace(task, path=path), timeout_s=task.timeout_s(size_bytes))

    def _inspect(self, uri: str) -> Inspection:
        with tempfile.TemporaryDirectory(prefix="nextvid-") as folder, local_file(uri, Path(folder)) as path:
            size_bytes = path.stat().st_size if path.exists() else 0
            found = self._sandbox.call(inspect_file, path, timeout_s=START_S + size_bytes / READ_BYTES_PER_S)
            if found.facts is None:
                raise MediaError(found.reason or "failed", found.error or f"{path}: unreadable")
            return found


class PendingRows:
    """Rows on their way; each is taken once, by one thread."""

    def __init__(self, decoding: Decoding, jobs: Sequence[Job]) -> None:
        self._decoding = decoding
        self._jobs = {row.row_id: (job, row) for job in jobs for row in job.task.rows}
        self._seen: dict[bytes, DecodedRow] = {}

    def __contains__(self, row: bytes) -> bool:
        """Whether it was asked for and not yet taken."""
        return row in self._jobs

    def take(self, row_ids: Iterable[bytes]) -> dict[bytes, DecodedRow]:
        """Wait for these rows, in any order; those that were not asked for are left out."""
        taken = {}
        for row in row_ids:
            if row not in self._jobs:
                continue
            job, requested = self._jobs.pop(row)
            if row not in self._seen:
                self._seen |= self._settled(job)
            taken[row] = self._seen.pop(row)
            self._decoding.release(job.row_bytes(requested))
        return taken

    def collect(self) -> dict[bytes, DecodedRow]:
        """Every row that was not taken yet."""
        return self.take(list(self._jobs))

    def drop(self) -> None:
        """No row of these will be taken any more."""
        left = [self._jobs.pop(row) for row in list(self._jobs)]
        self._decoding.forget(job for job, _ in left)
        self._decoding.release(sum(job.row_bytes(row) for job, row in left if job.future is not None))

    def _settled(self, job: Job) -> dict[bytes, DecodedRow]:
        """All rows of a job. Those of a failed one are tried again, each alone, so that one changes no other."""
        self._decoding.begin(job)
        assert job.future is not None, "begin starts every job up to this one"
        try:
            return _shares(job.task, *job.future.result())
        except MediaError as error:
            if error.reason in OF_THE_FILE:
                return {row.row_id: DecodedRow(None, 0.0, error.reason) for row in job.task.rows}
        first, decord = job.task.decoder, job.task.decoder == "decord"
        decoders = dict.fromkeys(
            [first, "pyav"] if decord and len(job.task.rows) > 1 else ["pyav" if decord else first]
        )
        seen: dict[bytes, DecodedRow] = {}
        for decoder in decoders:
            left = [row for row in job.task.rows if row.row_id not in seen or seen[row.row_id].frames is None]
            alone = [Job(job.uri, replace(job.task, decoder=decoder, rows=(row,))) for row in left]
            for one, future in [(one, self._decoding.submit(one)) for one in alone]:
                try:
                    seen |= _shares(one.task, *future.result())
                except MediaError as error:
                    seen |= {row.row_id: DecodedRow(None, 0.0, error.reason) for row in one.task.rows}
        return seen


def jobs_by_file(rows: pl.DataFrame, resolution: int) -> list[Job]:
    """Rows of schema Clips grouped by file, each group cut so that a task returns at most TASK_BYTES."""
    found = []
    for group in rows.partition_by("uri", "media_id", "decoder", maintain_order=True):
        asked = [
            RequestedRow(
                row["row_id"], tuple(row["times_us"]), CropBox(*(row[f"crop_{e}"] for e in "xywh")), row["flip"]
            )
            for row in group.iter_rows(named=True)
        ]
        first = group.row(0, named=True)
        most = max(1, TASK_BYTES // (max(len(row.times_us) for row in asked) * resolution**2 * 3))
        for at in range(0, len(asked), most):
            some = tuple(asked[at : at + most])
            task = Task(Path(), first["media_id"], first["decoder"], resolution, some)  # the path comes with the copy
            found.append(Job(first["uri"], task))
    return found


def _shares(task: Task, frames: Sequence[Frames], seconds: float) -> dict[bytes, DecodedRow]:
    share = seconds / len(task.rows)
    return {row.row_id: DecodedRow(one, share) for row, one in zip(task.rows, frames, strict=True)}
