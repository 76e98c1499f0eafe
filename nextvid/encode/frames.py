"""Rows of the clips table to frames: one pass over each file, in killable processes, as many rows a pass as fit.

Holds which task decodes which rows, the copy of a remote file, and the retry; what runs inside the sandbox is looks.py.
Every retry goes to PyAV, never to decord: decord reads hazardous files wrongly and without an error (research video 4).

Axes: F frames, R pixels a side.
"""

import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import polars as pl

from nextvid.corpus.fetch import local_file
from nextvid.encode.looks import Look, Task, View, decode
from nextvid.encode.views import CropBox
from nextvid.video.sandbox import Sandbox
from storage.errors import MediaError

TASK_BYTES = 1 << 28  # frames that one task may return: 85 clips of 16 frames at 256 pixels

Decoded = tuple[list[View], float]  # views of a task's looks, and the seconds they took
Asked = tuple[str, Task]  # URI of the file, and what is asked of it


@dataclass(frozen=True)
class Seen:
    """One row decoded, or the reason why not."""

    frames: View | None
    decode_s: float  # its share of its task
    reason: str | None = None


class Decoding:
    """Processes that decode rows; use as a context manager."""

    def __init__(self, workers: int) -> None:
        self._sandbox = Sandbox(workers)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="decoding")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._sandbox.close()

    def start(self, rows: pl.DataFrame, resolution: int) -> "Rows":
        """Begin to decode rows of schema Clips, behind those begun before."""
        return Rows(self, asked(rows, resolution))

    def submit(self, what: Asked) -> "Future[Decoded]":
        """Begin one task."""
        return self._threads.submit(self._run, *what)

    def _run(self, uri: str, task: Task) -> Decoded:
        with tempfile.TemporaryDirectory(prefix="nextvid-") as folder, local_file(uri, Path(folder)) as path:
            size_bytes = path.stat().st_size if path.exists() else 0  # a missing file is the task's own error
            return self._sandbox.call(decode, replace(task, path=path), timeout_s=task.timeout_s(size_bytes))


class Rows:
    """Rows on their way; `collect` waits for them, once."""

    def __init__(self, decoding: Decoding, what: list[Asked]) -> None:
        self._decoding = decoding
        self._running = [(one, decoding.submit(one)) for one in what]

    def collect(self) -> dict[bytes, Seen]:
        """Every row by its id. Rows of a failed task are tried once more, each alone: one spoils no other."""
        seen: dict[bytes, Seen] = {}
        again: list[tuple[Asked, Future[Decoded]]] = []
        for one, future in self._running:
            try:
                seen |= _shares(one[1], *future.result())
            except MediaError:
                again += [(alone, self._decoding.submit(alone)) for alone in _alone(one)]
        for one, future in again:
            try:
                seen |= _shares(one[1], *future.result())
            except MediaError as error:
                seen |= {look.row_id: Seen(None, 0.0, error.reason) for look in one[1].looks}
        return seen


def asked(rows: pl.DataFrame, resolution: int) -> list[Asked]:
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
            found.append((first["uri"], task))
    return found


def _shares(task: Task, views: Sequence[View], seconds: float) -> dict[bytes, Seen]:
    share = seconds / len(task.looks)
    return {look.row_id: Seen(frames, share) for look, frames in zip(task.looks, views, strict=True)}


def _alone(one: Asked) -> list[Asked]:
    uri, task = one
    decoder = task.decoder if task.decoder == "pillow" else "pyav"
    return [(uri, replace(task, decoder=decoder, looks=(look,))) for look in task.looks]
