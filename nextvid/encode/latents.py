"""The maker of `latents`: rows that a batch's store lacks are decoded, encoded, checked and committed, shard by shard.

Holds the order of events only; plan.py decides what, frames.py decodes, shard.py encodes, roundtrip.py judges,
verdicts.py reports, and the store keeps. Decoding runs one shard ahead of encoding, so that both together take what the
slower one takes. Killed anywhere, the next call finishes the part that was begun, row for row the same.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import polars as pl
import torch

from nextvid.corpus.project import EncodingConfig, Project
from nextvid.encode.autoencoders import Autoencoder
from nextvid.encode.frames import Decoding, Rows, Seen
from nextvid.encode.plan import EncodePlan, plan_encode, wanted_clips
from nextvid.encode.preview import CLIPS, preview_png
from nextvid.encode.roundtrip import Trip, error_bound, judge, sampled
from nextvid.encode.shard import NOT_WANTED, EncodedShard, commit_table, encode_shard, row_noise
from nextvid.encode.verdicts import Trips, outcome_of, publish_failed_trip
from nextvid.outcome import Outcome
from storage.atomic import publish_bytes
from storage.errors import ConflictError, StoreError
from storage.latents import LatentStore, Part
from storage.shard import stored_values
from storage.tables import require_checks

Progress = Callable[[int, int], None]


def make_latents(project: Project, batch: str, progress: Progress | None = None) -> Outcome:
    """Encode what a batch lacks in the spec in force, publish its checks and a picture.

    Raises UpstreamError without checked clips, and StoreError where the round trip fails: then nothing of that shard is
    committed, and the published checks say so.
    """
    began = time.perf_counter()
    require_checks(project.root.checks("clips", batch), "clips")
    plan = plan_encode(project, batch)
    store = LatentStore(project.root, plan.spec)
    store.create()
    trips = Trips()
    if plan.rows.height or any(store.unfinished(batch, frames) for frames in store.frames_of(batch)):
        workers, threads = _shares(project.corpus.encoding)
        with Decoding(workers) as decoding, _torch_threads(threads):
            encoder = _Encoder(project, plan, store, decoding, trips, progress)
            try:
                encoder.run()
            except StoreError as error:
                publish_failed_trip(project, plan, trips, error)
                raise
        if encoder.pictures:
            publish_bytes(project.root.preview("latents", batch), preview_png(encoder.pictures))
    return outcome_of(project, plan, trips, time.perf_counter() - began)


class _Encoder:
    """One call's work on one batch: every clip length's unfinished part, then its next."""

    def __init__(
        self,
        project: Project,
        plan: EncodePlan,
        store: LatentStore,
        decoding: Decoding,
        trips: Trips,
        progress: Progress | None,
    ) -> None:
        self._project, self._plan, self._store, self._decoding = project, plan, store, decoding
        self._clips = wanted_clips(project, plan.batch)
        encoding = project.corpus.encoding
        self._autoencoder = Autoencoder.load(
            encoding.autoencoder, encoding.device, plan.spec.precision, encoding.batch_frames
        )
        self._trips, self._progress, self._done = trips, progress, 0
        self._failed: set[bytes] = set()  # in this call; they wait for the next one
        self.pictures: list[tuple[np.ndarray, np.ndarray]] = []

    def run(self) -> None:
        for frames in sorted({*self._plan.by_frames, *self._store.frames_of(self._plan.batch)}):
            while (part := self._next_part(frames)) is not None:
                self._finish(part)

    def _next_part(self, frames: int) -> Part | None:
        """The part that was begun and not finished, else a new one for what is still missing, else None."""
        batch = self._plan.batch
        part = self._store.unfinished(batch, frames)
        if part is not None:
            return part
        missing = plan_encode(self._project, batch).by_frames.get(frames)
        ids = [] if missing is None else [row for row in missing["row_id"].to_list() if row not in self._failed]
        if not ids:
            return None
        try:
            return self._store.plan_part(batch, frames, ids)
        except ConflictError:
            return self._next_part(frames)  # somebody planned it first: help with theirs

    def _finish(self, part: Part) -> None:
        """Encode the part's open shards, decoding one ahead. A shard that another writer committed first is theirs."""
        waiting = [shard for shard in range(part.shards) if not part.committed(shard)]
        ahead = self._start(part, waiting)
        while ahead is not None:
            shard, rows, decoding = ahead
            ids = rows["row_id"].to_list()
            seen = decoding.collect()
            again = self._decode(sampled([row for row in ids if row in seen and seen[row].frames is not None]))
            ahead = self._start(part, waiting)
            unwanted = {row: Seen(None, 0.0, NOT_WANTED) for row in ids if row not in seen}
            encoded = encode_shard(self._autoencoder, self._plan.spec, part.frames, ids, seen | unwanted)
            stored = stored_values(encoded.latents, encoded.ok, self._plan.spec.storage)
            psnr_db = self._check(encoded, stored, again.collect())
            try:
                part.write_shard(shard, encoded.latents, commit_table(encoded, rows["slot"].to_list(), psnr_db))
            except ConflictError:
                continue
            self._failed |= set(ids) - set(encoded.good)
            self._trips.written += len(ids)
            self._done += len(ids)
            if self._progress:
                self._progress(self._done, max(self._done, self._plan.rows.height))

    def _start(self, part: Part, waiting: list[int]) -> tuple[int, pl.DataFrame, Rows] | None:
        """Take the next open shard off `waiting` and begin to decode it: (shard, its rows, its frames to come)."""
        while waiting:
            shard = waiting.pop(0)
            if not part.committed(shard):
                rows = part.rows_of(shard)
                return shard, rows, self._decode(rows["row_id"].to_list())
        return None

    def _decode(self, row_ids: list[bytes]) -> Rows:
        """Begin to decode these rows in this order, those that no clip wants any more left out."""
        wanted = pl.DataFrame({"row_id": row_ids}, schema={"row_id": pl.Binary})
        clips = wanted.join(self._clips, on="row_id", how="inner", maintain_order="left")
        return self._decoding.start(clips, self._plan.spec.resolution)

    def _check(self, encoded: EncodedShard, stored: np.ndarray, again: dict[bytes, Seen]) -> dict[bytes, float]:
        """PSNR of the sampled rows; StoreError where one does not come back as it went."""
        spec = self._plan.spec
        bound = error_bound(spec.storage, spec.precision)
        found: dict[bytes, Trip] = {}
        for row, seen in again.items():
            if row not in encoded.good:
                continue
            if seen.frames is None:
                raise StoreError(f"row {row.hex()} was decoded once and not again ({seen.reason}): run 'latents' again")
            latents = stored[encoded.row_ids.index(row)]
            noise = row_noise(row, len(latents), spec) if spec.posterior == "sample" else None
            rebuilt = self._autoencoder.decode(latents.astype(np.float32))
            fresh = self._autoencoder.encode(seen.frames, noise).latents
            found[row] = judge(latents, fresh, rebuilt, seen.frames, bound)
            if len(self.pictures) < CLIPS:
                self.pictures.append((seen.frames, rebuilt))
        self._trips.add(found)
        for row, trip in found.items():
            if trip.faults:
                raise StoreError(
                    f"round trip of row {row.hex()} failed, its shard is not committed: {'; '.join(trip.faults)}"
                )
        return {row: trip.psnr_db for row, trip in found.items()}


def _shares(encoding: EncodingConfig) -> tuple[int, int]:
    """(decode processes, encoder threads) of this machine's cores.

    An encoder on CPU costs more than decoding (research vae 2, video 3): one core of four decodes, at least one; on a
    device all but one core do.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    on_cpu = encoding.device == "cpu" or (encoding.device == "auto" and not torch.cuda.is_available())
    workers = max(1, cores // 4 if on_cpu else cores - 1)
    return workers, max(1, cores - workers)


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    """Bound torch's threads while decode processes share the cores: two jobs on the same ones spin (research vae 7)."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
