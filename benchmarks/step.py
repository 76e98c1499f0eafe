"""A training step's wait for data: `python -m benchmarks.step [--quick] [--json FILE] [--recipe R] [--batch N]
[--trace FILE]`.

The trainer's own loop (nextvid/train/loop.py) over random latents in a store on this machine's disk, with one loader
thread; the share of time in which a step waited is what the run's events.jsonl says. Two arms in turns, each turn a run
of its own: the store's pages in the cache, and dropped from it. The first steps, which wait for the first read and for
kernels to be chosen, are separated. FLOPs are those of the model's cost formulas (docs/method.md 12), MFU is theirs a
second over a GPU's bf16 peak; a CPU has none.
"""

import statistics
import tempfile
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch.profiler import profile

from benchmarks.clips import MASK_ENTRIES, TRAINSET, random_clips, write_store
from benchmarks.measure import evict, machine, show, write
from nextvid.config.project import Project, open_project
from nextvid.config.recipe import ExecutionConfig, RecipeConfig
from nextvid.config.recipes import recipe as recipe_by_name
from nextvid.train.distributed import join
from nextvid.train.events import read_events
from nextvid.train.loop import speeds, train
from nextvid.train.run import plan_run, write_run
from nextvid.trainset.mask_plan import grid_of, make_plan, plan_digest
from storage.atomic import publish_json

TARGET = 0.01  # share of a step's time, our aim
QUICK_STEPS, STEPS = 40, 120
QUICK_TURNS, TURNS = 1, 3
TRACED = 15  # steps of a profile
LOGGED = 5  # steps a line of events.jsonl
LEFT_OUT = 2  # lines at the start of a run
CLIPS_A_DRAW = 2  # the store holds twice what a run draws, so that cold pages stay cold until they are drawn
ARMS = ("in the page cache", "page-cold")


@dataclass(frozen=True)
class Measured:
    """One run: medians and sums over its lines but the first ones."""

    step_s: float
    wait_share: float
    first_wait_s: float  # in the lines left out
    cached: float  # share of the store's pages that were in the cache at the start


def main(
    quick: bool = False,
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
    recipe: str = "demo",
    batch: int | None = None,
    trace: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
) -> None:
    """Measure, print a table, and with --json write what README.md documents.

    Args:
        quick: one turn of 40 steps, in under a minute.
        json: file for the results.
        recipe: one that reads latents; the demo's is small enough for a CPU.
        batch: clips a step; the recipe's own unless given.
        trace: file for a profile of one more run of 15 steps, which chrome://tracing and Perfetto show.
    """
    steps, turns = (QUICK_STEPS, QUICK_TURNS) if quick else (STEPS, TURNS)
    config = one_stage(recipe_by_name(recipe), steps, batch)
    found: dict[str, list[Measured]] = {name: [] for name in ARMS}
    with tempfile.TemporaryDirectory() as folder:
        project = write_project(Path(folder), config)
        for turn in range(turns):
            for name in ARMS if turn % 2 == 0 else reversed(ARMS):
                found[name].append(trained(project, config, 2 * turn + ARMS.index(name), cold=name == ARMS[1]))
        if trace is not None:
            config_traced = one_stage(recipe_by_name(recipe), TRACED, batch)
            with profile() as profiled:
                trained(project, config_traced, 0, cold=False)
            profiled.export_chrome_trace(str(trace))
            print(f"profile of {TRACED} steps: {trace}")
    rows = [_row(name, config, found[name]) for name in ARMS]
    worst = max(row["wait_share"] for row in rows)
    target = {"measured": worst, "at_most": TARGET, "met": worst <= TARGET}
    columns = ("", "step ms", "clips/s", "tokens/s", "waiting", "TFLOP/s", "MFU", "first wait, ms", "cached at start")
    keys = ("step_ms", "clips_per_s", "tokens_per_s", "wait_share", "tflop_per_s", "mfu", "first_wait_ms", "cached")
    show(
        f"a step of {recipe}, {config.stages[0].batch} clips",
        columns,
        [[r["name"], *(r[k] for k in keys)] for r in rows],
    )
    print(f"wait_share: {worst:.4f}, wanted <= {TARGET}: {'met' if target['met'] else 'MISSED'}")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    said = {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": device}
    write(
        json,
        {
            "benchmark": "step",
            "quick": quick,
            "machine": machine() | said,
            "recipe": recipe,
            "batch": config.stages[0].batch,
            "steps": steps,
            "turns": turns,
            "rows": rows,
            "targets": {"wait_share": target},
        },
    )


def one_stage(recipe: RecipeConfig, steps: int, batch: int | None, stage: int = 0) -> RecipeConfig:
    """One of the recipe's stages alone, with so many steps; fewer mask entries, which change no step's cost."""
    first = recipe.stages[stage]
    alone = first.model_copy(update={"steps": steps, "batch": batch or first.batch})
    masks = recipe.masks.model_copy(update={"entries": min(MASK_ENTRIES, recipe.masks.entries)})
    return recipe.model_copy(update={"stages": (alone,), "masks": masks})


def write_project(folder: Path, recipe: RecipeConfig) -> Project:
    """A project whose store holds random latents on the recipe's grid, with its trainset and mask plan."""
    stage, model = recipe.stages[0], recipe.model
    shape = (stage.frames, model.frame_channels, model.grid_height, model.grid_width)
    write_store(random_clips(CLIPS_A_DRAW * stage.steps * stage.batch, shape), folder / "root", model.patch)
    corpus = {
        "root": str(folder / "root"),
        "encoding": {"autoencoder": "none", "resolution": model.patch * model.grid_height},
        "datasets": {},
    }
    publish_json(str(folder / "corpus.yaml"), corpus)  # JSON is YAML
    project = open_project(folder / "corpus.yaml")
    make_plan(project.root, recipe)
    return project


def trained(project: Project, recipe: RecipeConfig, repeat: int, cold: bool, compiled: bool | None = None) -> Measured:
    """One run from its first step to its last, and what its events say."""
    never = 1 << 30
    how = ExecutionConfig(
        log_every_steps=LOGGED, diagnose_every_steps=never, checkpoint_every_steps=never, compile=compiled
    )
    plan = plan_digest(recipe.masks, grid_of(recipe.model))
    run = plan_run(project.root, recipe, how, TRAINSET, plan, repeat, ())
    write_run(run)
    cached = evict(Path(project.root.folder("latents"))) if cold else 1.0
    with join(how) as ranks, redirect_stdout(StringIO()):  # the run's own lines
        train(project, run, ranks)
    lines = [event for event in read_events(run.folder) if event["kind"] == "step"]
    first, rest = lines[:LEFT_OUT], lines[LEFT_OUT:]
    return Measured(
        statistics.median(line["step_s"] for line in rest),
        sum(line["step_s"] * line["wait_share"] for line in rest) / sum(line["step_s"] for line in rest),
        sum(LOGGED * line["step_s"] * line["wait_share"] for line in first),
        cached,
    )


def _row(name: str, recipe: RecipeConfig, found: list[Measured]) -> dict[str, Any]:
    """Medians over turns."""
    stage, model = recipe.stages[0], recipe.model
    step_s = statistics.median(one.step_s for one in found)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    speed = speeds(recipe, stage, stage.batch / step_s, 1, device)
    return {
        "name": name,
        "step_ms": 1e3 * step_s,
        "clips_per_s": stage.batch / step_s,
        "tokens_per_s": stage.batch * stage.frames // model.tubelet * model.cells / step_s,
        "wait_share": statistics.median(one.wait_share for one in found),
        "tflop_per_s": speed["tflop_per_s"],
        "mfu": speed.get("mfu"),
        "first_wait_ms": 1e3 * statistics.median(one.first_wait_s for one in found),
        "cached": statistics.median(one.cached for one in found),
    }


if __name__ == "__main__":
    tyro.cli(main)
