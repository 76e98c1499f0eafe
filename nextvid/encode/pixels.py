"""Pixels beside latents: frames that were decoded for the autoencoder are kept as JPEGs under the same row ids.

In the pass that makes the latents, each shard of them has a twin of pixels, compressed by threads while the autoencoder
works. Rows that have no pixels afterwards (pixels were asked for later, a writer died in between) are decoded once
more; latents are never touched. A row that cannot be decoded is a row with a reason here too.
"""

import time
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from types import TracebackType
from typing import Self

import numpy as np
import polars as pl

from nextvid.config.project import Project
from nextvid.encode.frames import DecodedRow, Decoding
from nextvid.encode.plan import BatchPlan, committing, open_parts, plan_batch, usable_clips
from nextvid.encode.roundtrip import psnr_db
from nextvid.encode.shard import NOT_WANTED, WITHDRAWN, status
from nextvid.making.outcome import Check, Number
from storage.errors import ConflictError
from storage.jpeg import decode_clip, encode_clip
from storage.part import LatentPart, PixelPart
from storage.schemas import PixelCommits
from storage.spec import PixelSpec
from storage.store import PixelStore

MEASURED = 4  # rows of a shard whose JPEGs are compared with their frames: as many as make the round trip of latents
WAITING = 64  # clips that wait for a thread, 200 MB at 16 frames of 256 pixels; a faster decoder waits


@dataclass(frozen=True)
class _Compressed:
    """One row: its chunk, or the reason why there is none."""

    chunk: bytes | None
    reason: str | None
    psnr_db: float | None
    encode_s: float


class PixelWriter:
    """Writes one batch's pixels, or nothing where there is no spec; use as a context manager."""

    def __init__(self, project: Project, batch: str, spec: PixelSpec | None, workers: int) -> None:
        self._project, self._batch, self._workers = project, batch, workers
        self._threads = ThreadPoolExecutor(workers, "jpeg")
        self._store = None if spec is None else PixelStore(project.root, spec)
        if self._store is not None:
            self._store.create()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown(cancel_futures=kind is not None)

    def plan(self) -> BatchPlan[PixelSpec] | None:
        """What the batch lacks now; None where corpus.yaml asks for no pixels."""
        return None if self._store is None else plan_batch(self._project, self._batch, self._store)

    def beside(self, latents: LatentPart, number: int) -> "PixelShard | None":
        """The twin of a shard of latents; None where it is committed already or the part has no twin."""
        part = None if self._store is None else self._twin(self._store, latents)
        return None if part is None or part.committed(number) else PixelShard(part, number, self._threads)

    def publish(self, shard: "PixelShard") -> int:
        """Write a shard, all of whose rows were added, without those of files that were withdrawn meanwhile.

        The rows written, none where another writer was first.
        """
        with committing(self._project.root, shard.part, shard.number, self._clips) as withdrawn:
            shard.reject(withdrawn, WITHDRAWN)
            return shard.publish()

    @cached_property
    def _clips(self) -> pl.DataFrame:
        return usable_clips(self._project, self._batch)

    def rest(self, failed: Collection[bytes] = ()) -> int:
        """Decode and write what has no pixels yet, except rows that have failed in this call; the rows written.

        Finished parts are sealed.
        """
        if (store := self._store) is None:
            return 0
        written = self._rest(store, failed)
        store.seal(self._batch)
        return written

    def _rest(self, store: PixelStore, failed: Collection[bytes]) -> int:
        written, parts = 0, open_parts(self._project, self._batch, store, failed)
        first = next(parts, None)
        if first is None:
            return 0
        with Decoding(self._workers) as decoding:
            for part in chain([first], parts):
                rows = plan_batch(self._project, self._batch, store).rows
                for number in (number for number in range(part.shards) if not part.committed(number)):
                    shard = PixelShard(part, number, self._threads)
                    ids = part.rows_of(number).select("row_id")
                    clips = ids.join(rows, on="row_id", how="inner", maintain_order="left")
                    frames = decoding.start(clips, part.spec.resolution)
                    for row in ids["row_id"].to_list():
                        shard.add({row: frames.take([row]).get(row, DecodedRow(None, 0.0, NOT_WANTED))})
                    written += self.publish(shard)
        return written

    def _twin(self, store: PixelStore, latents: LatentPart) -> PixelPart | None:
        """The part with the same plan; a new one where none of its rows has a place yet, else None."""
        ids = latents.plan["row_id"].to_list()
        for _ in range(2):
            taken: set[bytes] = set()
            known = store.parts(self._batch, latents.frames)
            for number in known:
                part = store.part(self._batch, latents.frames, number)
                if part.plan.equals(latents.plan):
                    return part
                taken |= set(part.plan["row_id"].to_list())
            if not taken.isdisjoint(ids):
                return None
            try:
                return store.plan_part(self._batch, latents.frames, ids, known)
            except ConflictError:
                continue  # another process planned a part at the same moment, most likely the very same
        return None


class PixelShard:
    """One shard of pixels: frames of its rows are compressed as they come, and written once all are there."""

    def __init__(self, part: PixelPart, number: int, threads: ThreadPoolExecutor) -> None:
        self.part, self.number, self._threads = part, number, threads
        self._rows = part.rows_of(number)
        self._measured = frozenset(sorted(self._rows["row_id"].to_list())[:MEASURED])
        self._coming: dict[bytes, Future[_Compressed]] = {}

    def add(self, seen: Mapping[bytes, DecodedRow]) -> None:
        """Begin to compress rows; waits where too many wait for a thread."""
        for row, one in seen.items():
            self._coming[row] = self._threads.submit(_compress, one, self.part.spec, row in self._measured)
        waiting = [future for future in self._coming.values() if not future.done()]
        for future in waiting[:-WAITING]:
            future.result()

    def reject(self, rows: Collection[bytes], reason: str) -> None:
        """Give rows that were added a reason in place of their pixels."""
        for row in rows:
            if row in self._coming:
                self._coming[row] = self._threads.submit(_Compressed, None, reason, None, 0.0)

    def publish(self) -> int:
        """Write the shard, all of whose rows were added; the rows written, none where another writer was first."""
        rows = [self._coming[row].result() for row in self._rows["row_id"].to_list()]
        columns = {
            "status": [status(row.reason) for row in rows],
            "reason": [row.reason for row in rows],
            "offset": [None] * len(rows),  # places and checksums are added by the store
            "size_bytes": [None] * len(rows),
            "crc32c": [None] * len(rows),
            "psnr_db": [row.psnr_db for row in rows],
            "encode_s": [row.encode_s for row in rows],
        }
        schema = PixelCommits.create_empty().schema
        commits = pl.DataFrame({**self._rows.to_dict(), **columns}, schema_overrides=schema)
        try:
            self.part.write_shard(self.number, [row.chunk for row in rows], commits)
        except ConflictError:
            return 0
        return len(rows)


def pixel_check(plan: BatchPlan[PixelSpec] | None) -> Check:
    """Whether every wanted row has pixels where corpus.yaml asks for them. Latents are read without them."""
    if plan is None:
        return Check("pixels", True, {}, description="corpus.yaml asks for no pixels")
    failed = plan.commits.height - plan.kept - plan.unstable.height
    missing = plan.rows.height - failed
    numbers: dict[str, Number] = {"spec": plan.spec.digest(), "rows": plan.kept, "failed": failed, "missing": missing}
    numbers["size_bytes"] = int(plan.good["size_bytes"].sum())
    measured = plan.good["psnr_db"].drop_nulls().to_numpy()
    if len(measured):
        numbers |= {"psnr_mean_db": float(measured.mean()), "psnr_min_db": float(measured.min())}
        numbers["psnr_rows"] = len(measured)
    return Check("pixels", missing == 0, numbers)


def _compress(seen: DecodedRow, spec: PixelSpec, measure: bool) -> _Compressed:
    if seen.frames is None:
        return _Compressed(None, seen.reason, None, 0.0)
    began = time.perf_counter()
    chunk = encode_clip(seen.frames, spec.quality, spec.subsampling)
    seconds = time.perf_counter() - began
    if not measure:
        return _Compressed(chunk, None, None, seconds)
    again = np.empty_like(seen.frames)
    decode_clip(chunk, again)
    return _Compressed(chunk, None, psnr_db(again, seen.frames), seconds)
