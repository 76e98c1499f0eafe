"""Pixels beside latents: frames that were decoded for the autoencoder become JPEGs under the same row ids.

In the pass that makes the latents, each of their shards has its twin, compressed by threads while the autoencoder
works. What has none afterwards (pixels were asked for later, a writer died in between) is decoded for itself; latents
are never touched. A row that cannot be decoded is a row with a reason here too. Which rows lack pixels: plan.py.
"""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
import polars as pl

from nextvid.config.project import Project
from nextvid.encode.frames import Decoding, Seen
from nextvid.encode.plan import PixelPlan, plan_pixels
from nextvid.encode.roundtrip import psnr
from nextvid.encode.shard import NOT_WANTED
from nextvid.making.outcome import Check, Number
from storage.errors import ConflictError
from storage.jpeg import decode_clip, encode_clip
from storage.latents import LatentPart
from storage.pixels import PixelPart, PixelSpec, PixelStore
from storage.schemas import PixelCommits

MEASURED = 4  # rows of a shard whose JPEGs are compared with their frames: as many as make the round trip of latents
WAITING = 64  # clips that wait for a thread: 200 MB at 16 frames of 256 pixels; who decodes faster waits

Take = Callable[[list[bytes]], Mapping[bytes, Seen]]


@dataclass(frozen=True)
class _Compressed:
    """One row: its chunk, or the reason why there is none."""

    chunk: bytes | None
    reason: str | None
    psnr_db: float | None
    encode_s: float


class PixelWriter:
    """Writes one batch's pixels, or does nothing where there is no spec; use as a context manager."""

    def __init__(self, project: Project, batch: str, spec: PixelSpec | None, workers: int) -> None:
        self._project, self._batch, self._spec, self._workers = project, batch, spec, workers
        self._threads = ThreadPoolExecutor(workers, "jpeg")
        self._failed: set[bytes] = set()  # in this call; they wait for the next one
        self.written = 0
        if spec is not None:
            self._store = PixelStore(project.root, spec)
            self._store.create()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown(cancel_futures=kind is not None)

    def plan(self) -> PixelPlan | None:
        """What the batch lacks now; None where corpus.yaml asks for no pixels."""
        return None if self._spec is None else plan_pixels(self._project, self._batch, self._spec)

    def beside(self, latents: LatentPart, number: int, take: Take) -> "PixelShard":
        """The twin of a shard of latents, whose rows `take` gives; not written where it stands or has no place."""
        part = None if self._spec is None else self._twin(latents)
        return PixelShard(self, None if part is None or part.committed(number) else part, number, take)

    def rest(self) -> None:
        """Decode and write what has no pixels yet: unfinished parts first, then a new one a clip length."""
        plan = self.plan()
        known = [] if plan is None else sorted({*plan.by_frames, *self._store.frames_of(self._batch)})
        lengths = [frames for frames in known if self._next(frames) is not None]
        if not lengths:
            return
        with Decoding(self._workers) as decoding:
            for frames in lengths:
                while (part := self._next(frames)) is not None:
                    for number in (number for number in range(part.shards) if not part.committed(number)):
                        self._shard(part, number, decoding)

    def compress(self, spec: PixelSpec, seen: Seen, measure: bool) -> "Future[_Compressed]":
        """Begin to compress a row's frames."""
        return self._threads.submit(_compress, seen, spec, measure)

    def publish(self, part: PixelPart, number: int, rows: Mapping[bytes, _Compressed]) -> None:
        """Write a shard whose rows are all there. One that another writer committed meanwhile is theirs."""
        planned = part.rows_of(number)
        ordered = [rows[row] for row in planned["row_id"].to_list()]
        try:
            part.write_shard(number, [row.chunk for row in ordered], _commits(planned, ordered))
        except ConflictError:
            return
        self._failed |= {row for row, found in rows.items() if found.chunk is None}
        self.written += len(rows)

    def _twin(self, latents: LatentPart) -> PixelPart | None:
        """The part with the same plan; a new one where none of its rows has a place yet."""
        for _ in range(2):
            taken: set[bytes] = set()
            for number in self._store.parts(self._batch, latents.frames):
                part = self._store.part(self._batch, latents.frames, number)
                if part.plan.equals(latents.plan):
                    return part
                taken |= set(part.plan["row_id"].to_list())
            ids = latents.plan["row_id"].to_list()
            if not taken.isdisjoint(ids):
                return None
            try:
                return self._store.plan_part(self._batch, latents.frames, ids)
            except ConflictError:
                continue  # somebody planned at the same moment: most likely the very same
        return None

    def _next(self, frames: int) -> PixelPart | None:
        part = self._store.unfinished(self._batch, frames)
        if part is not None:
            return part
        missing = self._missing().filter(pl.col("frames") == frames)["row_id"].to_list()
        ids = [row for row in missing if row not in self._failed]
        if not ids:
            return None
        try:
            return self._store.plan_part(self._batch, frames, ids)
        except ConflictError:
            return self._next(frames)  # somebody planned it first: help with theirs

    def _missing(self) -> pl.DataFrame:
        plan = self.plan()
        assert plan is not None, "a writer without a spec was asked to write"
        return plan.rows

    def _shard(self, part: PixelPart, number: int, decoding: Decoding) -> None:
        ids = part.rows_of(number).select("row_id")
        clips = ids.join(self._missing(), on="row_id", how="inner", maintain_order="left")
        shard = PixelShard(self, part, number, decoding.start(clips, part.spec.resolution).take)
        for row in ids["row_id"].to_list():
            shard.take([row])
        shard.finish()


class PixelShard:
    """One shard on its way: sees the frames of its rows as somebody takes them, and keeps them as JPEGs."""

    def __init__(self, writer: PixelWriter, part: PixelPart | None, number: int, take: Take) -> None:
        self._writer, self._part, self._number, self._take = writer, part, number, take
        ids = [] if part is None else part.rows_of(number)["row_id"].to_list()
        self._measured = frozenset(sorted(ids)[:MEASURED])
        self._coming: dict[bytes, Future[_Compressed]] = {}

    def take(self, row_ids: list[bytes]) -> Mapping[bytes, Seen]:
        """The same rows as without pixels."""
        seen = self._take(row_ids)
        if self._part is not None:
            for row in row_ids:
                one = seen.get(row, Seen(None, 0.0, NOT_WANTED))
                self._coming[row] = self._writer.compress(self._part.spec, one, row in self._measured)
            waiting = [future for future in self._coming.values() if not future.done()]
            for future in waiting[:-WAITING]:
                future.result()
        return seen

    def finish(self) -> None:
        """Write the shard, all of whose rows were taken."""
        if self._part is not None:
            self._writer.publish(self._part, self._number, {row: f.result() for row, f in self._coming.items()})


def pixel_check(plan: PixelPlan | None) -> Check:
    """Whether every wanted row has pixels where corpus.yaml asks for them. Latents are read without them."""
    if plan is None:
        return Check("pixels", True, {}, blocking=False, description="corpus.yaml asks for no pixels")
    good = plan.commits.filter(pl.col("status") == "ok")
    failed = plan.commits.height - good.height
    missing = plan.rows.height - failed
    numbers: dict[str, Number] = {"spec": plan.spec.digest(), "rows": good.height, "failed": failed, "missing": missing}
    numbers["size_bytes"] = int(good["size_bytes"].sum())
    measured = good["psnr_db"].drop_nulls().to_numpy()
    if len(measured):
        numbers |= {"psnr_mean_db": float(measured.mean()), "psnr_min_db": float(measured.min())}
        numbers["psnr_rows"] = len(measured)
    return Check("pixels", missing == 0, numbers, blocking=False)


def _compress(seen: Seen, spec: PixelSpec, measure: bool) -> _Compressed:
    if seen.frames is None:
        return _Compressed(None, seen.reason, None, 0.0)
    began = time.perf_counter()
    chunk = encode_clip(seen.frames, spec.quality, spec.subsampling)
    seconds = time.perf_counter() - began
    if not measure:
        return _Compressed(chunk, None, None, seconds)
    again = np.empty_like(seen.frames)
    decode_clip(chunk, again)
    return _Compressed(chunk, None, psnr(again, seen.frames), seconds)


def _commits(planned: pl.DataFrame, rows: list[_Compressed]) -> pl.DataFrame:
    """Rows of schema PixelCommits; places and checksums are the store's, which measures what it writes."""
    status = {None: "ok", NOT_WANTED: "rejected"}
    columns = {
        "status": [status.get(row.reason, "quarantined") for row in rows],
        "reason": [row.reason for row in rows],
        "offset": [None] * len(rows),
        "size_bytes": [None] * len(rows),
        "crc32c": [None] * len(rows),
        "psnr_db": [row.psnr_db for row in rows],
        "encode_s": [row.encode_s for row in rows],
    }
    return pl.DataFrame({**planned.to_dict(), **columns}, schema_overrides=PixelCommits.create_empty().schema)
