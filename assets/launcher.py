"""Run torchrun as a child of a Dagster step, in a process group of its own, or as a job of a cluster.

While it trains, Dagster Pipes turns each event into a line of the run's log. Every OBSERVE_S the newest step becomes an
observation of the asset, from which the UI draws curves of an unfinished run. The group ends with the step, and the
step with its run; cancelling takes at most 10 s. A job's messages come through a file in the run's folder. We do not
use dagster-ray's Pipes client: it reads the tail of the job's log through Ray's head, stops reading after one network
error, and reports no observations.
"""

import contextlib
import os
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import dagster as dg

from assets.reporting import OBSERVE_S
from nextvid.machine import orphaned
from nextvid.making.progress import SHOWING, Progress, silent
from nextvid.train.events import accuracies, newest, progress_of, read_events
from nextvid.train.job import submitted
from nextvid.train.node import PreparedRun, trainers, why
from storage.errors import LostError, UpstreamError

Ended = TypeVar("Ended")

POLL_S = 0.1  # our choice: a finished step ends at once
SHOW_S = 1.0  # our choice: a bar that moves
CURVES = ("align", "flow", "lr", "clips_per_s", "wait_share", "mfu")  # of a `step` event (nextvid/train/loop.py)
MESSAGES = "pipes.jsonl"  # in the run's folder, while a job trains
JOB_POLL_S = 1.0  # our choice: short beside the 10 s that cancelling may take


def run_group(context: dg.AssetExecutionContext, run: PreparedRun) -> None:
    """Train in a process group that ends with this call. Raises dg.Failure with the end of the trainer's output."""
    log_path = run.log
    began = log_path.stat().st_size if log_path.exists() else 0
    with (
        log_path.open("ab") as log,
        pipes(context, dg.PipesTempFileContextInjector(), dg.PipesTempFileMessageReader()) as session,
        trainers(run, log, subprocess.STDOUT, context.log.info, session.get_bootstrap_env_vars()) as process,
    ):
        code = wait(context, run, process.poll, POLL_S)
    if code != 0:
        with log_path.open("rb") as file:  # the end of what this attempt wrote
            file.seek(0, os.SEEK_END)
            file.seek(max(began, file.tell() - 4000))
            output = file.read().decode(errors="replace")
        crashed = isinstance(why(run, code, output), LostError)  # a retry resumes its run
        raise failure(run, f"the trainer ended with exit code {code}; the end of {log_path}:\n{output}", crashed)


def run_job(context: dg.AssetExecutionContext, run: PreparedRun, on: str) -> None:
    """Train as one job of `slurm`, or of the Ray cluster at this address. Raises dg.Failure with its error."""
    reader = dg.PipesFileMessageReader(str(Path(run.folder) / MESSAGES))
    with (
        pipes(context, dg.PipesEnvContextInjector(), reader) as session,
        submitted(run, on, session.get_bootstrap_env_vars(), context.log.info) as job,
    ):
        ended = wait(context, run, job, JOB_POLL_S)
    if ended.error is not None:
        raise failure(run, str(ended.error), isinstance(ended.error, LostError))


def failure(run: PreparedRun, why: str, crashed: bool = False) -> dg.Failure:
    """A failed training, with its run, its last logged step and its log; only a crash is retried."""
    metadata: dict[str, Any] = {"run": run.run_id, "log": dg.MetadataValue.path(str(run.log))}
    with contextlib.suppress(UpstreamError):  # none was logged
        metadata["step"] = max((event["step"] for event in read_events(Path(run.folder))), default=0)
    return dg.Failure(description=why, metadata=metadata, allow_retries=crashed)


@contextlib.contextmanager
def pipes(
    context: dg.AssetExecutionContext, injector: dg.PipesContextInjector, reader: dg.PipesMessageReader
) -> Iterator[dg.PipesSession]:
    """A Pipes session: what the trainer reports becomes lines of the run's log."""
    with (
        warnings.catch_warnings(action="ignore", category=dg.PreviewWarning),  # dagster's, of its own message reader
        dg.open_pipes_session(context=context, context_injector=injector, message_reader=reader) as session,
    ):
        yield session


def wait(
    context: dg.AssetExecutionContext, run: PreparedRun, ended: Callable[[], Ended | None], poll_s: float
) -> Ended:
    """Wait until `ended` returns the result of training; every OBSERVE_S, report the newest logged step.

    Raises dg.Failure where the process of the Dagster run is gone.
    """
    observed_s, shown_s, step = time.monotonic(), time.monotonic(), -1
    showing, name = SHOWING.get(), run.title
    while (result := ended()) is None:
        if orphaned():
            raise failure(run, "the process of this Dagster run is gone; a retry of the run resumes")
        if time.monotonic() - observed_s >= OBSERVE_S:
            observed_s, step = time.monotonic(), observe(context, Path(run.folder), step)
        if showing is not silent and time.monotonic() - shown_s >= SHOW_S:
            shown_s = time.monotonic()
            if progress := progress_of(Path(run.folder), name):
                showing(progress)
        time.sleep(poll_s)
    showing(progress_of(Path(run.folder), name) or Progress(name, 1, 1))  # its bar goes
    return result


def observe(context: dg.AssetExecutionContext, folder: Path, after: int) -> int:
    """Report the newest logged step as an observation of the asset; returns its number, or `after` if none is newer."""
    try:
        events = read_events(folder)
    except UpstreamError:
        return after  # training has not begun
    step = newest(events, "step")
    if step.get("step", after) <= after:
        return after
    values: dict[str, Any] = {"step": step["step"], "stage": step["stage"]}
    values |= {name: step[name] for name in CURVES if name in step} | accuracies(events)
    partition = context.partition_key if context.has_partition_key else None
    context.log_event(dg.AssetObservation(context.asset_key, metadata=values, partition=partition))
    return int(step["step"])
