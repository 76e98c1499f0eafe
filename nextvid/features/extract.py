"""One device's share of files to features: files are probed and decoded ahead while the encoder works.

Decoding is the pipeline's (encode/frames.py): probed, routed and killable. A file that gives no clip is a row with its
reason.

Axes: B clips, F frames, R pixels a side, T tubelets, S cells of one, N = T S tokens, D width.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import polars as pl
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from nextvid.encode.decode_task import Frames
from nextvid.encode.frames import Decoding, PendingRows
from nextvid.encode.pipeline import shares
from nextvid.features.encoder import NExTVidEncoder, load_encoder, read_facts, repeated
from nextvid.features.output import KEPT_BYTES, Output, table_of
from nextvid.features.windows import Windows
from nextvid.video.probe import Inspection
from storage.errors import MediaError

Pool = Literal["mean", "tubelet", "none"]
AHEAD = 8  # files a decoding process that are probed before their turn: our choice, few rows and no frames yet
BATCH = 16  # our choice
# our measurement, one thread, 16 frames at 128 pixels: of 4 a clip takes 7.5 ms, of 16 it takes 13.6 (ViT of 2 blocks,
# width 64), and 103 against 111 (12 blocks, width 192); and the last batch, which nothing runs beside, is shorter
CPU_BATCH = 4
NAMED = 3  # our choice: failures that a summary names; the output has all
KEPT_S = 30.0  # our choice: what a kill may cost


class SourceFile(NamedTuple):
    """A file by its URI, and what changes when its content does."""

    uri: str
    fingerprint: str


@dataclass(frozen=True)
class Asked:
    """How features are computed; all but `batch` decide the vectors."""

    encoder: Path
    windows: Windows
    layer: int = -1
    pool: Pool = "mean"
    precision: Literal["fp32", "bf16"] = "fp32"
    batch: int | None = None  # clips of one forward; `batch_on` says how many by default


@dataclass(frozen=True)
class Counts:
    """What was done since the last report."""

    files: int = 0
    failed: int = 0  # clips, and files without one
    clips: int = 0
    busy_s: float = 0.0  # of the encoder's device
    errors: tuple[str, ...] = ()  # the first of those that failed

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.files + other.files,
            self.failed + other.failed,
            self.clips + other.clips,
            self.busy_s + other.busy_s,
            (self.errors + other.errors)[:NAMED],
        )


class Shown(NamedTuple):
    """One clip decoded, or why not; a file without clips has one of these, without times."""

    file: SourceFile
    times_us: Sequence[int]
    frames: Frames | None
    error: MediaError | None
    last: bool  # of its file


def batch_on(device: str, asked: Asked) -> int:
    """Clips of one forward."""
    return asked.batch or (CPU_BATCH if device == "cpu" else BATCH)


def extract(
    files: Sequence[SourceFile],
    asked: Asked,
    output: Output,
    device: str,
    sharers: int,
    name: str,
    tell: Callable[[Counts], None],
) -> None:
    """Compute and keep the rows of these files on a device, in one of `sharers` equal shares of this machine's cores.

    The copy of a batch's vectors from a GPU is waited for while the next batch is computed.
    """
    workers, threads = shares(device, sharers)
    with Decoding(workers) as decoding, ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(threads)
        found = batches(
            shown(decoding, files, asked.windows, read_facts(asked.encoder).resolution), batch_on(device, asked)
        )
        first = list(islice(found, 1))  # decoding goes on while the weights are read
        encoder = load_encoder(asked.encoder, device)
        keeper, before = _Keeper(output, name), None
        for batch in chain(first, found):
            running = _Running(encoder, asked, batch)
            if before is not None:
                tell(keeper.take(*before.result()))
            before = running
        if before is not None:
            tell(keeper.take(*before.result()))
        keeper.keep()


def shown(decoding: Decoding, files: Sequence[SourceFile], windows: Windows, resolution: int) -> Iterator[Shown]:
    """Every clip of the files, in order."""
    source, most = iter(files), AHEAD * decoding.workers
    probing: deque[tuple[SourceFile, Future[Inspection]]] = deque()
    started: deque[tuple[SourceFile, pl.DataFrame | MediaError, PendingRows | None]] = deque()

    def go_on() -> None:
        """Probe further files, and begin to decode those that are probed: at each clip, so that no decoder waits."""
        while len(probing) + len(started) < most and (file := next(source, None)) is not None:
            probing.append((file, decoding.inspect(file.uri)))
        while probing and (not started or probing[0][1].done()):
            file, probed = probing.popleft()
            try:
                rows = windows.rows(file.uri, probed.result())
                started.append((file, rows, decoding.start(rows, resolution)))
            except MediaError as error:
                started.append((file, error, None))

    while True:
        go_on()
        if not started:
            return
        file, found, pending = started[0]
        if isinstance(found, MediaError) or pending is None:
            assert isinstance(found, MediaError), "rows are on their way"
            yield Shown(file, (), None, found, last=True)
        else:
            for number, (row, times_us) in enumerate(found.select("row_id", "times_us").iter_rows(), start=1):
                one = pending.take([row])[row]
                lost = MediaError(one.reason or "failed", f"{file.uri}: {one.reason}") if one.frames is None else None
                go_on()
                yield Shown(file, times_us, one.frames, lost, last=number == found.height)
        started.popleft()


def batches(clips: Iterator[Shown], size: int) -> Iterator[list[Shown]]:
    """Up to `size` decoded clips at a time, with those between them that failed."""
    batch: list[Shown] = []
    for clip in clips:
        batch.append(clip)
        if sum(one.frames is not None for one in batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def pooled(tokens: Float[Tensor, "B N D"], tubelets: int, pool: Pool) -> Float[Tensor, "B *S D"]:
    """The mean of all tokens, of each tubelet's, or all of them by tubelet and cell; float32."""
    by_tubelet = rearrange(tokens.float(), "B (T S) D -> B T S D", T=tubelets)
    match pool:
        case "mean":
            return by_tubelet.mean(dim=(1, 2))
        case "tubelet":
            return by_tubelet.mean(dim=2)
        case "none":
            return by_tubelet


class _Running:
    """A batch that the encoder works at; on a GPU it is queued, and `result` waits for it."""

    def __init__(self, encoder: NExTVidEncoder, asked: Asked, batch: list[Shown]) -> None:
        self._batch, self._vectors = batch, None
        frames = asked.windows.policy.frames
        stacked = [repeated(clip.frames, frames) for clip in batch if clip.frames is not None]
        self._on_gpu = encoder.mean.is_cuda
        self._began = self._now()
        if stacked:
            clips = torch.from_numpy(np.stack(stacked))
            if self._on_gpu and encoder.encoder.model.encoder.input == "pixels":
                clips = clips.pin_memory().to(encoder.mean.device, non_blocking=True)
            with torch.autocast(encoder.mean.device.type, torch.bfloat16, enabled=asked.precision == "bf16"):
                tokens = encoder(clips, asked.layer)
            self._vectors = pooled(tokens, frames // encoder.encoder.model.tubelet, asked.pool)
        self._ended = self._now()

    def _now(self) -> "torch.cuda.Event | float":
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def result(self) -> tuple[list[Shown], list[np.ndarray], float]:
        """The batch, the vectors of its decoded clips in order, and the seconds that the device worked."""
        vectors = [] if self._vectors is None else list(self._vectors.cpu().numpy())
        if isinstance(self._began, float) and isinstance(self._ended, float):
            return self._batch, vectors, self._ended - self._began
        assert isinstance(self._began, torch.cuda.Event)
        assert isinstance(self._ended, torch.cuda.Event)
        self._ended.synchronize()
        return self._batch, vectors, self._began.elapsed_time(self._ended) / 1000


class _Keeper:
    """Rows on their way to the output's parts; all rows of a file are in one part."""

    def __init__(self, output: Output, name: str) -> None:
        self._output, self._name = output, name
        self._rows: list[dict[str, Any]] = []
        self._vectors: list[np.ndarray] = []
        self._since = time.monotonic()

    def take(self, batch: list[Shown], vectors: list[np.ndarray], busy_s: float) -> Counts:
        """Add a batch, and keep what is complete once it is large or old enough."""
        source, counts = iter(vectors), Counts(busy_s=busy_s)
        for clip in batch:
            file, times_us, error = clip.file, clip.times_us, clip.error
            if error is None:
                self._vectors.append(next(source))
            self._rows.append(
                {
                    "path": file.uri,
                    "start_us": times_us[0] if times_us else None,
                    "end_us": times_us[-1] if times_us else None,
                    "status": "ok" if error is None else "quarantined",
                    "reason": None if error is None else error.reason,
                    "error": None if error is None else str(error),
                    "fingerprint": file.fingerprint,
                }
            )
            told = () if error is None else (f"{error.reason}: {error}",)
            counts += Counts(int(clip.last), int(error is not None), int(error is None), errors=told)
            large = sum(vector.nbytes for vector in self._vectors[:1]) * len(self._vectors) >= KEPT_BYTES
            if clip.last and (large or time.monotonic() - self._since > KEPT_S):
                self.keep()
        return counts

    def keep(self) -> None:
        """Write a part."""
        if self._rows:
            self._output.add(table_of(self._output, self._rows, self._vectors), self._name)
        self._rows, self._vectors, self._since = [], [], time.monotonic()
