"""Probes against the encoder alone, and their memory over ten times the clips: `python -m benchmarks.probe [--quick]`.

`rows`: one epoch of 20 heads (5 rates x 4 weight decays), read from the store, encoded and learnt from, against the
encoder over the same clips from memory; in turns. Making the heads is part of the epoch. `memory`: whole scores of a
small encoder, each in a process of its own, one with ten times the samples of the other, streamed and with features
kept: peak of anonymous memory (pages of mapped files can be dropped at any time), and seconds until the first clip is
encoded. The samples name the same stored rows again and again.
"""

import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import polars as pl
import torch
import tyro
from torch import Tensor

from benchmarks.clips import BATCH_KEY, SHAPE, TRAINSET, random_clips, write_store
from benchmarks.measure import Took, machine, median_ratio, show, timed, write
from nextvid.config.benchmarks import BenchmarkConfig, SweepConfig
from nextvid.config.datasets import ClipPolicy
from nextvid.config.overrides import apply_overrides
from nextvid.config.recipe import RecipeConfig
from nextvid.config.recipes import recipe
from nextvid.evaluate.attentive import ProbeSettings
from nextvid.evaluate.benchmark_rows import BenchmarkRows
from nextvid.evaluate.features import FrozenEncoder, Networks, run_encoders
from nextvid.evaluate.fitting import ALONE, Lesson, fit
from nextvid.evaluate.scoring import Task, score_encoder
from nextvid.evaluate.stream import CLIPS_AT_ONCE, Streamed, open_clips
from nextvid.model.encoder import Encoder
from nextvid.train.step import build_model
from nextvid.trainset.trainset import Trainset
from storage.root import DataRoot
from storage.store import LatentStore

TARGET, MEMORY_TARGET = 0.85, 1.1  # our aims
SWEEP = (SweepConfig(rates=(5e-3, 3e-3, 1e-3, 3e-4, 1e-4), weight_decays=(0.01, 0.1, 0.4, 0.8)),)  # 20 heads
SMALL = (8, 16, 8, 8)  # frames, channels and cells of the demo
SAMPLES, QUICK_SAMPLES, TIMES = 1000, 100, 10
STORED = 64  # rows that samples name
WATCH_S = 0.005


def main(
    quick: bool = False,
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
    clips: int | None = None,
    turns: int | None = None,
) -> None:
    """Measure, print, and with --json write what README.md documents.

    Args:
        quick: two blocks of the encoder, one batch, a tenth of the samples.
        json: file for the results.
        clips: of the epoch, instead of 32 (16 with --quick).
        turns: how many, instead of 3 (1 with --quick).
    """
    rows = [_epoch(clips or (16 if quick else 32), turns or (1 if quick else 3), quick)]
    memory = [_memory(QUICK_SAMPLES if quick else SAMPLES, kept) for kept in (False, True)]
    show(
        "a probe's epoch of 20 heads over the encoder alone, same clips",
        list(rows[0]),
        [list(r.values()) for r in rows],
    )
    show("a whole score at ten times the samples", list(memory[0]), [list(r.values()) for r in memory])
    ratio, growth = rows[0]["epoch_over_encoder"], max(row["memory_ratio"] for row in memory)
    targets = {
        "epoch over encoder": {"at_least": TARGET, "measured": ratio, "met": ratio >= TARGET},
        "memory at ten times": {"at_most": MEMORY_TARGET, "measured": growth, "met": growth <= MEMORY_TARGET},
    }
    for name, target in targets.items():
        print(f"{name}: {target['measured']:.3g} ({'met' if target['met'] else 'missed'})")
    found = {"benchmark": "probe", "quick": quick, "machine": machine(), "rows": rows, "memory": memory}
    write(json, found | {"targets": targets})


def _epoch(clips: int, turns: int, quick: bool) -> dict[str, Any]:
    """Rates of both arms on `nextvid_s_latent`."""
    config = apply_overrides(recipe("nextvid_s_latent"), ["model.encoder.depth=2"] if quick else [])
    with tempfile.TemporaryDirectory(prefix="nextvid-probe-") as folder:
        write_store(random_clips(clips, SHAPE), Path(folder))
        root = DataRoot.open(folder)
        task, encoder = _task(root, clips, clips, SHAPE[0]), _encoder(config, root, SHAPE[0])
        everything, pieces = np.arange(clips), range(CLIPS_AT_ONCE, clips, CLIPS_AT_ONCE)
        with open_clips(root, task.trainset, None, task.rows, encoder, ALONE.device) as opened:
            plain = replace(encoder, encode=lambda given: given.flatten(1)[:, None])
            read = Streamed(plain, opened, "train").of(np.split(everything, pieces))
            raw = [given.float().view(-1, *SHAPE) for given in read]  # read as features are kept, in float16
            streamed = Streamed(encoder, opened, "train")
            labels, settings = task.rows.frame["label"].to_numpy()[:clips], task.settings
            tokens = encoder.encode(raw[0][:1]).shape[1]
            lesson = Lesson(streamed, labels, everything, 2, tokens, encoder.width)
            took: dict[str, list[Took]] = {"encoder": [], "epoch": []}
            for turn in range(turns):
                arms = [
                    ("encoder", lambda: [encoder.encode(given) for given in raw]),
                    ("epoch", lambda: fit(lesson, settings, [0])),
                ]
                for name, work in arms if turn % 2 == 0 else arms[::-1]:
                    took[name].append(timed(work))  # type: ignore[arg-type]
    encoder_took, epoch_took = took["encoder"], took["epoch"]
    return {
        "name": config.name,
        "clips": clips,
        "turns": turns,
        "encoder_clips_per_s": clips / statistics.median(took.wall_s for took in encoder_took),
        "epoch_clips_per_s": clips / statistics.median(took.wall_s for took in epoch_took),
        "epoch_over_encoder": median_ratio([t.wall_s for t in encoder_took], [t.wall_s for t in epoch_took]),
        "in_cpu_time": median_ratio([t.cpu_s for t in encoder_took], [t.cpu_s for t in epoch_took]),
    }


def _memory(samples: int, kept: bool) -> dict[str, Any]:
    """Peaks of two scores, each in a process of its own."""
    found = []
    with tempfile.TemporaryDirectory(prefix="nextvid-probe-") as folder:
        write_store(random_clips(STORED, SMALL), Path(folder), stride=8)
        for count in (samples, TIMES * samples):
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                found.append(process.submit(_score, folder, count, kept).result())
    few, many = found
    return {
        "features": "kept" if kept else "streamed",
        "samples": samples,
        "memory_mb": few["memory_mb"],
        "memory_mb_at_ten_times": many["memory_mb"],
        "memory_ratio": many["memory_mb"] / few["memory_mb"],
        "start_s": few["start_s"],
        "start_s_at_ten_times": many["start_s"],
    }


def _score(folder: str, samples: int, kept: bool) -> dict[str, float]:
    """Peak of anonymous memory of a whole score, and seconds until its first batch is encoded."""
    torch.set_num_threads(1)
    root = DataRoot.open(folder, cache_folder=f"{folder}/cache", cache_bytes=int(kept) << 40)
    config = apply_overrides(recipe("demo"), ["model.encoder.depth=1", "model.encoder.width=64"])
    task = _task(root, samples, STORED, SMALL[0])
    encoder, began, first = _encoder(config, root, SMALL[0]), time.perf_counter(), list[float]()

    def encode(given: Tensor) -> Tensor:
        first.append(time.perf_counter() - began)
        return encoder.encode(given)

    with _peak() as peak:
        score_encoder(root, task, replace(encoder, encode=encode), f"{folder}/{samples}", ALONE)
    return {"memory_mb": max(peak) / 1e6, "start_s": first[0]}


@contextmanager
def _peak() -> Iterator[list[int]]:
    """Anonymous memory of this process in bytes, every WATCH_S."""
    seen, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(WATCH_S):
            lines = Path(f"/proc/{os.getpid()}/status").read_text().splitlines()
            seen[0] = max(seen[0], next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon")))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


def _encoder(config: RecipeConfig, root: DataRoot, frames: int) -> FrozenEncoder:
    """An encoder with random weights."""
    model = build_model(config).eval().requires_grad_(False)
    random: dict[Any, Encoder] = {"random": model.encoder}
    (found,) = run_encoders(Networks(model, random, Path()), Trainset.open(root, TRAINSET), frames)
    return found


def _task(root: DataRoot, samples: int, stored: int, frames: int) -> Task:
    """So many train samples of two classes, a fifth of them held out, and as many test samples."""
    trainset = Trainset.open(root, TRAINSET)
    commits = LatentStore(root, trainset.spec).commits(BATCH_KEY, frames).head(stored)
    numbers = np.arange(2 * samples)
    frame = commits[(numbers % stored).tolist()].with_columns(
        split=pl.Series(np.where(numbers < samples, "train", "test")),
        sample=pl.Series(numbers),
        clip_group=pl.Series(numbers),
        segment=pl.lit(0),
        label=pl.Series(numbers % 2),
        held_out=pl.Series((numbers % 5 == 4) & (numbers < samples)),
    )
    policy = ClipPolicy(frames=frames, fps=4)
    config = BenchmarkConfig(datasets=("random",), target="class", policy=policy, seeds=1, epochs=1)
    settings = ProbeSettings(heads=4, sweep=SWEEP, warm_up_steps=0, own_orders=False, epochs=1, batch=CLIPS_AT_ONCE)
    rows = BenchmarkRows("random", "class", ("a", "b"), 1, frame, {})
    return Task(trainset.spec, config, settings, rows, opened=trainset)


if __name__ == "__main__":
    tyro.cli(main)
