"""The demo's training step beside other programs: `python -m benchmarks.busy [--quick] [--json FILE] [--busy 0 4]`.

The trainer is started as `nextvid make pretrain` starts it, over random latents. Arms run in turns, alone and beside
processes that do nothing but compute: as the rule has it (docs/decisions/0052), and ways that it rejects. Fair is a
step's time alone over the share of the cores that is left to it, `cores / (cores + busy)`. On a machine that others use
too, compare seconds of CPU a step, which their load does not change.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks.clips import TRAINSET
from benchmarks.measure import machine, show, timed, write
from benchmarks.step import one_stage, write_project
from nextvid.config.project import Project
from nextvid.config.recipe import ExecutionConfig, RecipeConfig
from nextvid.config.recipes import recipe as recipe_by_name
from nextvid.machine import available_cores
from nextvid.train.events import read_events
from nextvid.train.node import PreparedRun, torchrun
from nextvid.train.pretrain import cpu_ranks
from nextvid.train.run import plan_run, write_run
from nextvid.trainset.mask_plan import grid_of, plan_digest

TARGET = 3.0  # times a fair step, our aim
QUICK_STEPS, STEPS = 12, 60
QUICK_TURNS, TURNS = 1, 3
LOGGED = 4  # steps a line of events.jsonl; the first line is left out
RULE = "the rule"


def main(
    quick: bool = False,
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
    busy: tuple[int, ...] = (0, 4),
) -> None:
    """Measure, print a table, and with --json write what README.md documents.

    Args:
        quick: one turn of 12 steps.
        json: file for the results.
        busy: numbers of other processes.
    """
    steps, turns = (QUICK_STEPS, QUICK_TURNS) if quick else (STEPS, TURNS)
    recipe, cores = one_stage(recipe_by_name("demo"), steps, None), available_cores()
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        project = write_project(Path(folder), recipe)
        for turn in range(turns):
            for number, (name, (ranks, variables)) in enumerate(arms(recipe, cores).items()):
                for others in busy:
                    with computing(others):
                        one = trained(project, recipe, ranks, variables, 100 * turn + 10 * number + others)
                    found.setdefault((name, others), []).append(one)
    rows: list[dict[str, Any]] = [
        {"name": name, "busy": others, "step_s": statistics.median(s for s, _ in some),
         "cpu_s": statistics.median(c for _, c in some)}
        for (name, others), some in found.items()
    ]  # fmt: skip
    alone = min((row["step_s"] for row in rows if row["busy"] == 0), default=float("nan"))
    for row in rows:
        row["over_fair"] = row["step_s"] / alone * cores / (cores + row["busy"])
    show(
        f"a step of the demo on {cores} cores",
        ("", "busy processes", "step, s", "CPU a step, s", "times a fair step"),
        [[row[key] for key in ("name", "busy", "step_s", "cpu_s", "over_fair")] for row in rows],
    )
    worst = max(row["over_fair"] for row in rows if row["name"] == RULE)
    target = {"measured": worst, "at_most": TARGET, "met": worst <= TARGET}
    print(f"over_fair: {worst:.2f}, wanted <= {TARGET}: {'met' if target['met'] else 'MISSED'}")
    record: dict[str, Any] = {"benchmark": "busy", "quick": quick, "machine": machine(), "steps": steps, "rows": rows}
    write(json, record | {"targets": {"over_fair": target}})


def arms(recipe: RecipeConfig, cores: int) -> dict[str, tuple[int, dict[str, str]]]:
    """Ranks and variables by name. What the rule sets for a process of several threads is the arm before the last."""
    several = {"OMP_NUM_THREADS": str(cores)}
    return {
        RULE: (cpu_ranks(recipe, cores), {}),
        "one rank, one thread": (1, {"OMP_NUM_THREADS": "1"}),
        "threads, as the rule waits": (1, several),
        "threads that spin": (1, several | {"GOMP_SPINCOUNT": "30000000000"}),
    }


@contextmanager
def computing(count: int) -> Iterator[None]:
    """So many processes that compute while the block runs."""
    with ExitStack() as stack:
        for _ in range(count):
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            stack.callback(process.kill)
        yield


def trained(
    project: Project, recipe: RecipeConfig, ranks: int, variables: dict[str, str], repeat: int
) -> tuple[float, float]:
    """Median seconds of a step, and seconds of CPU a step with what the processes need to start."""
    never = 1 << 30
    how = ExecutionConfig(
        ranks=ranks, device="cpu", log_every_steps=LOGGED, diagnose_every_steps=never, checkpoint_every_steps=never
    )
    run = plan_run(project.root, recipe, how, TRAINSET, plan_digest(recipe.masks, grid_of(recipe.model)), repeat, ())
    write_run(run)
    command = torchrun("nextvid.trainer", how, project, ["--recipe", recipe.name, "--run", run.id])
    env = {**os.environ, **PreparedRun(run.id, run.trainset, str(run.folder), command, False, how).env, **variables}

    def work() -> None:
        subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)

    took = timed(work)
    lines = [event["step_s"] for event in read_events(run.folder) if event["kind"] == "step"]
    return statistics.median(lines[1:]), took.cpu_s / recipe.steps


if __name__ == "__main__":
    tyro.cli(main)
