"""The asset `probes`: accuracies of a run's frozen encoders on each benchmark, beside its own random initialisation.

Written for each are rows.parquet (the clips that were scored), features.npz (mean-pooled test features, for pictures)
and, last, score.json. The digest in the path is of rows, labels, settings and seeds; where score.json exists, nothing
is computed again.

Axes: N samples, L tokens, D width, Y classes.
"""

import io
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from nextvid.config.benchmarks import BenchmarkConfig
from nextvid.config.project import Project
from nextvid.config.recipe import RecipeConfig
from nextvid.evaluate.attentive import SMALL_WIDTH, ProbeSettings, probe_settings
from nextvid.evaluate.benchmark_rows import ROW_COLUMNS, BenchmarkRows, benchmark_rows, per_sample, refuse_unlearnable
from nextvid.evaluate.features import (
    Augmented,
    LatentSource,
    Networks,
    PixelSource,
    features,
    load_networks,
)
from nextvid.evaluate.fitting import NEIGHBOURS, accuracies, fit, nearest_labels, normalise
from nextvid.machine import leased_devices
from nextvid.making.batches import dataset_of
from nextvid.making.outcome import Number, Outcome
from nextvid.making.progress import OnProgress, Progress, noting, silent
from nextvid.making.publishing import read_latest
from nextvid.model.encoder import Encoder
from nextvid.train.run import Run, find_run
from nextvid.trainset.pixels import open_pixels
from nextvid.trainset.trainset import Trainset
from storage import atomic, tables
from storage.digest import digest_config
from storage.errors import UpstreamError
from storage.schemas import Clips, Duplicates, Labels, ProbeRows
from storage.spec import PixelSpec
from storage.store import LatentStore, PixelStore

SMALL_LIMITS = {"train": 1000, "test": 1000}  # clips; 1000 test clips resolve 3 points (docs/demo.md)
FEATURE_BYTES = 16 << 30  # our bound on features in memory; larger encoders are probed on as many clips as fit


@dataclass(frozen=True)
class Task:
    """Everything that a score depends on, before anything is computed."""

    run: Run
    trainset: Trainset
    config: BenchmarkConfig
    settings: ProbeSettings
    rows: BenchmarkRows
    pixels: PixelSpec | None = None  # what the encoder reads; None where it reads latents

    @property
    def seeds(self) -> list[int]:
        """Seeds of the probe heads."""
        return list(range(self.config.seeds))

    def digest(self) -> str:
        """Id of rows, labels, settings and seeds."""
        default: set[str] = {"augment"} if self.settings.augment == "none" else set()  # keeps digests of older scores
        return digest_config(
            {
                "rows": self.rows.digest(),
                "benchmark": self.config.values(),
                "settings": self.settings.model_dump(mode="json", exclude=default),
                "neighbours": NEIGHBOURS,
            }
        )


def make_probes(
    project: Project,
    recipe: str,
    run: str | None = None,
    benchmarks: Sequence[str] = (),
    on_progress: OnProgress = silent,
) -> Outcome:
    """Score a run's EMA, online and random-init encoders on these benchmarks (all, unless named).

    Where score.json exists, nothing is computed. The data version is of the run and of all that the scores depend on.
    Raises ConfigError for an unknown benchmark, UpstreamError where run, rows or labels are missing.
    """
    started = time.perf_counter()
    found = find_run(project, recipe, run)
    made, rows, size_bytes, scores = False, 0, 0, {}
    numbers: dict[str, Number] = {"trainset": found.trainset}
    left_out: Counter[str] = Counter()
    names = sorted(benchmarks or project.corpus.benchmarks)
    for done, benchmark in enumerate(names):
        on_progress(Progress(f"probes {recipe}", done, len(names)))
        task = plan_task(project, benchmark, found)
        scores[benchmark] = task.digest()
        folder = project.root.probe(recipe, found.id, benchmark, scores[benchmark])
        path = f"{folder}/score.json"
        if not atomic.exists(path):
            with leased_devices(
                1, project.corpus.execution.device, f"probes {recipe}", noting(on_progress, f"probes {recipe}")
            ) as (device,):
                _score(project, task, folder, device)
            made = True
        score = atomic.read_json(path)
        rows += score["clips"]["test"]
        size_bytes += len(atomic.read_bytes(path))
        numbers[f"{benchmark}_score"] = path
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
    rows = _rows(store, benchmark, config, settings, _limits(found.recipe, config, settings))
    refuse_unlearnable(rows, config)
    return Task(found, trainset, config, settings, rows, pixels)


def _rows(
    store: LatentStore | PixelStore,
    name: str,
    config: BenchmarkConfig,
    settings: ProbeSettings,
    limits: Mapping[str, int],
) -> BenchmarkRows:
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
    return benchmark_rows(name, config, clips, labels, duplicates, commits, limits, settings.held_out)


def _limits(recipe: RecipeConfig, config: BenchmarkConfig, settings: ProbeSettings) -> dict[str, int]:
    """Largest numbers of shots by split: SMALL_LIMITS for small encoders, else as many as fit in memory.

    Features are held beside their normalised copy, twice where clips are varied (an epoch's features and their copy).
    """
    if recipe.model.encoder.width < SMALL_WIDTH:
        return dict(SMALL_LIMITS)
    frames = config.policy.frames if config.policy.frames > 1 else recipe.clip_lengths[0]
    tokens = frames // recipe.model.tubelet * recipe.model.cells * config.policy.clips_per_shot * config.policy.views
    copies = 2 if settings.augment == "none" else 4
    fitting = FEATURE_BYTES // (copies * 4 * tokens * recipe.model.encoder.width)
    return {"train": fitting * 3 // 4, "test": fitting // 4}


def _score(project: Project, task: Task, folder: str, device: str) -> None:
    """Compute and publish rows, pooled test features and, last, score.json."""
    started = time.perf_counter()
    networks = load_networks(task.run, device)
    policy, recipe = task.config.policy, task.run.recipe
    frames = policy.frames if policy.frames > 1 else recipe.clip_lengths[0]
    batches = task.rows.frame["batch"].unique().sort().to_list()
    source: LatentSource | PixelSource = (
        LatentSource(project.root, task.trainset, recipe, batches, frames)
        if task.pixels is None
        else PixelSource(project.root, task.pixels, recipe, batches, frames)
    )
    scores: dict[str, Any] = {}
    pooled: dict[str, np.ndarray] = {}
    with closing(source):
        for name, encoder in networks.encoders.items():
            train, test = (
                features(encoder, recipe, source, task.rows.part(split), task.rows.segments, device)
                for split in ("train", "test")
            )
            scores[name] = score_encoder(train, test, task, device, _varied(encoder, task, source, device))
            pooled[name] = test.mean(axis=1)
    tables.write_table(f"{folder}/rows.parquet", task.rows.frame.select(ROW_COLUMNS), ProbeRows)
    buffer = io.BytesIO()
    np.savez(buffer, labels=per_sample(task.rows.part("test"), "label"), **pooled)  # type: ignore[arg-type]
    atomic.publish_bytes(f"{folder}/features.npz", buffer.getvalue())
    atomic.publish_json(f"{folder}/score.json", _described(task, networks, scores, time.perf_counter() - started))


def _varied(
    encoder: Encoder, task: Task, source: LatentSource | PixelSource, device: str
) -> Callable[[int], np.ndarray] | None:
    """Features, by epoch, of the varied clips that heads learn from; None where clips are not varied."""
    if not isinstance(source, PixelSource):
        return None
    settings, train = task.settings, task.rows.part("train")
    rows = train.filter(~pl.col("held_out"))

    def of_epoch(epoch: int) -> np.ndarray:
        clips = Augmented(source, settings.augment, task.seeds[0], epoch)
        return features(encoder, task.run.recipe, clips, rows, task.rows.segments, device)

    return of_epoch


def score_encoder(
    train: np.ndarray,
    test: np.ndarray,
    task: Task,
    device: str = "cpu",
    varied: Callable[[int], np.ndarray] | None = None,
) -> dict[str, Any]:
    """Attentive-probe and k-NN accuracy of features [N, L, D].

    Heads learn from the part of probe-train that is not held out, or from `varied` features of each epoch instead; the
    held-out part chooses one learning rate for all seeds, by their mean accuracy. Test clips are scored once, with that
    rate. Without held-out clips the first rate is taken.
    """
    rows = task.rows
    labels, held = (per_sample(rows.part("train"), column) for column in ("label", "held_out"))
    answers, groups = (per_sample(rows.part("test"), column) for column in ("label", "clip_group"))
    chosen = normalise(train[held], device)
    learnt = normalise(train[~held], device) if varied is None else lambda epoch: normalise(varied(epoch), device)
    probes = fit(learnt, labels[~held], len(rows.classes), task.settings, task.seeds)
    by_rate = accuracies(probes, chosen, labels[held]).mean(axis=0) if held.any() else np.zeros(1)
    rate = int(by_rate.argmax())
    by_seed = accuracies(probes, normalise(test, device), answers, groups)[:, rate]
    clips = len(np.unique(groups))
    nearest = float((nearest_labels(train.mean(axis=1), labels, test.mean(axis=1)) == answers).mean())
    return {
        "accuracy": float(by_seed.mean()),
        "standard_error": standard_error(float(by_seed.mean()), clips),
        "by_seed": [float(value) for value in by_seed],
        "rate": task.settings.rates[rate],
        "held_out_by_rate": [float(value) for value in by_rate],
        "knn": nearest,
        "knn_standard_error": standard_error(nearest, len(answers)),
    }


def standard_error(accuracy: float, clips: int) -> float:
    """Binomial standard error of an accuracy on so many test clips; seeds of heads share the clips and do not count."""
    return math.sqrt(accuracy * (1 - accuracy) / clips)


def _described(task: Task, networks: Networks, scores: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    rows, train, test = task.rows, task.rows.part("train"), task.rows.part("test")
    answers = per_sample(test, "label")
    return {
        "recipe": task.run.recipe.name,
        "run": task.run.id,
        "checkpoint": networks.checkpoint.name,
        "trainset": task.run.trainset,
        "mask_plan": task.run.mask_plan,
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
        "segments": rows.segments,
        "left_out": dict(rows.left_out),
        "chance": float(np.bincount(answers).max() / len(answers)),
        "encoders": dict(scores),
        "seconds": round(seconds, 3),
    }
