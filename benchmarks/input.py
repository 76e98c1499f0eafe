"""What a step is fed from the store against decoding on the fly, per core: `python -m benchmarks.input [--quick]`.

The same footage in every arm: clips of 16 frames at 256 pixels. `pixels` are stored JPEGs, decoded by the loader's
threads into the bytes that a device gets, or by worker processes of a DataLoader, as peers do it; `latents` are float32
batches, normalised. The other side opens the video with decord for each clip (decoding.py). Ratios are of CPU seconds a
clip, so that cores and other programs count for neither; clips a second beside them are this machine's. Pages are warm.
"""

import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import av
import numpy as np
import polars as pl
import torch
import tyro
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks.clips import BATCH, BATCH_KEY, FRAMES, TRAINSET, Store, random_clips, write_store
from benchmarks.decoding import SIDE, decoded_batches, write_video
from benchmarks.measure import Took, machine, show, timed, write
from nextvid.trainset.pixels import TrainsetPixels
from nextvid.trainset.trainset import Trainset
from storage.jpeg import encode_clip
from storage.reader import PixelReader, pixel_addresses
from storage.root import DataRoot
from storage.schemas import PixelCommits
from storage.spec import PixelSpec
from storage.store import LatentStore, PixelStore

QUICK_CLIPS, CLIPS = 64, 512  # stored; 64 of them are 13 MB of JPEGs
QUICK_TURNS, TURNS = 2, 5
DECODED = 32  # clips of a decord turn: 0.1 s of a core each
STEP = 6  # source frames between two of a clip: 4 a second of 25, as the decoding arm takes them
PIXEL_TARGET, LATENT_TARGET = 15.0, 500.0  # CPU time of decord over ours, our aims
DECORD, PIXELS, PIXEL_WORKERS, LATENTS = (
    "decord, V-JEPA 2 style",
    "pixels, loader's threads",
    "pixels, worker processes",
    "latents, loader's threads",
)


@dataclass
class Arm:
    """One line: `prepare` opens it outside the clock and gives the work of one turn."""

    name: str
    workers: int  # threads of ours, processes otherwise
    clips: int  # a turn
    prepare: Callable[[], Callable[[], None]]
    took: list[Took] = field(default_factory=list)

    @property
    def cpu_s(self) -> float:
        """CPU seconds a clip, median over turns."""
        return statistics.median(took.cpu_s for took in self.took) / self.clips

    @property
    def rate(self) -> float:
        """Clips a second by the wall clock, median over turns."""
        return self.clips / statistics.median(took.wall_s for took in self.took)


def main(
    quick: bool = False,
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
    turns: int | None = None,
) -> None:
    """Measure, print a table, and with --json write what README.md documents.

    Args:
        quick: 64 clips and 2 turns, in under a minute.
        json: file for the results.
        turns: how many, instead of 5 (2 with --quick).
    """
    torch.set_num_threads(1)
    count = QUICK_CLIPS if quick else CLIPS
    with tempfile.TemporaryDirectory(prefix="nextvid-input-") as name:
        folder = Path(name)
        footage = write_video(folder)
        write_store(random_clips(count), folder / "store")
        psnr_db, jpeg_bytes = write_pixels(folder / "store", footage, count)
        arms = list(_arms(folder / "store", footage, count))
        for turn in range(turns or (QUICK_TURNS if quick else TURNS)):
            for arm in arms if turn % 2 == 0 else reversed(arms):
                work = arm.prepare()
                arm.took.append(timed(work))
    found = _results(arms, quick, {"clips": count, "psnr_db": psnr_db, "jpeg_bytes_per_clip": jpeg_bytes})
    _print(found)
    write(json, found)


def write_pixels(folder: Path, footage: Path, count: int) -> tuple[float, float]:
    """Clips of the footage as the pixels of the store's rows; mean PSNR in dB, and bytes a clip."""
    frames = _frames(footage)
    spec = PixelSpec(SIDE, "bicubic", 90, "4:2:0")
    store = PixelStore(DataRoot.open(str(folder)), spec)
    store.create()
    ids = LatentStore(store.root, Trainset.open(store.root, TRAINSET).spec).commits(BATCH_KEY)["row_id"].to_list()
    part = store.plan_part(BATCH_KEY, FRAMES, ids)
    starts = np.linspace(0, len(frames) - FRAMES * STEP, count).astype(int)
    chunks = [encode_clip(frames[at : at + FRAMES * STEP : STEP], spec.quality, spec.subsampling) for at in starts]
    for shard in range(part.shards):
        rows = part.rows_of(shard)
        first = int(rows["slot"][0])
        empty = {
            name: pl.lit(None, kind)
            for name, kind in PixelCommits.create_empty().schema.items()
            if name not in rows.columns
        }
        said = rows.with_columns(**empty | {"status": pl.lit("ok"), "encode_s": pl.lit(0.0, pl.Float32)})
        part.write_shard(shard, chunks[first : first + rows.height], said.select(PixelCommits.column_names()))
    found = Pixels(folder)
    again = np.stack([found[n] for n in range(0, count, max(1, count // 16))])
    taken = starts[:: max(1, count // 16)]
    true = np.stack([frames[at : at + FRAMES * STEP : STEP] for at in taken]).astype(np.float32)
    error = float(np.mean((again.astype(np.float32) - true) ** 2))
    return 10 * np.log10(255**2 / error), sum(map(len, chunks)) / count


def _frames(footage: Path) -> np.ndarray:
    """Every frame, resized as views are: uint8 [n, SIDE, SIDE, 3]."""
    with av.open(str(footage)) as container:
        decoded = (frame.to_image() for frame in container.decode(video=0))
        frames = [np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for image in decoded]
    return np.stack(frames)


class Pixels(Dataset[np.ndarray]):
    """Stored clips by number, for worker processes: the same reader, another transport."""

    def __init__(self, folder: Path) -> None:
        self._root = DataRoot.open(str(folder))
        (store,) = PixelStore.every(self._root)
        self.spec = store.spec
        self.addresses = pixel_addresses(store.commits(BATCH_KEY), [BATCH_KEY])
        self._reader: PixelReader | None = None  # opened in the process that reads

    def __len__(self) -> int:
        return len(self.addresses)

    def __getitem__(self, clip: int) -> np.ndarray:
        self._reader = self._reader or PixelReader(self._root, self.spec, [BATCH_KEY])
        out = np.empty(self.spec.row_shape(FRAMES), np.uint8)
        self._reader.read_into(FRAMES, self.addresses[clip], out)
        return out

    def trainset_pixels(self) -> TrainsetPixels:
        """The same as the trainer opens them."""
        trainset = Trainset.open(self._root, TRAINSET)
        folder = self._root.pointed("trainset", TRAINSET)
        np.save(f"{folder}/pixels.{self.spec.digest()}.f{FRAMES}.npy", self.addresses, allow_pickle=False)
        return TrainsetPixels(self._root, trainset, folder, "0" * 32, self.spec, None, 0, {})


def _arms(store: Path, footage: Path, count: int) -> Iterator[Arm]:
    steps = count // BATCH
    yield Arm(DECORD, 0, DECODED, partial(_decoding, footage))
    for threads in (1, 2):
        yield Arm(PIXELS, threads, steps * BATCH, partial(_loading, store, steps, threads, True))
    for workers in (1, 2):
        yield Arm(PIXEL_WORKERS, workers, steps * BATCH, partial(_workers, store, workers))
    yield Arm(LATENTS, 1, steps * BATCH, partial(_loading, store, steps, 1, False))


def _decoding(footage: Path) -> Callable[[], None]:
    def work() -> None:
        assert sum(len(batch) for batch in decoded_batches(footage, DECODED, 0)) == DECODED

    return work


def _loading(folder: Path, steps: int, threads: int, pixels: bool) -> Callable[[], None]:
    store = Store(folder)
    loader = store.pixel_loader(steps, Pixels(folder).trainset_pixels()) if pixels else store.loader(steps)

    def work() -> None:
        assert sum(len(batch.draws) for batch in loader.batches(0, threads)) == steps * BATCH

    work()  # maps and memory of the first use are start-up
    return work


def _workers(folder: Path, workers: int) -> Callable[[], None]:
    def work() -> None:
        clips = Pixels(folder)
        loader: DataLoader[np.ndarray] = DataLoader(clips, BATCH, num_workers=workers)
        assert sum(len(batch) for batch in loader) == len(clips)

    return work


def _results(arms: list[Arm], quick: bool, facts: dict[str, Any]) -> dict[str, Any]:
    decord = next(arm for arm in arms if arm.name == DECORD)
    rows: list[dict[str, Any]] = [
        {
            "name": arm.name,
            "workers": arm.workers,
            "clips_per_s": arm.rate,
            "cpu_ms_per_clip": 1000 * arm.cpu_s,
            "times_decord_per_core": decord.cpu_s / arm.cpu_s,
        }
        for arm in arms
    ]
    reached = {row["name"]: row["times_decord_per_core"] for row in rows if row["workers"] == 1}
    targets = {
        name: {"at_least": bound, "measured": reached[arm], "met": reached[arm] >= bound}
        for name, arm, bound in (
            ("pixels against decord, per core", PIXELS, PIXEL_TARGET),
            ("latents against decord, per core", LATENTS, LATENT_TARGET),
        )
    }
    return {"benchmark": "input", "quick": quick, "machine": machine(), **facts, "rows": rows, "targets": targets}


def _print(found: dict[str, Any]) -> None:
    columns = ("arm", "workers", "clips/s", "CPU ms/clip", "x decord per core")
    rows = [tuple(row.values()) for row in found["rows"]]
    show(f"trainer input, {found['clips']} clips; pixels at {found['psnr_db']:.1f} dB", columns, rows)
    for name, said in found["targets"].items():
        verdict = "met" if said["met"] else "missed"
        print(f"{name}: {said['measured']:.1f} (target >= {said['at_least']:g}): {verdict}")


if __name__ == "__main__":
    tyro.cli(main)
