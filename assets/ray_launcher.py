"""Run torchrun as a job of a Ray cluster, for steps on a machine without a device to train on.

The job has the same corpus.yaml, checkout and runs root as the step, at the same paths (deploy/README.md), so its
messages come through a file in the run's folder. We do not use dagster-ray's Pipes client: it reads the tail of the
job's log through Ray's head, stops reading after one network error, and reports no observations. Cancelling a step
stops its job. A killed step leaves its job behind: the next step for the same run stops that job first, and until then
the lock on the run's folder refuses a second writer.
"""

import os
import re
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg

from assets.launcher import SIGNALLED, failure, pipes, wait
from nextvid.train.pretrain import PreparedRun
from storage.errors import ConflictError
from storage.remote import S3_PLACE

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

RUN = "nextvid/run"  # metadata of a Ray job: what it makes, of which training run
PASSED_ON = ("PYTHONPATH", "NEXTVID_CORPUS", *S3_PLACE)  # no credentials: others can read a job's environment
MESSAGES = "pipes.jsonl"  # in the run's folder, while a job trains
POLL_S = 1.0  # our choice: short beside the 10 s that cancelling may take
STOP_S = 30.0  # our choice: Ray kills what a stopped job leaves after 3 s (RAY_JOB_STOP_WAIT_TIME_S)
ENDED = re.compile(r"exit code (\d+)")  # ray/dashboard/modules/job/job_supervisor.py


def run_job(context: dg.AssetExecutionContext, run: PreparedRun, address: str) -> None:
    """Train as one job with as many GPUs as the run has ranks. Raises dg.Failure with the end of its output."""
    from ray.job_submission import JobStatus, JobSubmissionClient

    client = JobSubmissionClient(address)
    _stop_leftovers(context, client, run)
    passed = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    reader = dg.PipesFileMessageReader(str(Path(run.folder) / MESSAGES))
    with pipes(context, dg.PipesEnvContextInjector(), reader) as session:
        job = client.submit_job(
            entrypoint=shlex.join(run.command),  # Ray takes a line for a shell; this one has no word unquoted
            runtime_env={"env_vars": {**passed, **run.env, **session.get_bootstrap_env_vars()}},
            metadata={RUN: run.title},
            entrypoint_num_cpus=1,
            entrypoint_num_gpus=0 if run.device == "cpu" else run.ranks,
        )
        context.log.info(f"Ray job {job}: {run.title}")

        def ended() -> JobStatus | None:
            status = client.get_job_status(job)
            return status if status.is_terminal() else None

        try:
            status = wait(context, run, ended, POLL_S)
        except BaseException:  # cancelled, or the process of the Dagster run is gone
            client.stop_job(job)
            raise
    if status != JobStatus.SUCCEEDED:
        message = client.get_job_info(job).message or ""
        raised = ENDED.search(message) is not None and SIGNALLED.search(message) is None
        raise failure(run, f"the trainer's Ray job ended as {status}: {message}", crashed=not raised)


def _stop_leftovers(context: dg.AssetExecutionContext, client: "JobSubmissionClient", run: PreparedRun) -> None:
    """Stop jobs that still train this run for a step that is gone, and wait for their end."""
    for job in client.list_jobs():
        if (job.metadata or {}).get(RUN) != run.title or job.status.is_terminal() or not job.submission_id:
            continue
        context.log.warning(f"stopping Ray job {job.submission_id}, a leftover of {run.title}")
        client.stop_job(job.submission_id)
        until = time.monotonic() + STOP_S
        while not client.get_job_status(job.submission_id).is_terminal():
            if time.monotonic() > until:
                raise ConflictError(f"Ray job {job.submission_id} ({run.title}) does not stop: stop it by hand")
            time.sleep(0.5)
