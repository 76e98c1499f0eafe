"""The maker of `latents`: rows that a batch's store lacks are decoded, encoded, checked and committed, shard by shard.

Holds the order of events only; plan.py decides what, frames.py decodes, shard.py encodes, keeping.py judges and writes,
verdicts.py reports, and the store keeps. Three stages overlap: processes decode, this thread keeps the device busy, a
third one judges and writes; each waits where the next one is full, so memory does not grow with the corpus. Killed
anywhere, the next call finishes the part that was begun, row for row the same.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import polars as pl
import torch

from nextvid.corpus.project import EncodingConfig, Project
from nextvid.encode.autoencoders import Autoencoder
from nextvid.encode.frames import Decoding, Rows
from nextvid.encode.keeping import Keeper
from nextvid.encode.pace import OnPace, Pace
from nextvid.encode.pixel_plan import pixel_spec
from nextvid.encode.pixels import PixelWriter
from nextvid.encode.plan import EncodePlan, plan_encode, wanted_clips
from nextvid.encode.preview import preview_png
from nextvid.encode.roundtrip import sampled
from nextvid.encode.shard import Batch, encode_shard
from nextvid.encode.verdicts import Trips, outcome_of, publish_refused
from nextvid.outcome import Outcome
from storage.atomic import publish_bytes
from storage.errors import ConflictError, RefusedError, StoreError
from storage.latents import LatentStore, Part
from storage.tables import require_checks


def make_latents(project: Project, batch: str, on_pace: OnPace | None = None) -> Outcome:
    """Encode what a batch lacks in the spec in force, with its pixels if asked for; publish its checks and a picture.

    Raises UpstreamError without checked clips, and StoreError where a shard is refused: then nothing of that shard is
    committed, and the published checks say so.
    """
    began = time.perf_counter()
    require_checks(project.root.checks("clips", batch), "clips")
    plan = plan_encode(project, batch)
    store = LatentStore(project.root, plan.spec)
    store.create()
    trips, workers = Trips(), _shares(project.corpus.encoding)[0]
    with PixelWriter(project, batch, pixel_spec(project, plan.spec), workers) as pixels:
        if plan.rows.height or any(store.unfinished(batch, frames) for frames in store.frames_of(batch)):
            try:
                _encode(project, plan, store, trips, pixels, on_pace)
            except StoreError as error:
                publish_refused(project, plan, trips, error)
                raise
            if trips.pictures:
                publish_bytes(project.root.preview("latents", batch), preview_png(trips.pictures))
        pixels.rest()
        return outcome_of(project, plan, trips, pixels.plan(), pixels.written, time.perf_counter() - began)


def _encode(
    project: Project,
    plan: EncodePlan,
    store: LatentStore,
    trips: Trips,
    pixels: PixelWriter,
    on_pace: OnPace | None,
) -> None:
    encoding = project.corpus.encoding
    workers, threads = _shares(encoding)
    model = Autoencoder.load(encoding.autoencoder, encoding.device, plan.spec.precision, encoding.batch_frames)
    if model.digest != plan.spec.autoencoder:
        raise RefusedError(f"{encoding.autoencoder}: its weights were exchanged since this was planned; ask again")
    with (
        Decoding(workers) as decoding,
        _torch_threads(threads),
        Keeper(model, trips, threads=workers) as keeper,
    ):
        _Encoder(project, plan, store, model, decoding, keeper, pixels, trips, on_pace).run()


@dataclass(frozen=True)
class _Begun:
    """A shard whose frames are on their way."""

    part: Part
    number: int
    rows: pl.DataFrame  # of its plan: row_id, slot
    frames: Rows
    again: Rows  # the sampled ones once more, for the round trip


class _Encoder:
    """One call's work on one batch: every clip length's unfinished part, then its next."""

    def __init__(
        self,
        project: Project,
        plan: EncodePlan,
        store: LatentStore,
        model: Autoencoder,
        decoding: Decoding,
        keeper: Keeper,
        pixels: PixelWriter,
        trips: Trips,
        on_pace: OnPace | None,
    ) -> None:
        self._project, self._plan, self._store = project, plan, store
        self._model, self._decoding, self._keeper, self._trips = model, decoding, keeper, trips
        self._pixels = pixels
        self._clips = wanted_clips(project, plan.batch)
        self._on_pace, self._began = on_pace or (lambda pace: None), time.perf_counter()
        self._done, self._busy_s = 0, 0.0
        model.when_halved = lambda frames: self._say(
            f"the device's memory is full: from now on {frames} frames a batch"
        )

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
        missing = plan_encode(self._project, batch, self._plan.spec).by_frames.get(frames)
        ids = [] if missing is None else [row for row in missing["row_id"].to_list() if row not in self._trips.failed]
        if not ids:
            return None
        try:
            return self._store.plan_part(batch, frames, ids)
        except ConflictError:
            return self._next_part(frames)  # somebody planned it first: help with theirs

    def _finish(self, part: Part) -> None:
        """Encode the part's open shards; the next one's frames are begun before this one's are taken."""
        waiting = iter(range(part.shards))
        begun = self._begin(part, waiting)
        while begun is not None:
            ahead = self._begin(part, waiting)
            self._shard(begun)
            begun = ahead
        self._keeper.drain()

    def _begin(self, part: Part, waiting: Iterator[int]) -> _Begun | None:
        """Begin to decode the next open shard."""
        for number in waiting:
            if not part.committed(number):
                rows = part.rows_of(number)
                ids = rows["row_id"].to_list()
                frames = self._decode(ids)
                checked = sampled([row for row in ids if row in frames], part.frames)
                return _Begun(part, number, rows, frames, self._decode(checked))
        return None

    def _shard(self, begun: _Begun) -> None:
        """Encode one shard and hand it on. One that another writer has committed meanwhile is theirs."""
        if begun.part.committed(begun.number):
            begun.frames.drop()
            begun.again.drop()
            return
        keeping = self._keeper.shard(begun.part, begun.number, begun.again, self._decode)
        pixels = self._pixels.beside(begun.part, begun.number, begun.frames.take)
        encoded = encode_shard(
            self._model,
            begun.part.spec,
            begun.part.frames,
            begun.rows["row_id"].to_list(),
            pixels.take,
            keeping.row,
            self._count,
        )
        keeping.finish(encoded, begun.rows)
        self._keeper.hold(self._keeper.submit(pixels.finish))

    def _decode(self, row_ids: list[bytes]) -> Rows:
        """Begin to decode these rows in this order, those that no clip wants any more left out."""
        wanted = pl.DataFrame({"row_id": row_ids}, schema={"row_id": pl.Binary})
        clips = wanted.join(self._clips, on="row_id", how="inner", maintain_order="left")
        return self._decoding.start(clips, self._plan.spec.resolution)

    def _count(self, batch: Batch) -> None:
        self._done += batch.rows
        self._busy_s += batch.encode_s
        self._say()

    def _say(self, note: str = "") -> None:
        seconds = time.perf_counter() - self._began
        total = max(self._done, self._plan.rows.height)
        self._on_pace(Pace(self._plan.batch, self._done, total, seconds, self._busy_s, note=note))


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
