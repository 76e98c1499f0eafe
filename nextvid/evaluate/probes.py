"""The asset `probes`: accuracies of a run's frozen encoders on each benchmark, beside its own random initialisation.

Written for each are rows.parquet (the clips that were scored), features.npz (mean-pooled features of the first test
samples, for pictures) and, last, score.json. The path has the step of the checkpoint and a digest of rows, labels,
settings and seeds; where score.json exists, nothing is computed again.

Axes: n samples, D width.
"""

import io
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from nextvid.config.benchmarks import BenchmarkConfig
from nextvid.config.project import Project
from nextvid.evaluate.attentive import probe_settings
from nextvid.evaluate.benchmark_rows import ROW_COLUMNS, BenchmarkRows, benchmark_rows, per_sample, refuse_unlearnable
from nextvid.evaluate.features import load_networks, run_encoders
from nextvid.evaluate.fitting import NEIGHBOURS
from nextvid.evaluate.scoring import UNFINISHED, OnEpoch, Scored, Task, score_encoder
from nextvid.machine import leased_devices
from nextvid.making.batches import dataset_of
from nextvid.making.outcome import Number, Outcome
from nextvid.making.progress import OnProgress, Progress, noting, silent
from nextvid.making.publishing import read_latest
from nextvid.train.checkpoint import step_of
from nextvid.train.distributed import Ranks
from nextvid.train.run import Run, find_checkpoint, find_run
from nextvid.trainset.pixels import open_pixels
from nextvid.trainset.trainset import Trainset
from storage import atomic, tables
from storage.digest import digest_config
from storage.errors import UpstreamError
from storage.schemas import Clips, Duplicates, Labels, ProbeRows
from storage.store import LatentStore, PixelStore


def make_probes(
    project: Project,
    recipe: str,
    run: str | None = None,
    benchmarks: Sequence[str] = (),
    on_progress: OnProgress = silent,
    step: int | None = None,
) -> Outcome:
    """Score a run's EMA, online and random-init encoders on these benchmarks (all, unless named).

    The checkpoint is that of `step`, else the newest; a run that is named need not have ended. Where score.json exists,
    nothing is computed. The data version is of the run and of all that the scores depend on.
    Raises ConfigError for an unknown benchmark, UpstreamError where run, checkpoint, rows or labels are missing.
    """
    started = time.perf_counter()
    found = find_run(project, recipe, run, ended=run is None)
    path = find_checkpoint(found, step)
    made, rows, size_bytes, scores = False, 0, 0, {}
    numbers: dict[str, Number] = {"trainset": found.trainset}
    left_out: Counter[str] = Counter()
    names = sorted(benchmarks or project.corpus.benchmarks)
    for done, benchmark in enumerate(names):
        on_progress(Progress(f"probes {recipe}", done, len(names)))
        task = plan_task(project, benchmark, found)
        scores[benchmark] = task.digest()
        folder = project.root.probe(recipe, found.id, step_of(path), benchmark, scores[benchmark])
        written = f"{folder}/score.json"
        if not atomic.exists(written):
            with leased_devices(
                1, project.corpus.execution.device, f"probes {recipe}", noting(on_progress, f"probes {recipe}")
            ) as (device,):
                _score(
                    project,
                    found,
                    path,
                    task,
                    folder,
                    Ranks(0, 1, torch.device(device)),
                    lambda name, epoch, loss: None,
                )
            made = True
        score = atomic.read_json(written)
        rows += score["clips"]["test"]
        size_bytes += len(atomic.read_bytes(written))
        numbers[f"{benchmark}_score"] = written
        left_out.update(score["left_out"])
        for name, values in score["encoders"].items():
            numbers |= {f"{benchmark}_{name}_{what}": values[what] for what in ("accuracy", "knn")}
    on_progress(Progress(f"probes {recipe}", len(names), len(names)))
    numbers |= {"dropped": left_out.total()} | {f"dropped_{why}": count for why, count in left_out.items() if count}
    return Outcome(
        asset="probes",
        partition=recipe,
        made=made,
        rows=rows,
        size_bytes=size_bytes,
        seconds=time.perf_counter() - started,
        digest=digest_config({"run": found.id, "scores": scores}),
        run=found.id,
        numbers=numbers,
    )


def plan_task(project: Project, benchmark: str, found: Run) -> Task:
    """Rows, labels, settings and seeds of one score of a run, from tables alone."""
    config = project.benchmark(benchmark)
    trainset = Trainset.open(project.root, found.trainset)
    settings = probe_settings(found.recipe, config.epochs, config.batch, images=config.policy.frames == 1)
    pixels = None
    if found.recipe.model.encoder.input == "pixels":
        assert found.pixels is not None, f"run {found.id} reads pixels and names none"
        pixels = open_pixels(project.root, trainset, found.pixels).spec
    store = LatentStore(project.root, trainset.spec) if pixels is None else PixelStore(project.root, pixels)
    rows = _rows(store, benchmark, config, settings.held_out)
    refuse_unlearnable(rows, config)
    return Task(trainset, config, settings, rows, pixels)


def _rows(store: LatentStore | PixelStore, name: str, config: BenchmarkConfig, held_out: float) -> BenchmarkRows:
    """The benchmark's rows from the tables of its datasets and the commits of what the encoder reads."""
    root = store.root
    batches = [batch for batch in root.batches("clips") if dataset_of(batch) in config.datasets]
    if not batches:
        raise UpstreamError(f"benchmark '{name}': no clips of {', '.join(config.datasets)} yet; make 'latents' first")
    commits = pl.concat([store.commits(batch) for batch in batches])
    clips = tables.read_tables(root, "clips", batches, Clips)
    labels = tables.read_tables(root, "labels", batches, Labels)
    digest = read_latest(root, "duplicates")
    if digest is None:
        raise UpstreamError(f"benchmark '{name}': near-duplicates are unknown; make 'duplicates' first")
    duplicates = tables.read_table(f"{root.pointed('duplicates', digest)}/duplicates.parquet", Duplicates)
    return benchmark_rows(name, config, clips, labels, duplicates, commits, held_out)


def _score(project: Project, run: Run, path: Path, task: Task, folder: str, ranks: Ranks, on_epoch: OnEpoch) -> None:
    """Compute and publish rows, pooled test features and, last, score.json. Every rank calls this."""
    started = time.perf_counter()
    networks = load_networks(run, str(ranks.device), path)
    policy = task.config.policy
    frames = policy.frames if policy.frames > 1 else run.recipe.clip_lengths[0]
    scores = {
        encoder.name: score_encoder(project.root, task, encoder, folder, ranks, on_epoch=on_epoch)
        for encoder in run_encoders(networks, task.trainset, frames)
    }
    if ranks.first:
        tables.write_table(f"{folder}/rows.parquet", task.rows.frame.select(ROW_COLUMNS), ProbeRows)
        buffer, pooled = io.BytesIO(), {name: scored.pooled for name, scored in scores.items()}
        labels = per_sample(task.rows.part("test"), "label")[: len(next(iter(pooled.values())))]
        np.savez(buffer, labels=labels, **pooled)  # type: ignore[arg-type]
        atomic.publish_bytes(f"{folder}/features.npz", buffer.getvalue())
        described = _described(run, task, networks.checkpoint.name, scores, time.perf_counter() - started)
        atomic.publish_json(f"{folder}/score.json", described)
        atomic.remove_tree(f"{folder}/{UNFINISHED}")
    ranks.wait()


def _described(run: Run, task: Task, checkpoint: str, scores: Mapping[str, Scored], seconds: float) -> dict[str, Any]:
    rows, train, test = task.rows, task.rows.part("train"), task.rows.part("test")
    answers = per_sample(test, "label")
    return {
        "recipe": run.recipe.name,
        "run": run.id,
        "checkpoint": checkpoint,
        "trainset": run.trainset,
        "mask_plan": run.mask_plan,
        "encoding_spec": task.trainset.spec.digest(),
        "pixel_spec": None if task.pixels is None else task.pixels.digest(),
        "benchmark": rows.benchmark,
        "datasets": list(task.config.datasets),
        "target": rows.target,
        "classes": list(rows.classes),
        "rows": rows.digest(),
        "seeds": task.seeds,
        "settings": task.settings.model_dump(mode="json"),
        "neighbours": NEIGHBOURS,
        "clips": {
            "train": int(train["sample"].n_unique()),
            "held_out": int(train.filter(pl.col("held_out"))["sample"].n_unique()),
            "test": int(test["clip_group"].n_unique()),
        },
        "limit": task.config.limit,
        "segments": rows.segments,
        "left_out": dict(rows.left_out),
        "chance": float(np.bincount(answers).max() / len(answers)),
        "encoders": {name: scored.numbers for name, scored in scores.items()},
        "seconds": round(seconds, 3),
    }
