"""Features of a benchmark's samples as they are asked for: read ahead and encoded, or kept in a file and read back.

`Streamed` reads rows as training does (nextvid/train/loader.py) and encodes them at once. `Stored` reads features of
clips that are not varied from a file (nextvid/evaluate/kept.py). Both give them as float16, so that heads learn the
same from either (docs/decisions/0043). Segments of a sample follow one another along tokens, never averaged (trap 31
of docs/method.md 13).

Axes: N samples of a split, n of those asked for, G segments of a sample, c clips encoded at once, L tokens of a sample,
D width.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from nextvid.config.benchmarks import Augmentation
from nextvid.evaluate.augment import augmented, middle
from nextvid.evaluate.benchmark_rows import BenchmarkRows
from nextvid.evaluate.features import FrozenEncoder, Input
from nextvid.train.distributed import Ranks
from nextvid.train.loader import placed, read_ahead
from nextvid.train.rows import Latents, Pixels
from nextvid.trainset.order import IMAGE, Drawn
from nextvid.trainset.trainset import Trainset
from storage.reader import PixelReader, addresses, open_reader, pixel_addresses
from storage.root import DataRoot
from storage.spec import PixelSpec
from storage.store import PixelStore

# measured on the demo encoder, one thread: 6.8 ms a clip against 7.9 for 8, 8.0 for 32, 8.5 for 64
CLIPS_AT_ONCE = 16
VIEWS = 4  # stream of random numbers, beside those of finetune.py
Samples = Int[np.ndarray, " n"]  # numbers of samples in their split; above them, of the other views of train


@dataclass(frozen=True)
class Clips:
    """The rows of a benchmark as one encoder reads them, by sample and segment; then the other views of train."""

    kind: Latents | Pixels
    frame: pl.DataFrame
    places: np.ndarray  # ADDRESS or PIXEL_ADDRESS, by row
    segments: int
    device: torch.device
    threads: int = 1
    crop: float = 1.0  # share of the side of pictures that are not varied


@contextmanager
def open_clips(
    root: DataRoot,
    trainset: Trainset | None,
    pixels: PixelSpec | None,
    rows: BenchmarkRows,
    encoder: FrozenEncoder,
    device: torch.device,
    threads: int = 1,
    crop: float = 1.0,
) -> Iterator[Clips]:
    """A benchmark's rows, with their reader open: of the trainset's latents, or of pixels, by their spec.

    `crop` is `test_crop` of the benchmark; latents are whole.
    """
    frame = pl.concat([rows.frame, rows.other_views]) if rows.other_views.height else rows.frame
    batches = frame["batch"].unique().sort().to_list()
    kind: Latents | Pixels
    if encoder.reads == "latents":
        assert trainset is not None, f"{encoder.name} reads latents, which a trainset's statistics normalise"
        places = addresses(frame.with_columns(status=pl.lit("ok")), batches)
        with closing(open_reader(root, trainset.spec, batches, _by_frames(frame, places))) as reader:
            kind = Latents(reader, trainset, encoder.fold, device)
            yield Clips(kind, frame, places, rows.segments, device, threads)
        return
    assert pixels is not None, f"{encoder.name} reads pixels, and the benchmark's rows are of latents"
    store = PixelStore(root, pixels)
    store.refuse_gone()
    commits = pl.concat([store.commits(batch) for batch in batches]).filter(pl.col("status") == "ok")
    stored = frame.select("row_id", "batch").join(commits, on=["row_id", "batch"], how="inner", maintain_order="left")
    assert stored.height == frame.height, "rows without pixels were not left out"
    places = pixel_addresses(stored, batches)
    with closing(PixelReader(root, pixels, batches, _by_frames(frame, places))) as jpegs:
        kind = Pixels(jpegs, pixels, dict.fromkeys(frame["frames"].unique().to_list(), places))
        yield Clips(kind, frame, places, rows.segments, device, threads, crop)


def _by_frames(frame: pl.DataFrame, places: np.ndarray) -> Mapping[int, np.ndarray]:
    """Addresses by stored frames."""
    frames = frame["frames"].to_numpy()
    return {int(length): places[frames == length] for length in np.unique(frames)}


@dataclass(frozen=True)
class Variation:
    """How the clips that heads learn from are varied: a function of epoch and row (nextvid/evaluate/augment.py)."""

    kind: Augmentation
    seed: int


class Streamed:
    """Features of the samples of one split, encoded when they are asked for."""

    def __init__(self, encoder: FrozenEncoder, clips: Clips, split: str, varied: Variation | None = None) -> None:
        self._encoder, self._clips, self._varied = encoder, clips, varied
        frame = clips.frame
        self._first = int((frame["split"] == split).arg_max() or 0)
        self._stored = frame["frames"].to_numpy()
        self._rows = placed(clips.kind, CLIPS_AT_ONCE * encoder.frames, clips.device)

    def of(self, asked: Iterable[Samples], epoch: int | None = None) -> Iterator[Float[Tensor, "n L D"]]:
        """Features of each group of samples, in order, on the encoder's device; with an epoch, of its varied clips.

        A group is encoded CLIPS_AT_ONCE clips at a time. Raises DamagedError.
        """
        segments = self._clips.segments
        groups: list[int] = []  # clips of each group of which some are read and not encoded

        def pieces() -> Iterator[Int[np.ndarray, " c"]]:
            for samples in asked:
                clips = (samples[:, None] * segments + np.arange(segments)).ravel()
                groups.append(len(clips))
                yield from np.split(clips, range(CLIPS_AT_ONCE, len(clips), CLIPS_AT_ONCE))

        encoded: list[Tensor] = []
        for given in self.read(pieces(), epoch):
            with torch.no_grad():
                encoded.append(self._encoder.encode(given).half())
            if sum(map(len, encoded)) == groups[0]:
                yield rearrange(torch.cat(encoded), "(n g) l d -> n (g l) d", g=segments)
                encoded.clear()
                groups.pop(0)

    def read(self, asked: Iterable[Int[np.ndarray, " c"]], epoch: int | None = None) -> Iterator[Input]:
        """What the encoder is given of each group of clips, at most CLIPS_AT_ONCE, by their numbers in the split."""

        def announced(clips: Int[np.ndarray, " c"]) -> Drawn:
            rows = self._first + clips
            drawn = Drawn(0, (), np.zeros_like(rows), self._stored[rows], rows, self._clips.places[rows])
            self._rows.will_need(drawn)
            return drawn

        def memory(clips: Int[np.ndarray, " c"]) -> Any:  # noqa: ANN401 - of `Rows.memory`
            return self._rows.memory(len(clips), self._encoder.frames)

        def fill(_: Int[np.ndarray, " c"], drawn: Drawn, taken: Any) -> tuple[Drawn, Any]:  # noqa: ANN401
            self._rows.fill(drawn, taken)
            if (epoch is not None and self._varied is not None) or self._clips.crop < 1:
                self._change(drawn, taken[1] if isinstance(taken, tuple) else taken, epoch)
            return drawn, taken

        for drawn, taken in read_ahead(asked, announced, memory, fill, self._clips.threads):
            yield self._rows.deliver(drawn, taken)

    def _change(self, drawn: Drawn, frames: Tensor, epoch: int | None) -> None:
        """Vary clips of an epoch, or crop others, in place; an image as one frame."""
        ids, varied = self._clips.frame["row_id"], self._varied
        for clip, row, stored in zip(frames.numpy(), drawn.rows.tolist(), drawn.frames.tolist(), strict=True):
            if epoch is not None and varied is not None:
                clip[:stored] = augmented(clip[:stored], varied.kind, varied.seed, epoch, ids[row])
            else:
                clip[:stored] = middle(clip[:stored], self._clips.crop)
            if stored == IMAGE:
                clip[1:] = clip[:1]


@dataclass(frozen=True)
class Stored:
    """Features of the samples of one split, from a file."""

    features: Float[np.ndarray, "N L D"]  # memory-mapped
    device: torch.device
    threads: int = 1

    def of(self, asked: Iterable[Samples], epoch: int | None = None) -> Iterator[Float[Tensor, "n L D"]]:
        """Features of each group of samples, in order, on the device: the same in every epoch."""
        for found in read_ahead(
            asked, lambda _: None, lambda _: None, lambda samples, *_: np.take(self.features, samples, 0), self.threads
        ):
            yield torch.from_numpy(found).to(self.device)


class OneView:
    """Of each sample of train one of its views, drawn again in each epoch; a function of seed, epoch and sample."""

    def __init__(self, streamed: Streamed, rows: BenchmarkRows, seed: int) -> None:
        self._streamed, self._seed = streamed, seed
        first, segments = int(rows.frame.filter(split="train")["sample"].to_numpy().min()), rows.segments
        self._samples = rows.part("train").height // segments
        varied = rows.other_views["sample"].to_numpy()[::segments] - first
        self._others = np.bincount(varied, minlength=self._samples)
        # the number in the split of the one before each sample's first other view
        self._before = rows.frame.height // segments - first + np.cumsum(self._others) - self._others - 1

    def drawn(self, samples: Samples, epoch: int) -> Samples:
        """The samples in whose place these are read."""
        uniform = np.random.default_rng([VIEWS, self._seed, epoch]).random(self._samples)
        view = (uniform * (1 + self._others)).astype(np.int64)[samples]
        return np.where(view == 0, samples, self._before[samples] + view)

    def of(self, asked: Iterable[Samples], epoch: int | None = None) -> Iterator[Float[Tensor, "n L D"]]:
        """Features of each group of samples, in order, on the encoder's device."""
        assert epoch is not None, "views are drawn epoch by epoch"
        return self._streamed.of((self.drawn(samples, epoch) for samples in asked), epoch)


Features = Streamed | Stored | OneView


def shared(features: Features, asked: Iterable[Samples], ranks: Ranks) -> Iterator[tuple[Samples, Tensor]]:
    """This rank's share of groups of samples, each with its features."""
    own, again = itertools.tee(itertools.islice(asked, ranks.rank, None, ranks.count))
    return zip(own, features.of(again), strict=True)
