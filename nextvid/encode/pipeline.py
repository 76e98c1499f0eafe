"""The pipeline of one device: frames of a part's shards in, committed shards out, three stages at once.

Processes decode (frames.py), this thread keeps the device busy (shard.py), another one judges and writes
(committer.py); each waits where the next one is full, so memory does not grow with the corpus. Holds how they are
joined and what they get of the machine; which rows there are and what is made of the outcome is latents.py's.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import polars as pl
import torch

from nextvid.config.corpus import EncodingConfig
from nextvid.config.project import Project
from nextvid.encode.autoencoders import Autoencoder
from nextvid.encode.checks import Trips
from nextvid.encode.committer import Keeper
from nextvid.encode.frames import Decoding, Rows
from nextvid.encode.pixels import PixelWriter
from nextvid.encode.plan import pixel_spec, wanted_clips
from nextvid.encode.roundtrip import sampled
from nextvid.encode.shard import Batch, encode_shard
from nextvid.machine import available_cores
from storage.errors import RefusedError
from storage.latents import EncodingSpec, LatentPart


@dataclass(frozen=True)
class Telling:
    """Whom a pipeline tells: of every batch, and of what is to be said once."""

    batch: Callable[[Batch], None]
    note: Callable[[str], None]


@dataclass(frozen=True)
class _Begun:
    """A shard whose frames are on their way."""

    part: LatentPart
    number: int
    rows: pl.DataFrame  # of its plan: row_id, slot
    frames: Rows
    again: Rows  # the sampled ones once more, for the round trip


class Pipeline:
    """Encodes shards of one batch's parts."""

    def __init__(
        self,
        model: Autoencoder,
        clips: pl.DataFrame,
        decoding: Decoding,
        keeper: Keeper,
        pixels: PixelWriter,
        trips: Trips,
        telling: Telling,
    ) -> None:
        self._model, self._clips, self._decoding = model, clips, decoding
        self._keeper, self._pixels, self._trips, self._telling = keeper, pixels, trips, telling

    def encode(self, part: LatentPart, shards: Iterable[int]) -> None:
        """Encode those of the shards that are open; the next one's frames are begun before this one's are taken."""
        waiting, before = iter(shards), self._pixels.written
        begun = self._begin(part, waiting)
        while begun is not None:
            ahead = self._begin(part, waiting)
            self._shard(begun)
            begun = ahead
        self._keeper.drain()
        self._trips.pixels += self._pixels.written - before

    def _begin(self, part: LatentPart, waiting: Iterator[int]) -> _Begun | None:
        """Begin to decode the next open shard."""
        for number in waiting:
            if not part.committed(number):
                rows = part.rows_of(number)
                frames = self._decode(part, rows["row_id"].to_list())
                checked = sampled([row for row in rows["row_id"].to_list() if row in frames], part.frames)
                return _Begun(part, number, rows, frames, self._decode(part, checked))
        return None

    def _shard(self, begun: _Begun) -> None:
        """Encode one shard and hand it on. One that another writer has committed meanwhile is theirs."""
        part = begun.part
        if part.committed(begun.number):
            begun.frames.drop()
            begun.again.drop()
            return
        keeping = self._keeper.shard(part, begun.number, begun.again, lambda rows: self._decode(part, rows))
        pixels = self._pixels.beside(part, begun.number, begun.frames.take)
        ids = begun.rows["row_id"].to_list()
        take = keeping.paced(pixels.take)
        encoded = encode_shard(self._model, part.spec, part.frames, ids, take, keeping.row, self._telling.batch)
        keeping.finish(encoded, begun.rows, pixels.finish)

    def _decode(self, part: LatentPart, row_ids: list[bytes]) -> Rows:
        """Begin to decode these rows in this order, those that no clip wants any more left out."""
        wanted = pl.DataFrame({"row_id": row_ids}, schema={"row_id": pl.Binary})
        clips = wanted.join(self._clips, on="row_id", how="inner", maintain_order="left")
        return self._decoding.start(clips, part.spec.resolution)


@contextmanager
def pipeline(
    project: Project, batch: str, spec: EncodingSpec, trips: Trips, telling: Telling, device: str, sharers: int = 1
) -> Iterator[Pipeline]:
    """A pipeline on one device, on one of `sharers` equal shares of this machine's cores. `trips` counts its shards.

    Raises RefusedError where the autoencoder's folder does not hold what the spec names.
    """
    workers, threads = shares(device, sharers)
    with Decoding(workers) as decoding, _torch_threads(threads):
        model = _loaded(project.corpus.encoding, spec, device)
        model.when_halved = lambda frames: telling.note(
            f"the device's memory is full: from now on {frames} frames a batch"
        )
        with (
            PixelWriter(project, batch, pixel_spec(project, spec), workers) as pixels,
            Keeper(model, trips, threads=workers) as keeper,
        ):
            yield Pipeline(model, wanted_clips(project, batch), decoding, keeper, pixels, trips, telling)


def _loaded(encoding: EncodingConfig, spec: EncodingSpec, device: str) -> Autoencoder:
    model = Autoencoder.load(encoding.autoencoder, device, spec.precision, encoding.batch_frames)
    if model.digest != spec.autoencoder:
        raise RefusedError(f"{encoding.autoencoder}: its weights were exchanged since this was planned; ask again")
    return model


def shares(device: str, sharers: int) -> tuple[int, int]:
    """(decode processes, encoder threads) of one of `sharers` equal shares of this machine's cores.

    An encoder on CPU costs more than decoding (research vae 2, video 3): one core of four decodes, at least one; on a
    device all but one core do.
    """
    mine = max(1, available_cores() // sharers)
    workers = max(1, mine // 4 if device == "cpu" else mine - 1)
    return workers, max(1, mine - workers)


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    """Bound torch's threads while decode processes share the cores: two jobs on the same ones spin (research vae 7)."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
