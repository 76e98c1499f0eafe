"""torchrun as a job of a Ray cluster, through Pipes: for a Dagster whose own machine has no device to train on.

The job sees the same corpus.yaml, checkout and runs root as the step, at the same paths (deploy/README.md). Metrics
come back in its log, cancelling stops it. Nothing on the cluster ends with a killed step, so whoever trains the same
run stops what is left of it first; the lock on the run folder would refuse a second writer anyway.
"""

import os
import re
import shlex
import time
import warnings
from typing import TYPE_CHECKING

import dagster as dg

from assets.launcher import SIGNALLED
from nextvid.train.launch import PreparedRun
from storage.errors import ConflictError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

RUN = "nextvid/run"  # metadata of a job: the training run that it is for
STOP_S = 30.0  # our choice: Ray kills what a stopped job leaves after 3 s (RAY_JOB_STOP_WAIT_TIME_S)
ENDED = re.compile(r"exit code (\d+)")  # ray/dashboard/modules/job/job_supervisor.py


def run_job(context: dg.AssetExecutionContext, run: PreparedRun, address: str) -> None:
    """Train as one job with as many GPUs as the run has ranks. Raises dg.Failure with the end of its output."""
    from dagster_ray import PipesRayJobClient

    client = PipesRayJobClient(address=address)
    _stop_leftovers(context, client.client, run)
    passed = {name: os.environ[name] for name in ("PYTHONPATH", "NEXTVID_CORPUS") if name in os.environ}
    on_cpu = run.device == "cpu"
    try:
        # dagster's, of its own message reader
        with warnings.catch_warnings(action="ignore", category=dg.PreviewWarning):
            client.run(
                context=context,
                submit_job_params={
                    "entrypoint": shlex.join(
                        run.command
                    ),  # Ray takes a line for a shell; this one has no word unquoted
                    "runtime_env": {"env_vars": {**passed, **run.env}},
                    "metadata": {RUN: run.run_id},
                    "entrypoint_num_cpus": 1,
                    "entrypoint_num_gpus": 0 if on_cpu else run.ranks,
                },
            )
    except RuntimeError as error:  # what the client raises of a job that failed or was stopped
        said = str(error)
        own = ENDED.search(said) is not None and SIGNALLED.search(said) is None
        raise dg.Failure(description=f"the trainer's Ray job ended: {said}", allow_retries=not own) from error


def _stop_leftovers(context: dg.AssetExecutionContext, client: "JobSubmissionClient", run: PreparedRun) -> None:
    """Stop jobs that train this run for a step that is gone, and wait until they are."""
    for job in client.list_jobs():
        if (job.metadata or {}).get(RUN) != run.run_id or job.status.is_terminal() or not job.submission_id:
            continue
        context.log.warning(f"stopping Ray job {job.submission_id}, which trains run {run.run_id} for nobody any more")
        client.stop_job(job.submission_id)
        until = time.monotonic() + STOP_S
        while not client.get_job_status(job.submission_id).is_terminal():
            if time.monotonic() > until:
                raise ConflictError(f"Ray job {job.submission_id} trains run {run.run_id} and does not stop; end it")
            time.sleep(0.5)
