"""The asset `pretrain`: prepare a run, train it by torchrun in child processes, and check what it left on disk.

`make_pretrain` does all of it. Dagster's asset calls `prepare_run` and `finish_run`, and starts the children itself.
"""

import contextlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from nextvid.config.overrides import apply_overrides
from nextvid.config.project import Project
from nextvid.config.recipe import ExecutionConfig, On, RecipeConfig
from nextvid.machine import available_cores, device_of, memory_bytes, workers
from nextvid.making.outcome import Check, Number, Outcome
from nextvid.making.progress import OnProgress, noting, silent
from nextvid.making.publishing import read_latest
from nextvid.model.memory import divisors, rank_memory
from nextvid.train import checkpoint
from nextvid.train.diagnose import ALARM_RATIO, collapsed
from nextvid.train.events import Event, accuracies, mean_speeds, newest, read_events
from nextvid.train.init import find_source, refuse_other_shapes
from nextvid.train.job import carry_out_on
from nextvid.train.micro_batch import CPU_SHARE
from nextvid.train.node import LOG, PreparedRun, carry_out, torchrun
from nextvid.train.run import Run, open_run, plan_run, write_run
from nextvid.train.sinks import refuse_missing
from nextvid.trainset.mask_plan import grid_of, make_plan, open_mask_plan
from nextvid.trainset.order import Order, refuse_unfit
from nextvid.trainset.pixels import freeze_pixels
from nextvid.trainset.trainset import Trainset
from storage import atomic, tables
from storage.errors import ConfigError, DamagedError, RefusedError, UpstreamError
from storage.records import publish_record, read_record


def prepare_run(
    project: Project,
    recipe: str,
    overrides: Sequence[str] = (),
    how: ExecutionConfig | None = None,
    *,
    launch: str | None = None,
    repeat: int = 0,
    trainset: str | None = None,
) -> PreparedRun:
    """Decide what a run reads and write its config.json. The same inputs give the same run.

    `trainset` is a digest; without one it is the newest. `launch` is the id of a Dagster run: its retries take the
    trainset of the first attempt, not a newer one.
    Raises ConfigError for wrong overrides and for a sink that is not installed, UpstreamError if trainset or mask plan
    are missing or failed their checks, DamagedError if files of the trainset changed or shards of its rows are missing,
    RefusedError if the recipe does not fit the trainset, reads pixels that its rows do not have, would train on
    withdrawn rows, or starts from weights of other shapes.
    """
    config = apply_overrides(project.recipe(recipe), overrides)
    how = how or ExecutionConfig()
    refuse_missing(how.sinks)
    trainset = _trainset(project, recipe, launch, trainset)
    tables.require_checks(f"{project.root.pointed('trainset', trainset)}/checks.json", "trainset")
    opened = Trainset.open(project.root, trainset)
    opened.check()
    if gone := opened.gone():
        more = f" (and {len(gone) - 1} parts more: 'nextvid verify' names them)" if len(gone) > 1 else ""
        raise DamagedError(f"{gone[0]}{more}")
    refuse_unfit(opened, config)
    if overrides:  # no asset draws the mask plan of an overridden recipe
        make_plan(project.root, config)
    plan = open_mask_plan(project.root, config.masks, grid_of(config.model)).digest
    pixels = freeze_pixels(project, opened, config).digest if config.reads_pixels else None
    source = find_source(project, config)
    run = plan_run(project.root, config, how, trainset, plan, repeat, overrides, pixels, source)
    if source is not None and run.newest_step() is None:
        refuse_other_shapes(source, config)
    if not run.complete:
        opened.refuse_withdrawn(Order(opened, config).lengths)
    write_run(run)
    if launch is not None:
        pointer = {"run": run.id, "trainset": run.trainset, "mask_plan": run.mask_plan}
        publish_record(project.root.launch(run.recipe.name, launch), pointer)
    command = torchrun("nextvid.trainer", how, project, ["--recipe", run.recipe.name, "--run", run.id])
    return PreparedRun(
        run.id, run.trainset, str(run.folder), command, run.complete, how, cores=project.corpus.execution.cores
    )


def make_pretrain(
    project: Project,
    recipe: str,
    overrides: Sequence[str] = (),
    how: ExecutionConfig | None = None,
    *,
    repeat: int = 0,
    trainset: str | None = None,
    on: On = "here",
    on_progress: OnProgress = silent,
) -> Outcome:
    """Train a recipe to its last step in child processes here, or in a job of a cluster.

    Resumes an interrupted run, leaves a complete one alone.
    """
    prepared = prepare_run(project, recipe, overrides, how, repeat=repeat, trainset=trainset)
    tell = noting(on_progress, f"pretrain {recipe}")
    if not prepared.complete and on == "here":
        carry_out(prepared, tell)
    elif not prepared.complete:
        carry_out_on(prepared, on, open_run(Path(prepared.folder)).recipe.steps, tell)
    return finish_run(project, recipe, prepared.run_id, made=not prepared.complete)


def finish_run(project: Project, recipe: str, run: str, *, made: bool = True) -> Outcome:
    """Check a run by its files and publish the checks; if they pass without overrides, point `latest.json` to it.

    Raises UpstreamError if there is no such run or it is not complete.
    """
    opened = open_run(Path(project.root.run(recipe, run)))
    if not opened.complete:
        why = f" (see {opened.folder / LOG})" if (opened.folder / LOG).exists() else ""
        with contextlib.suppress(UpstreamError):
            last = read_events(opened.folder)[-1]
            why = f" ({last['message']})" if last["kind"] == "error" else why
        raise UpstreamError(
            f"run {run} has {opened.newest_step() or 0} of {opened.recipe.steps} steps{why}; "
            "ask for it again: it resumes"
        )
    events = read_events(opened.folder)
    checks = (_checkpoint_loads(opened), _losses_finite(events), _rank_above_alarm(events, opened))
    tables.publish_checks(str(opened.folder / "checks.json"), "pretrain", [asdict(check) for check in checks])
    if all(check.passed or check.warns for check in checks) and not opened.overrides:
        pointer = {"run": run, "trainset": opened.trainset, "mask_plan": opened.mask_plan}
        publish_record(project.root.latest_run(recipe), pointer)
    step, look = newest(events, "step"), newest(events, "diagnostics")
    numbers: dict[str, Number] = {name: getattr(opened.identity, name) for name in ("recipe", "trainset", "mask_plan")}
    numbers |= {"steps": opened.recipe.steps, "clips": step.get("draws", 0), "ranks": opened.how.ranks}
    numbers |= {name: step[name] for name in ("align", "flow") if name in step}
    numbers |= {name: look[name] for name in ("effective_rank", "online_effective_rank", "feature_std") if name in look}
    return Outcome(
        "pretrain",
        recipe,
        made,
        rows=step.get("draws", 0),
        size_bytes=sum(path.stat().st_size for path in opened.folder.rglob("*") if path.is_file()),
        seconds=_seconds(events),
        digest=run,
        run=run,
        numbers=numbers | accuracies(events) | mean_speeds(events),
        checks=checks,
    )


def _trainset(project: Project, recipe: str, launch: str | None, named: str | None) -> str:
    """Digest of the trainset that is named, else of the launch's first attempt, else of the newest."""
    if named is not None:
        if not atomic.exists(project.root.pointed("trainset", named)):
            raise ConfigError(f"there is no trainset '{named}': correct the digest, or leave it out for the newest")
        return named
    if launch is not None and atomic.exists(path := project.root.launch(recipe, launch)):
        first: str = read_record(path)["trainset"]
        return first
    newest = read_latest(project.root, "trainset")
    if newest is None:
        raise UpstreamError("there is no trainset yet: make 'trainset' first")
    return newest


def cpu_ranks(recipe: RecipeConfig, cores: int) -> int:
    """Ranks of one thread each for training on so many cores: the most that share every stage's batch equally and fit.

    Two ranks of one thread make 26 to 31 clips of `demo` a second on two quiet cores, one rank of two threads 20 to 22;
    and one thread waits for no other that has no core (docs/decisions/0052).
    """
    clip_bytes = max(rank_memory(recipe, stage, ExecutionConfig(device="cpu")).total(1) for stage in recipe.stages)
    most = workers(int(CPU_SHARE * memory_bytes() / clip_bytes), cores)
    return max(n for n in divisors(math.gcd(*(stage.batch for stage in recipe.stages))) if n <= most)


def default_ranks(project: Project, recipe: str, overrides: Sequence[str]) -> int:
    """Ranks of a training for which nobody named any: by `cpu_ranks` where torch sees no GPU, else one."""
    config = apply_overrides(project.recipe(recipe), overrides)
    return cpu_ranks(config, available_cores(project.corpus.execution.cores)) if device_of("auto") == "cpu" else 1


def _checkpoint_loads(run: Run) -> Check:
    """The last checkpoint is this run's, its bytes match their checksums, and its tensors load."""
    last = checkpoint.complete(run.checkpoints)[-1]
    try:
        checkpoint.refuse_other(last, run.identity)
        checkpoint.verify(last)
        tensors = sum(len(checkpoint.load_tensors(path)) for path in sorted(last.glob("*.safetensors")))
    except (DamagedError, RefusedError) as error:
        return Check("checkpoint_loads", False, {"step": checkpoint.step_of(last)}, description=str(error))
    return Check("checkpoint_loads", True, {"step": checkpoint.step_of(last), "tensors": tensors})


def _losses_finite(events: Sequence[Event]) -> Check:
    """Every logged loss is finite; counts skipped steps."""
    values = [value for event in events if event["kind"] == "step" for value in event["loss"].values()]
    wrong = sum(not math.isfinite(float(value)) for value in values)
    skipped = [event for event in events if event["kind"] == "skipped"]
    spikes = sum(event.get("why") == "the loss leaps" for event in skipped)
    numbers = {"logged": len(values), "wrong": wrong, "skipped": len(skipped), "spikes": spikes}
    return Check("losses_finite", bool(values) and not wrong, numbers)


def _rank_above_alarm(events: Sequence[Event], run: Run) -> Check:
    """The effective rank of the reference features at the end is above the alarm."""
    looked = [event for event in events if event["kind"] == "diagnostics"]
    numbers: dict[str, Number] = {"alarm_below": ALARM_RATIO, "alarms": sum(e["kind"] == "alarm" for e in events)}
    if not looked:
        return Check("rank_above_alarm", False, numbers, description="no diagnostics were logged")
    first, final = float(looked[0]["effective_rank"]), float(looked[-1]["effective_rank"])
    numbers |= {"first_rank": first, "last_rank": final, "ratio": final / first}
    return Check("rank_above_alarm", not collapsed(final, first, run.recipe.steps, run.recipe.steps), numbers)


def _seconds(events: Sequence[Event]) -> float:
    """Seconds from the first to the last event of each attempt, added up; none where the clock was set back."""
    pairs = itertools.pairwise(events)
    took = (after["time_s"] - before["time_s"] for before, after in pairs if after["kind"] != "start")
    return sum((max(0.0, seconds) for seconds in took), 0.0)
