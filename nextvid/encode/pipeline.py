"""One shard's way on one device: its rows are decoded, encoded, judged and committed.

Three stages run at once: processes decode (frames.py), the calling thread keeps the device busy (shard.py), and a
writer thread judges sampled rows (roundtrip.py) and commits. Each waits where the next one is full, so that memory does
not grow with the corpus. A kill loses at most the shard that is being written and the first rows of the next one,
however slow the disk is (docs/decisions/0027).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import NamedTuple

import polars as pl
import torch

from nextvid.config.project import Project
from nextvid.encode.autoencoders import Autoencoder
from nextvid.encode.checks import Report, reported
from nextvid.encode.frames import DecodedRow, Decoding, PendingRows
from nextvid.encode.pixels import PixelShard, PixelWriter
from nextvid.encode.plan import committing, pixel_spec, wanted_clips
from nextvid.encode.preview import Shown
from nextvid.encode.roundtrip import Difference, Trip, checksums, round_trip, sampled, unlike
from nextvid.encode.shard import NOT_WANTED, WITHDRAWN, EncodedShard, RoundTripError, commit_table, encode_rows
from nextvid.machine import available_cores, workers
from storage.errors import ConflictError, RefusedError
from storage.part import LatentPart
from storage.root import DataRoot
from storage.spec import EncodingSpec

AHEAD = 32  # rows encoded before the shard before them is committed, an eighth of one (docs/decisions/0027)


class Advance(NamedTuple):
    """What a pipeline tells while it works: rows encoded since the last one, or a note for people."""

    rows: int = 0
    encode_s: float = 0.0  # of the device, for these rows
    note: str = ""


Tell = Callable[[Advance], None]
Verdict = tuple[Trip, Shown] | Difference


@dataclass(frozen=True)
class OpenShard:
    """A shard that is not committed yet, with the frames of its rows on their way."""

    number: int
    rows: pl.DataFrame  # of the part's plan: row_id, slot
    frames: PendingRows
    again: PendingRows  # sampled rows decoded a second time, for the round trip
    checksums: dict[bytes, list[int]] = field(default_factory=dict)  # crc32c of each frame, by row that was decoded


class Pipeline:
    """Encodes shards of one batch's parts on one device."""

    def __init__(
        self,
        model: Autoencoder,
        root: DataRoot,
        clips: pl.DataFrame,
        decoding: Decoding,
        pixels: PixelWriter,
        writer: ThreadPoolExecutor,
        tell: Tell,
    ) -> None:
        self._model, self._root, self._clips, self._decoding = model, root, clips, decoding
        self._pixels, self._writer, self._tell = pixels, writer, tell
        self._unstable: dict[bytes, str] = {}  # why files give no rows, by media id

    def encode(self, part: LatentPart, numbers: Iterable[int]) -> Report:
        """Encode those of the shards that are not committed.

        Raises RefusedShardError where one is refused; whole shards before it are committed all the same.
        """
        report, commit = Report(), self._writer.submit(Report)
        for shard in self._open_shards(part, numbers):
            jpegs = self._pixels.beside(part, shard.number)
            encoded = EncodedShard.empty(part.spec, part.frames, shard.rows["row_id"].to_list())
            judged: dict[bytes, Future[Verdict]] = {}
            for rows in encode_rows(self._model, part.spec, part.frames, self._frames(part, shard, jpegs, commit)):
                for row in encoded.add(rows):
                    if row in shard.again:
                        judged[row] = self._writer.submit(self._judge, part, shard, encoded, row, shard.again)
                self._tell(Advance(len(rows.row_ids), rows.encode_s))
                for judging in judged.values():
                    if judging.done():
                        judging.result()  # raises where the row did not come back
            report += commit.result()
            commit = self._writer.submit(self._finish, part, shard, encoded, judged, jpegs)
        return report + commit.result()

    def _open_shards(self, part: LatentPart, numbers: Iterable[int]) -> Iterator[OpenShard]:
        """Shards that are not committed; the next one's frames are asked for before this one's are taken."""

        def started() -> Iterator[OpenShard]:
            for number in numbers:
                if not part.committed(number):
                    rows = part.rows_of(number)
                    frames = self._decode(part, rows["row_id"].to_list())
                    checked = sampled([row for row in rows["row_id"].to_list() if row in frames], part.frames)
                    yield OpenShard(number, rows, frames, self._decode(part, checked))

        for shard, _ in pairwise(chain(started(), [None])):
            assert shard is not None
            if part.committed(shard.number):  # by another writer, meanwhile
                shard.frames.drop()
                shard.again.drop()
            else:
                yield shard

    def _decode(self, part: LatentPart, row_ids: list[bytes]) -> PendingRows:
        """Ask for the frames of these rows in this order, without those that no clip wants any more."""
        asked = pl.DataFrame({"row_id": row_ids}, schema={"row_id": pl.Binary})
        clips = asked.join(self._clips, on="row_id", how="inner", maintain_order="left")
        return self._decoding.start(clips, part.spec.resolution)

    def _frames(
        self, part: LatentPart, shard: OpenShard, jpegs: PixelShard | None, before: "Future[Report]"
    ) -> Iterator[dict[bytes, DecodedRow]]:
        """PendingRows of one forward after another; from the AHEAD-th row on, once the shard `before` is committed."""
        at_once = max(1, self._model.frames_at_once // part.frames)
        ids = shard.rows["row_id"].to_list()
        for first in range(0, len(ids), at_once):
            if first >= AHEAD:
                before.result()
            asked = ids[first : first + at_once]
            found = shard.frames.take(asked)
            seen = {row: found.get(row, DecodedRow(None, 0.0, NOT_WANTED)) for row in asked}
            shard.checksums.update((row, checksums(one.frames)) for row, one in seen.items() if one.frames is not None)
            if jpegs is not None:
                jpegs.add(seen)
            yield seen

    def _judge(
        self, part: LatentPart, shard: OpenShard, encoded: EncodedShard, row: bytes, again: PendingRows
    ) -> Verdict:
        """The round trip of a row, or how its frames differ when they are decoded again.

        Raises RoundTripError where the frames are the same and their latents do not come back: no fault of the file.
        """
        truth = again.take([row])[row]
        if difference := unlike(shard.checksums[row], truth):
            return difference
        assert truth.frames is not None, "a row without frames differs"
        trip, shown = round_trip(self._model, part.spec, row, encoded.of(row), truth.frames)
        if trip.faults:
            raise RoundTripError(
                f"round trip of row {row.hex()} failed, its shard is not committed: {'; '.join(trip.faults)}"
            )
        return trip, shown

    def _finish(
        self,
        part: LatentPart,
        shard: OpenShard,
        encoded: EncodedShard,
        judged: Mapping[bytes, "Future[Verdict]"],
        jpegs: PixelShard | None,
    ) -> Report:
        """Commit a shard, then its pixels. Runs on the writer thread."""
        with committing(self._root, part, shard.number, self._clips) as withdrawn:
            encoded.reject(withdrawn, WITHDRAWN)
            report = self._commit(part, shard, encoded, judged, jpegs)
        return report + Report(pixels=0 if jpegs is None else self._pixels.publish(jpegs))

    def _commit(
        self,
        part: LatentPart,
        shard: OpenShard,
        encoded: EncodedShard,
        judged: Mapping[bytes, "Future[Verdict]"],
        jpegs: PixelShard | None,
    ) -> Report:
        """Write a shard whose sampled rows came back.

        A file whose frames differ when they are decoded again gives no rows, the others are committed.
        """
        found = self._of_sound_files({row: judging.result() for row, judging in judged.items()}, encoded, jpegs)
        shard.again.drop()  # sampled rows that could not be decoded
        while not found and (others := sampled(encoded.good, part.frames)):
            again = self._decode(part, others)
            verdicts = {row: self._judge(part, shard, encoded, row, again) for row in others}
            found = self._of_sound_files(verdicts, encoded, jpegs)
        psnr_db = {row: trip.psnr_db for row, (trip, _) in found.items()}
        try:
            part.write_shard(
                shard.number, encoded.latents, commit_table(encoded, shard.rows["slot"].to_list(), psnr_db)
            )
        except ConflictError:  # another writer committed it first
            return Report()
        return reported(encoded, found.values())

    def _of_sound_files(
        self, verdicts: Mapping[bytes, Verdict], encoded: EncodedShard, jpegs: PixelShard | None
    ) -> dict[bytes, tuple[Trip, Shown]]:
        """The round trips of files that decode alike twice; all rows of the other files get a reason instead.

        So do their rows in later shards, where perhaps none of them is sampled.
        """
        here = self._clips.filter(pl.col("row_id").is_in(encoded.row_ids)).select("row_id", "media_id", "uri")
        for row, verdict in verdicts.items():
            if isinstance(verdict, Difference):
                ((media, uri),) = here.filter(pl.col("row_id") == row).select("media_id", "uri").iter_rows()
                self._unstable.setdefault(media, f"{verdict.reason}: {uri}: {verdict.what}")
        for media, reason in self._unstable.items():
            rows = set(here.filter(pl.col("media_id") == media)["row_id"].to_list())
            encoded.reject(rows, reason)
            if jpegs is not None:
                jpegs.reject(rows, reason)
        good = set(encoded.good)
        return {
            row: verdict for row, verdict in verdicts.items() if row in good and not isinstance(verdict, Difference)
        }


@contextmanager
def pipeline(
    project: Project, batch: str, spec: EncodingSpec, device: str, sharers: int, tell: Tell
) -> Iterator[Pipeline]:
    """A pipeline on one device, on one of `sharers` equal shares of this machine's cores.

    torch's threads are bounded while decode processes share the cores: threads that outnumber cores spin. Raises
    RefusedError where the autoencoder's folder does not hold what the spec names.
    """
    encoding, clips = project.corpus.encoding, wanted_clips(project, batch)
    decoders, threads = shares(device, sharers, project.corpus.execution.cores)
    with Decoding(decoders) as decoding, ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(threads)
        model = Autoencoder.load(encoding.autoencoder, device, spec.precision, project.corpus.execution.batch_frames)
        if model.digest != spec.autoencoder:
            raise RefusedError(f"{encoding.autoencoder}: its weights changed since this was planned; ask again")
        model.when_halved = lambda frames: tell(
            Advance(note=f"the device's memory is full: from now on {frames} frames a batch")
        )
        pixels = stack.enter_context(PixelWriter(project, batch, pixel_spec(project, spec), decoders))
        yield Pipeline(model, project.root, clips, decoding, pixels, stack.enter_context(_writer(decoders)), tell)


def shares(device: str, sharers: int, cores: int | None = None) -> tuple[int, int]:
    """(decode processes, encoder threads) of one of `sharers` equal shares of this machine's cores, of at most `cores`.

    On CPU an encoder costs more than decoding, so that one core of four decodes, at least one; beside a GPU all but one
    core decode. Memory may have room for fewer processes.
    """
    mine = max(1, available_cores(cores) // sharers)
    decoding = workers(mine // 4 if device == "cpu" else mine - 1, mine)
    return decoding, max(1, mine - decoding)


@contextmanager
def _writer(threads: int) -> Iterator[ThreadPoolExecutor]:
    """The writer thread. After an error it finishes what it was given; where a person stops the work, it stops too."""
    writer = ThreadPoolExecutor(1, "writer", initializer=torch.set_num_threads, initargs=(threads,))
    try:
        yield writer
    except BaseException as error:
        writer.shutdown(cancel_futures=not isinstance(error, Exception))
        raise
    writer.shutdown()
