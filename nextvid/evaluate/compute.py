"""Scores, computed by one rank of several: each planned benchmark that has none yet, with every encoder of the plan.

Written for each benchmark are rows.parquet (the clips that were scored), features.npz (for pictures: mean-pooled
features of the first test samples, and what `Pictured` of pictured.py keeps) and, last, score.json; beside them what a
killed process goes on from. The path has the step of the checkpoint and a digest of rows, labels, settings and seeds.
Each epoch is an event (nextvid/train/events.py).

Axes: n samples, D width.
"""

import io
import os
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from nextvid.config.project import Project
from nextvid.evaluate.benchmark_rows import ROW_COLUMNS, per_sample
from nextvid.evaluate.encoders import frames_of, load_encoder
from nextvid.evaluate.features import FrozenEncoder, Networks, level_blocks, load_networks, run_encoders
from nextvid.evaluate.fitting import NEIGHBOURS
from nextvid.evaluate.kept import scratch_folder
from nextvid.evaluate.probes import Planned
from nextvid.evaluate.scoring import UNFINISHED, Scored, Task, score_encoder, seen_clips
from nextvid.train.distributed import Ranks
from nextvid.train.events import Reporter
from nextvid.train.run import run_lock
from storage import atomic, tables
from storage.digest import digest_config
from storage.errors import NExTVidError
from storage.records import publish_record
from storage.schemas import ProbeRows

LEFTOVER_AGE_S = 0.0  # rank 0 holds the lock, so a half-written file in the folder has no writer: remove it at any age


def compute_probes(project: Project, planned: Planned, ranks: Ranks, threads: int = 1) -> None:
    """Compute the scores that are missing. Every rank calls this. Raises ConflictError if another process does."""
    with ExitStack() as stack:
        if ranks.first:
            atomic.make_folder(Path(planned.folder))
            stack.enter_context(run_lock(Path(planned.folder)))
            atomic.remove_leftovers(planned.folder, LEFTOVER_AGE_S)
        missing = ranks.from_first("\n".join(planned.missing) if ranks.first else None)
        tasks = {name: planned.tasks[name] for name in (missing or "").split()}
        total = sum(_trainings(planned, task) * task.settings.epochs for task in tasks.values())
        reporter = None
        if ranks.first:
            reporter = stack.enter_context(Reporter(Path(planned.folder), total, f"probes {planned.name}"))
            facts = {"ranks": ranks.count, "device": str(ranks.device), "process": os.getpid(), "steps": total}
            reporter.event("start", 0, facts | {"checkpoint": planned.checkpoint and planned.checkpoint.name})
        done = 0
        try:
            networks = None
            if planned.run is not None:
                networks = load_networks(planned.run, str(ranks.device), planned.checkpoint)
            shared = Shared(project, planned, tasks)
            for name, task in tasks.items():
                _score(project, planned, name, networks, shared, ranks, threads, reporter, done)
                done += _trainings(planned, task) * task.settings.epochs
            if ranks.first:
                shared.remove()
        except NExTVidError as error:
            if reporter:
                reporter.event("error", done, {"error": error.kind, "message": str(error)})
            raise
        if reporter:
            reporter.event("end", total, {})


def _trainings(planned: Planned, task: Task) -> int:
    """How many encoders a score has: of a run three; without the online one for fine-tuning, which costs far more."""
    if planned.run is None:
        return 1
    return 3 if task.config.finetune is None else 2


class Shared:
    """Scratch folders of features that several of the benchmarks read: each encoder sees their clips once."""

    def __init__(self, project: Project, planned: Planned, tasks: Mapping[str, Task]) -> None:
        self._root, self._of = project.root, [planned.folder, planned.checkpoint and planned.checkpoint.name]
        clips = {
            name: {split: seen_clips(task, split) for split in ("train", "test")}
            if task.config.finetune is None
            else {}
            for name, task in tasks.items()
        }
        counts = Counter(one for splits in clips.values() for one in splits.values())
        self._clips = {
            name: {split: one for split, one in splits.items() if counts[one] > 1} for name, splits in clips.items()
        }
        self._used: set[str] = set()

    def of(self, benchmark: str, encoder: str) -> dict[str, str]:
        """Names of the folders by split."""
        found = {
            split: digest_config({"of": self._of, "encoder": encoder, "clips": clips})
            for split, clips in self._clips[benchmark].items()
        }
        self._used.update(found.values())
        return found

    def remove(self) -> None:
        """Remove the folders that were used."""
        for name in self._used:
            atomic.remove_tree(str(scratch_folder(self._root, name)))


def _encoders(
    project: Project, planned: Planned, networks: Networks | None, task: Task, ranks: Ranks
) -> tuple[list[FrozenEncoder], dict[str, str | None]]:
    """The encoders of a plan, and what a score says of them."""
    frames, levels = task.config.policy.frames, task.config.levels
    if networks is None:
        config, spec = project.corpus.encoders[planned.name], task.spec
        loaded = load_encoder(planned.name, config, frames_of(config, frames, levels), spec, levels, ranks.device)
        return [loaded], {"recipe": planned.name, "run": planned.identity, "family": config.family, "trainset": None}
    assert planned.run is not None, "networks are a run's"
    recipe = planned.run.recipe
    blocks = level_blocks(recipe.model.encoder.depth, levels) if levels > 1 else ()
    about: dict[str, str | None] = {
        "recipe": recipe.name,
        "run": planned.run.id,
        "checkpoint": networks.checkpoint.name,
        "trainset": planned.run.trainset,
        "mask_plan": planned.run.mask_plan,
    }
    if task.config.finetune is not None:  # which changes them
        networks = load_networks(planned.run, str(ranks.device), planned.checkpoint)
    found = run_encoders(networks, task.trainset, frames if frames > 1 else recipe.clip_lengths[0], blocks)
    return [one for one in found if task.config.finetune is None or one.name != "online"], about


def _score(
    project: Project, planned: Planned, benchmark: str, networks: Networks | None, shared: Shared, ranks: Ranks,
    threads: int, reporter: Reporter | None, before: int,
) -> None:  # fmt: skip
    """Compute and publish rows, pooled test features and, last, score.json.

    `before`: epochs of the benchmarks before. The step of an event is the number of epochs of all encoders so far.
    """
    started, task, folder = time.perf_counter(), planned.tasks[benchmark], planned.folders[benchmark]
    encoders, about = _encoders(project, planned, networks, task, ranks)
    order = [encoder.name for encoder in encoders]

    def on_epoch(encoder: str, epoch: int, loss: float) -> None:
        if reporter:
            step = before + order.index(encoder) * task.settings.epochs + epoch + 1
            facts = {"benchmark": benchmark, "encoder": encoder, "epoch": epoch + 1, "loss": round(loss, 4)}
            reporter.event("epoch", step, facts)

    scores = {
        encoder.name: score_encoder(
            project.root, task, encoder, folder, ranks, threads, on_epoch, shared.of(benchmark, encoder.name)
        )
        for encoder in encoders
    }
    if ranks.first:
        tables.write_table(f"{folder}/rows.parquet", task.rows.frame.select(ROW_COLUMNS), ProbeRows)
        buffer, pooled = io.BytesIO(), {name: scored.pooled for name, scored in scores.items()}
        labels = per_sample(task.rows.part("test"), "label")[: len(next(iter(pooled.values())))]
        places = {f"{name}/{kind}": found for name, one in scores.items() for kind, found in one.places.items()}
        np.savez(buffer, labels=labels, **pooled, **places)  # type: ignore[arg-type]
        atomic.publish_bytes(f"{folder}/features.npz", buffer.getvalue())
        described = about | _described(task, scores, time.perf_counter() - started)
        publish_record(f"{folder}/score.json", described)
        atomic.remove_tree(f"{folder}/{UNFINISHED}")
    ranks.wait()


def _described(task: Task, scores: Mapping[str, Scored], seconds: float) -> dict[str, Any]:
    rows, train, test = task.rows, task.rows.part("train"), task.rows.part("test")
    answers = per_sample(test, "label")
    return {
        "encoding_spec": task.spec.digest(),
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
        **{name: getattr(task.config, name) for name in ("protocol", "levels", "judged", "train_views")},
        "cut_from": task.config.policy.cut_from,
        "finetune": None if task.config.finetune is None else task.config.finetune.model_dump(mode="json"),
        "segments": rows.segments,
        "left_out": dict(rows.left_out),
        "chance": float(np.bincount(answers).max() / len(answers)),
        "encoders": {name: scored.numbers for name, scored in scores.items()},
        "seconds": round(seconds, 3),
    }
