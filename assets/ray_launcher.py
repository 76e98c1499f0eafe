"""torchrun as a job of a Ray cluster, through Pipes: for a Dagster whose own machine has no device to train on.

The job sees the same corpus.yaml, checkout and runs root as the step, at the same paths (deploy/README.md): so what it
reports comes through a file of the run's folder while it trains. dagster-ray's client reads the tail of the job's log
instead, through Ray's head and the node's agent; after an error on the way it reads no more, and it observes nothing.
Cancelling stops the job. Nothing on the cluster ends with a killed step, so whoever trains the same run stops what is
left of it first; the lock on the run folder would refuse a second writer anyway.
"""

import os
import re
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg

from assets.launcher import SIGNALLED, Watch, pipes
from nextvid.train.pretrain import PreparedRun
from storage.errors import ConflictError
from storage.remote import S3_PLACE

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

RUN = "nextvid/run"  # metadata of a job: the training run that it is for
PASSED_ON = ("PYTHONPATH", "NEXTVID_CORPUS", *S3_PLACE)  # no keys: a job's environment can be read by others
MESSAGES = "pipes.jsonl"  # in the run's folder, while a job trains
POLL_S = 1.0  # our choice: as long as a cancelled step may take to notice a job's end
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
            metadata={RUN: run.run_id},
            entrypoint_num_cpus=1,
            entrypoint_num_gpus=0 if run.device == "cpu" else run.ranks,
        )
        context.log.info(f"Ray job {job} trains run {run.run_id}")
        try:
            status = _wait(context, client, job, Path(run.folder))
        except BaseException:  # cancelled, or nobody waits for the step
            client.stop_job(job)
            raise
    if status != JobStatus.SUCCEEDED:
        said = client.get_job_info(job).message or ""
        own = ENDED.search(said) is not None and SIGNALLED.search(said) is None
        raise dg.Failure(description=f"the trainer's Ray job ended as {status}: {said}", allow_retries=not own)


def _wait(context: dg.AssetExecutionContext, client: "JobSubmissionClient", job: str, folder: Path) -> str:
    """Status of a job that has ended; observes the run meanwhile."""
    watch = Watch(context, folder)
    while not (status := client.get_job_status(job)).is_terminal():
        time.sleep(POLL_S)
        watch.look()
    return status


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
