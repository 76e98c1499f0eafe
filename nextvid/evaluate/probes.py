"""The asset `probes`: accuracies of frozen encoders on each benchmark: a run's, or one that corpus.yaml names.

A run's are its averaged and its online encoder, beside its own random initialisation.

Written for each are rows.parquet (the clips that were scored), features.npz (mean-pooled features of the first test
samples, for pictures) and, last, score.json. The path has the step of the checkpoint and a digest of rows, labels,
settings and seeds; where score.json exists, nothing is computed again.

Axes: n samples, D width.
"""

import io
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from nextvid.config.benchmarks import BenchmarkConfig
from nextvid.config.project import Project
from nextvid.encode.plan import pixel_spec
from nextvid.evaluate.attentive import probe_settings
from nextvid.evaluate.benchmark_rows import ROW_COLUMNS, BenchmarkRows, benchmark_rows, per_sample, refuse_unlearnable
from nextvid.evaluate.encoders import encoder_digest, encoder_width, frames_of, load_encoder
from nextvid.evaluate.features import level_blocks, load_networks, run_encoders
from nextvid.evaluate.fitting import NEIGHBOURS
from nextvid.evaluate.scoring import KNN, UNFINISHED, OnEpoch, Scored, Task, score_encoder
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
from storage.errors import RefusedError, UpstreamError
from storage.schemas import Clips, Duplicates, Labels, ProbeRows
from storage.spec import PixelSpec
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

    `recipe` may be an encoder of corpus.yaml, which has no run. The checkpoint is that of `step`, else the newest; a
    run that is named need not have ended. Where score.json exists, nothing is computed. The data version is of the run
    or encoder and of all that the scores depend on.

    Raises ConfigError for an unknown benchmark, UpstreamError where run, checkpoint, rows or labels are missing.
    """
    started = time.perf_counter()
    found = None if recipe in project.corpus.encoders else find_run(project, recipe, run, ended=run is None)
    checkpoint = find_checkpoint(found, step) if found else None
    identity = found.id if found else encoder_digest(project.corpus.encoders[recipe])
    made, rows, size_bytes, scores = False, 0, 0, {}
    numbers: dict[str, Number] = {"trainset": found.trainset} if found else {"encoder": identity}
    left_out: Counter[str] = Counter()
    names = sorted(benchmarks or project.corpus.benchmarks)
    tasks = {  # all before anything is encoded
        name: plan_task(project, name, found) if found else plan_encoder(project, name, recipe) for name in names
    }
    for done, (benchmark, task) in enumerate(tasks.items()):
        on_progress(Progress(f"probes {recipe}", done, len(names)))
        scores[benchmark] = task.digest()
        if checkpoint:
            folder = project.root.probe(recipe, identity, step_of(checkpoint), benchmark, scores[benchmark])
        else:
            folder = project.root.encoder_probe(recipe, identity, benchmark, scores[benchmark])
        written = f"{folder}/score.json"
        if not atomic.exists(written):
            with _one_device(project, f"probes {recipe}", on_progress) as ranks:
                _score(project, found or recipe, checkpoint, task, folder, ranks, lambda name, epoch, loss: None)
            made = True
        score = atomic.read_json(written)
        rows += score["clips"]["test"]
        size_bytes += len(atomic.read_bytes(written))
        numbers[f"{benchmark}_score"] = written
        left_out.update(score["left_out"])
        for name, values in score["encoders"].items():
            told = [what for what in ("accuracy", *KNN.values()) if what in values]
            numbers |= {f"{benchmark}_{name}_{what}": values[what] for what in told}
    on_progress(Progress(f"probes {recipe}", len(names), len(names)))
    numbers |= {"dropped": left_out.total()} | {f"dropped_{why}": count for why, count in left_out.items() if count}
    return Outcome(
        asset="probes",
        partition=recipe,
        made=made,
        rows=rows,
        size_bytes=size_bytes,
        seconds=time.perf_counter() - started,
        digest=digest_config({"run": identity, "scores": scores}),
        run=found.id if found else None,
        numbers=numbers,
    )


@contextmanager
def _one_device(project: Project, name: str, on_progress: OnProgress) -> Iterator[Ranks]:
    """This process alone, on one device that is leased meanwhile."""
    with leased_devices(1, project.corpus.execution.device, name, noting(on_progress, name)) as (device,):
        yield Ranks(0, 1, torch.device(device))


def plan_task(project: Project, benchmark: str, found: Run) -> Task:
    """Rows, labels, settings and seeds of one score of a run, from tables alone.

    Raises RefusedError where levels or heads do not fit the encoder.
    """
    trainset, encoder = Trainset.open(project.root, found.trainset), found.recipe.model.encoder
    level_blocks(encoder.depth, project.benchmark(benchmark).levels)
    pixels = None
    if encoder.input == "pixels":
        assert found.pixels is not None, f"run {found.id} reads pixels and names none"
        pixels = open_pixels(project.root, trainset, found.pixels).spec
    return _task(project, benchmark, trainset, pixels, encoder.width)


def plan_encoder(project: Project, benchmark: str, name: str) -> Task:
    """The same of an encoder of corpus.yaml, which is scored on the newest trainset's encoding or accepted pixels.

    Raises RefusedError where the rows have no pixels, or clips, levels or heads do not fit the encoder.
    """
    config, encoder = project.benchmark(benchmark), project.corpus.encoders[name]
    trainset = Trainset.open(project.root)
    frames_of(encoder, config.policy.frames, config.levels)
    pixels = None
    if encoder.family != "latents":
        pixels = pixel_spec(project, trainset.spec)
        if pixels is None:
            raise RefusedError(
                f"encoder '{name}' reads pixels, and the rows of benchmark '{benchmark}' have none: put 'pixels: "
                f"{{quality: 90}}' under 'encoding' in {project.path}, make 'latents' again, then ask again"
            )
    return _task(project, benchmark, trainset, pixels, encoder_width(encoder, trainset.spec.channels))


def _task(project: Project, benchmark: str, trainset: Trainset, pixels: PixelSpec | None, width: int) -> Task:
    config = project.benchmark(benchmark)
    settings = probe_settings(width, "latents" if pixels is None else "pixels", config)
    if width % settings.heads:
        raise RefusedError(
            f"{settings.heads} heads of attention cannot share an encoder's width of {width}: set 'attention_heads' of "
            f"benchmark '{benchmark}'"
        )
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


def _score(
    project: Project, of: Run | str, checkpoint: Path | None, task: Task, folder: str, ranks: Ranks, on_epoch: OnEpoch
) -> None:
    """Compute and publish rows, pooled test features and, last, score.json. Every rank calls this.

    `of` is a run, or the name of an encoder of corpus.yaml.
    """
    started = time.perf_counter()
    frames, levels = task.config.policy.frames, task.config.levels
    if isinstance(of, Run):
        networks, model = load_networks(of, str(ranks.device), checkpoint), of.recipe.model
        frames = frames if frames > 1 else of.recipe.clip_lengths[0]
        blocks = level_blocks(model.encoder.depth, levels) if levels > 1 else ()
        encoders = run_encoders(networks, task.trainset, frames, blocks)
        about: dict[str, str | None] = {
            "recipe": of.recipe.name,
            "run": of.id,
            "checkpoint": networks.checkpoint.name,
            "trainset": of.trainset,
            "mask_plan": of.mask_plan,
        }
    else:
        config, spec = project.corpus.encoders[of], task.trainset.spec
        frames = frames_of(config, frames, levels)
        encoders = [load_encoder(of, config, frames, spec, levels, ranks.device)]
        about = {"recipe": of, "run": encoder_digest(config), "family": config.family, "trainset": None}
    scores = {
        encoder.name: score_encoder(project.root, task, encoder, folder, ranks, on_epoch=on_epoch)
        for encoder in encoders
    }
    if ranks.first:
        tables.write_table(f"{folder}/rows.parquet", task.rows.frame.select(ROW_COLUMNS), ProbeRows)
        buffer, pooled = io.BytesIO(), {name: scored.pooled for name, scored in scores.items()}
        labels = per_sample(task.rows.part("test"), "label")[: len(next(iter(pooled.values())))]
        np.savez(buffer, labels=labels, **pooled)  # type: ignore[arg-type]
        atomic.publish_bytes(f"{folder}/features.npz", buffer.getvalue())
        described = about | _described(task, scores, time.perf_counter() - started)
        atomic.publish_json(f"{folder}/score.json", described)
        atomic.remove_tree(f"{folder}/{UNFINISHED}")
    ranks.wait()


def _described(task: Task, scores: Mapping[str, Scored], seconds: float) -> dict[str, Any]:
    rows, train, test = task.rows, task.rows.part("train"), task.rows.part("test")
    answers = per_sample(test, "label")
    return {
        "encoding_spec": task.trainset.spec.digest(),
        "pixel_spec": None if task.pixels is None else task.pixels.digest(),
        "benchmark": rows.benchmark,
        "datasets": list(task.config.datasets),
        "target": rows.target,
        "classes": list(rows.classes),
        "rows": rows.digest(),
        "tested": digest_config([[row.hex(), label] for row, label in test.select("row_id", "label").iter_rows()]),
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
