"""The end of the pipeline, on a thread of its own: rows make their round trip, then their shard is written.

So the device encodes the next batches while this judges and the disk writes. Holds which rows are tried and the order
judge, write, commit; the rules stand in roundtrip.py and the bytes in storage. An encoder that is faster than the disk
waits here: a kill loses one shard and the first rows of the next, whatever the disk does (docs/decisions/0027).
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import numpy as np
import polars as pl
import torch
from jaxtyping import Float32

from nextvid.encode.autoencoders import Autoencoder
from nextvid.encode.checks import Trips
from nextvid.encode.frames import Rows, Seen
from nextvid.encode.preview import CLIPS, Shown
from nextvid.encode.roundtrip import Trip, error_bound, judge, sampled, window
from nextvid.encode.shard import EncodedShard, RoundTripError, Take, commit_table, row_noise
from storage.errors import ConflictError
from storage.latents import LatentPart
from storage.shard import stored_values

AHEAD = 32  # rows encoded before the shard before them is committed, an eighth of one (docs/decisions/0027)


class Keeper:
    """Judges and writes behind the encoder; use as a context manager."""

    def __init__(self, autoencoder: Autoencoder, trips: Trips, threads: int) -> None:
        self._autoencoder, self._trips = autoencoder, trips
        self._thread = ThreadPoolExecutor(1, "keeping", initializer=torch.set_num_threads, initargs=(threads,))
        self._writing: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stopped = kind is not None and not issubclass(kind, Exception)  # by a person: at once
        self._thread.shutdown(cancel_futures=stopped)  # after an error, whole shards before it are still committed

    def shard(self, part: LatentPart, number: int, again: Rows, decode: Callable[[list[bytes]], Rows]) -> "Keeping":
        """Begin a shard. `again` are its sampled rows decoded once more; `decode` begins others, should all fail."""
        return Keeping(self, part, number, again, decode)

    def submit(self, work: Callable[[], None]) -> "Future[None]":
        """Do this after what was submitted before."""
        return self._thread.submit(work)

    def write(self, work: Callable[[], None]) -> None:
        """Do this after what was submitted before, once the shard before is committed: one is written at a time."""
        self.drain()
        self._writing = self.submit(work)

    def drain(self) -> None:
        """Wait until what was handed to `write` is committed. Raises what failed."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def judged(self, part: LatentPart, row: bytes, latents: Float32[np.ndarray, "F C h w"], seen: Seen) -> Trip:
        """A row's round trip: what the store will hold of it against its frames, decoded again."""
        spec = part.spec
        if seen.frames is None:
            raise RoundTripError(
                f"row {row.hex()} was decoded once and not again ({seen.reason}): make 'latents' again"
            )
        about = self._autoencoder.about
        checked = window(row, part.frames) if about.time_map == "frame" else slice(None)
        stored = stored_values(latents[None], np.array([True]), spec.storage)[0, checked]
        noise = row_noise(row, part.frames, spec)[checked] if spec.posterior == "sample" else None
        truth = seen.frames[checked]
        rebuilt = self._autoencoder.decode(stored.astype(np.float32), len(truth)) if about.decoder else None
        fresh = self._autoencoder.encode(truth, noise).latents
        if len(self._trips.pictures) < CLIPS:
            self._trips.pictures.append(Shown(truth, rebuilt, stored))
        return judge(stored, fresh, rebuilt, truth, error_bound(spec.storage, spec.precision))

    def count(self, encoded: EncodedShard, found: dict[bytes, Trip]) -> None:
        """A shard was committed."""
        self._trips.add(found)
        self._trips.written += len(encoded.row_ids)
        self._trips.failed |= set(encoded.row_ids) - set(encoded.good)


class Keeping:
    """One shard: its sampled rows are judged as they come, the whole is written at the end."""

    def __init__(
        self, keeper: Keeper, part: LatentPart, number: int, again: Rows, decode: Callable[[list[bytes]], Rows]
    ) -> None:
        self._keeper, self._part, self._number = keeper, part, number
        self._again, self._decode = again, decode
        self._found: dict[bytes, Trip] = {}
        self._judging: list[Future[None]] = []

    def paced(self, take: Take) -> Take:
        """The same rows, but more than the first AHEAD of them only once the shard before is committed."""
        taken = 0

        def paced(row_ids: list[bytes]) -> Mapping[bytes, Seen]:
            nonlocal taken
            if taken >= AHEAD:
                self._keeper.drain()
            taken += len(row_ids)
            return take(row_ids)

        return paced

    def row(self, row: bytes, latents: Float32[np.ndarray, "F C h w"]) -> None:
        """A row was encoded; judged if it is one of the sampled. Raises where one before did not come back right."""
        for judging in self._judging:
            if judging.done():
                judging.result()
        if row in self._again:
            mine = latents.copy()  # what it is a view of goes with its batch
            self._judging.append(self._keeper.submit(lambda: self._judge(row, mine, self._again)))

    def finish(self, encoded: EncodedShard, rows: pl.DataFrame, twin: Callable[[], None] = lambda: None) -> None:
        """All rows of the shard (columns row_id, slot) are there: write it, then its twin, behind what was begun."""

        def write() -> None:
            self._write(encoded, rows)
            twin()

        self._keeper.write(write)

    def _judge(self, row: bytes, latents: Float32[np.ndarray, "F C h w"], again: Rows) -> None:
        trip = self._keeper.judged(self._part, row, latents, again.take([row])[row])
        if trip.faults:
            raise RoundTripError(
                f"round trip of row {row.hex()} failed, its shard is not committed: {'; '.join(trip.faults)}"
            )
        self._found[row] = trip

    def _write(self, encoded: EncodedShard, rows: pl.DataFrame) -> None:
        for judging in self._judging:
            judging.result()
        self._again.drop()  # sampled rows that could not be decoded
        if not self._found and (others := sampled(encoded.good, self._part.frames)):
            again = self._decode(others)
            for row in others:
                self._judge(row, encoded.latents[encoded.row_ids.index(row)], again)
        psnr_db = {row: trip.psnr_db for row, trip in self._found.items()}
        try:
            table = commit_table(encoded, rows["slot"].to_list(), psnr_db)
            self._part.write_shard(self._number, encoded.latents, table)
        except ConflictError:
            return  # another writer committed it first: it is theirs
        self._keeper.count(encoded, self._found)
