"""One run of the study: train an encoder or take an untrained one, score it, write one result file.

Training and scoring are the functions that `nextvid make pretrain` and `nextvid make probes` call, here in one process
and one thread. A run that was killed goes on from its newest checkpoint; its result file is published whole.
"""

import math
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from examples.study import mae
from examples.study.tables import ARMS, DATA, Cell, Size, overrides
from nextvid.config.project import Project, open_project
from nextvid.config.recipe import ExecutionConfig
from nextvid.evaluate.encoders import frames_of, load_encoder
from nextvid.evaluate.features import FrozenEncoder, frozen, load_networks
from nextvid.evaluate.probes import plan_encoder, plan_task
from nextvid.evaluate.scoring import Task, score_encoder
from nextvid.model.encoder import Encoder
from nextvid.train.batches import training_batches
from nextvid.train.diagnose import collapsed
from nextvid.train.distributed import join
from nextvid.train.events import read_events
from nextvid.train.loop import train
from nextvid.train.pretrain import finish_run, prepare_run
from nextvid.train.run import Run, open_run
from nextvid.train.step import build_model
from storage import atomic

RECIPE = "demo"


def result_file(results: Path, cell: Cell, size: Size) -> Path:
    """Where a run's result is, or will be."""
    return results / cell.file(size)


def carry_out(root: Path, results: Path, cell: Cell, size: Size) -> dict[str, Any]:
    """Make one run and publish its result in `results`; the trainset of its data is in `root`."""
    file = result_file(results, cell, size)
    if file.is_file():
        found: dict[str, Any] = atomic.read_json(str(file))
        return found
    began, used = time.perf_counter(), time.process_time()
    project, working = open_project(root / cell.data / "corpus.yaml"), root / "working" / file.stem
    trained: dict[str, Any] = {}
    if ARMS[cell.arm].kind == "floor":
        tasks = {target: plan_encoder(project, target, cell.arm) for target in DATA[cell.data].targets}
        encoders = {target: _floor(project, cell.arm, target, task) for target, task in tasks.items()}
    else:
        run = _prepared(project, cell, size)
        tasks = {target: plan_task(project, target, run) for target in DATA[cell.data].targets}
        encoder, trained = _encoder(project, cell, size, run)
        encoders = {target: _frozen(cell, run, encoder, task) for target, task in tasks.items()}
    with join(ExecutionConfig(device=project.corpus.execution.device)) as ranks:
        scores = {
            target: score_encoder(project.root, task, encoders[target], str(working / target), ranks).numbers
            for target, task in tasks.items()
        }
    result = {
        **cell.settings(size), **trained, "scores": scores,
        "tested": {target: int(task.rows.part("test")["clip_group"].n_unique()) for target, task in tasks.items()},
        "cpu_s": round(time.process_time() - used, 1), "wall_s": round(time.perf_counter() - began, 1),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "ended_s": round(time.time()),
    }  # fmt: skip
    atomic.publish_json(str(file), result)
    atomic.remove_tree(str(working))
    if ARMS[cell.arm].kind != "floor":
        atomic.remove_tree(str(run.folder))  # the result has its curves, and weights are 15 MB a checkpoint
    return result


def _prepared(project: Project, cell: Cell, size: Size) -> Run:
    every = size.steps // size.looks
    how = ExecutionConfig(
        micro_batch=0, log_every_steps=every, diagnose_every_steps=every, keep_last=1,
        checkpoint_every_steps=max(1, size.steps // 2), sinks=(), device=project.corpus.execution.device,
    )  # fmt: skip
    untrained = {"random": 1, "mae": 2}  # repeats of the recipe `full`, so that no run has its folder
    repeat = untrained.get(ARMS[cell.arm].kind, 0)
    return open_run(Path(prepare_run(project, RECIPE, overrides(cell, size), how, repeat=repeat).folder))


def _encoder(project: Project, cell: Cell, size: Size, run: Run) -> tuple[Encoder, dict[str, Any]]:
    """The averaged encoder of an arm, and what its training showed."""
    match ARMS[cell.arm].kind:
        case "recipe":
            with join(run.how) as ranks:
                train(project, run, ranks)
            finish_run(project, RECIPE, run.id)
            return load_networks(run).encoders["ema"], _shown(run)
        case "mae":
            batches = training_batches(project.path, RECIPE, overrides(cell, size))
            encoder, losses = mae.train_mae(batches)
            return encoder, {"mae": {"first": losses[0], "last": _mean(losses[-(size.steps // size.looks) :])}}
        case _:
            return build_model(run.recipe).encoder.eval().requires_grad_(False), {}


def _shown(run: Run) -> dict[str, Any]:
    """Losses at the first and last lines of events, effective rank over steps, and whether that is a collapse."""
    events, steps = read_events(run.folder), run.recipe.steps
    lines, looks = ([e for e in events if e["kind"] == kind] for kind in ("step", "diagnostics"))
    losses: dict[str, Any] = {
        name: {"first": float(lines[0][name]), "last": float(lines[-1][name])}
        for name in ("flow", "align")
        if math.isfinite(float(lines[-1][name]))  # "nan" where the recipe has no such loss
    }
    curve = [[look["step"], look["effective_rank"], look["online_effective_rank"]] for look in looks]
    return {"run": run.id, **losses, "rank": curve, "collapsed": collapsed(curve[-1][1], curve[0][1], steps, steps)}


def _frozen(cell: Cell, run: Run, encoder: Encoder, task: Task) -> FrozenEncoder:
    frames = task.config.policy.frames
    found = frozen(cell.arm, encoder, run.recipe, task.trainset, frames if frames > 1 else run.recipe.clip_lengths[0])
    if ARMS[cell.arm].kind != "mae":
        return found
    return FrozenEncoder(
        found.name, found.reads, found.frames, found.width, found.times, partial(mae.features, encoder, run.recipe),
        fold=found.fold,
    )  # fmt: skip


def _floor(project: Project, arm: str, target: str, task: Task) -> FrozenEncoder:
    config = project.corpus.encoders[arm]
    frames = frames_of(config, project.benchmark(target).policy.frames, 1)
    return load_encoder(arm, config, frames, task.spec, 1, torch.device("cpu"))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
