"""A prepared run as one job of a cluster, Ray's or Slurm's: submit it, follow it to its end, cancel it.

The cluster's machines have the same corpus.yaml, checkout and runs root as this one, at the same paths. A job runs
`nextvid.train.node` once on each of its machines. If what follows a job ends by an error or Ctrl-C, the job is
cancelled; if it is killed, the job stays: Ray's is stopped by whoever asks for the same run next, Slurm's is followed.
Slurm and Ray are spoken to without Dagster, for the command line too (docs/decisions/0048).
"""

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nextvid.machine import CORES, Tell
from nextvid.stopping import OUTSIDE, when_stopped
from nextvid.train.events import describe, read_events
from nextvid.train.node import PreparedRun, reported, write_prepared
from storage import atomic
from storage.errors import ConfigError, ConflictError, LostError, NExTVidError, RefusedError, UpstreamError
from storage.remote import S3_PLACE

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

SLURM = "slurm"
RUN = "nextvid/run"  # metadata of a Ray job: what it makes, of which training run
# no credentials: others can read a Ray job's environment; TRACKIO_SERVER_URL may carry a token
PASSED_ON = (
    "PYTHONPATH",
    "NEXTVID_CORPUS",
    CORES,
    *S3_PLACE,
    "WANDB_MODE",
    "WANDB_BASE_URL",
    "WANDB_ENTITY",
    "TRACKIO_SPACE_ID",
)
POLL_S = 2.0  # our choice: Ray's job server and Slurm's controller answer one short question each time
STOP_S = 30.0  # our choice: Ray kills what a stopped job leaves after 3 s (RAY_JOB_STOP_WAIT_TIME_S)
ENDED = re.compile(r"exit code (\d+)")  # ray/dashboard/modules/job/job_supervisor.py, and our own job file
FIRST_PORT, PORTS = 20000, 10000  # our choice: below the ports that Linux hands out (32768 and up)
SCRIPT = """#!/bin/sh
# {title}; written by nextvid. 'sbatch' reads partition, account and time limit from SBATCH_* variables.
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task={cores}
#SBATCH --gpus-per-node={gpus}
#SBATCH --open-mode=append
#SBATCH --requeue
srun --kill-on-bad-exit=1 --cpus-per-task={cores} {command} --rendezvous "$(hostname):{port}"
code=$?
echo "nextvid: exit code $code"
exit $code
"""


@dataclass(frozen=True)
class Ended:
    """How a job ended: the error, in one line, or None where it did its work."""

    error: NExTVidError | None


Job = AbstractContextManager[Callable[[], Ended | None]]  # a submitted job: whether it has ended, and how


def submitted(prepared: PreparedRun, on: str, env: Mapping[str, str], tell: Tell) -> Job:
    """The job on `slurm`, or on the Ray cluster of this address, with `env` beside what jobs need."""
    if prepared.how.rendezvous is not None:
        raise ConfigError(
            "how.rendezvous is for nodes that are started by hand; a cluster finds one itself: leave it out"
        )
    return _slurm_job(prepared, env, tell) if on == SLURM else _ray_job(prepared, on, env, tell)


def carry_out_on(prepared: PreparedRun, on: str, steps: int, tell: Tell) -> None:
    """Submit the run to `ray` or `slurm`, show its events and wait for its end. Raises the error that it ended with."""
    if on == "ray" and not (on := os.environ.get("RAY_ADDRESS", "")):
        raise ConfigError("--on ray needs RAY_ADDRESS, the address of the cluster's job server: http://head:8265")
    shown, since_s = 0, time.time()
    with submitted(prepared, on, {}, tell) as ended:
        while True:
            result = ended()
            with suppress(UpstreamError):  # training has not begun
                events = [event for event in read_events(Path(prepared.folder)) if event["time_s"] >= since_s]
                for event in events[shown:]:
                    tell(describe(event, steps))
                shown = len(events)
            if result is not None:
                break
            time.sleep(POLL_S)
    if result.error is not None:
        raise result.error


@contextmanager
def _ray_job(
    prepared: PreparedRun, address: str, env: Mapping[str, str], tell: Tell
) -> Iterator[Callable[[], Ended | None]]:
    """A Ray job whose driver (ray_driver.py) starts one task on each node, with a GPU for each rank."""
    from ray.job_submission import JobStatus, JobSubmissionClient

    client = JobSubmissionClient(address)
    _stop_leftovers(client, prepared, tell)
    passed = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    command = [sys.executable, "-m", "nextvid.train.ray_driver", str(write_prepared(prepared))]
    job = client.submit_job(
        entrypoint=shlex.join(command),  # Ray takes a line for a shell; this one has no word unquoted
        runtime_env={"env_vars": {**passed, **env}},
        metadata={RUN: prepared.title},
    )
    tell(f"Ray job {job}: {prepared.title} on {_asked(prepared)}")

    def ended() -> Ended | None:
        status = client.get_job_status(job)
        if not status.is_terminal():
            return None
        if status == JobStatus.SUCCEEDED:
            return Ended(None)
        message = client.get_job_info(job).message or ""  # with its last ten lines, which may all be Ray's own
        otherwise = f"{prepared.title}: Ray job {job} ended as {status}: {message}"
        return Ended(_error(f"{client.get_job_logs(job)}\n{message}", otherwise))

    try:
        with when_stopped(lambda: client.stop_job(job)):
            yield ended
    except BaseException:  # cancelled, or the process of a Dagster run is gone
        client.stop_job(job)
        raise


def _stop_leftovers(client: "JobSubmissionClient", prepared: PreparedRun, tell: Tell) -> None:
    """Stop jobs that still train this run for a process that is gone, and wait for their end."""
    for job in client.list_jobs():
        if (job.metadata or {}).get(RUN) != prepared.title or job.status.is_terminal() or not job.submission_id:
            continue
        tell(f"stopping Ray job {job.submission_id}, a leftover of {prepared.title}")
        client.stop_job(job.submission_id)
        until = time.monotonic() + STOP_S
        while not client.get_job_status(job.submission_id).is_terminal():
            if time.monotonic() > until:
                raise ConflictError(f"Ray job {job.submission_id} ({prepared.title}) does not stop: stop it by hand")
            time.sleep(0.5)


@contextmanager
def _slurm_job(prepared: PreparedRun, env: Mapping[str, str], tell: Tell) -> Iterator[Callable[[], Ended | None]]:
    """The Slurm job of this run: one that is queued or runs, else a new one. It inherits this environment."""
    name = f"nextvid-{prepared.asset}-{prepared.run_id}"
    script = Path(prepared.folder, "job.sh")
    atomic.publish_bytes(str(script), _script(prepared, name).encode())
    output = str(Path(prepared.folder, "slurm-")).replace("%", "%%") + "%j.log"
    job = next(iter(_states(name) or {}), None)
    if job is None:
        done = _slurm(["sbatch", "--parsable", f"--output={output}", str(script)], env)
        if done.returncode:
            raise RefusedError(f"{prepared.title}: sbatch refused {script}: {done.stderr.strip()}")
        job = done.stdout.strip().partition(";")[0]  # behind the semicolon: the cluster
    told = ""

    def ended() -> Ended | None:
        nonlocal told
        states = _states(name)
        if states is None:
            state = "its controller does not answer; asking again"
        elif (state := states.get(job, "")) == "":
            return Ended(_slurm_error(prepared, job))
        if state != told:
            tell(f"Slurm job {job}: {state}, {prepared.title} on {_asked(prepared)}")
            told = state
        return None

    try:
        with when_stopped(lambda: _slurm(["scancel", str(job)], {})):
            yield ended
    except BaseException:
        _slurm(["scancel", job], {})
        raise


def _script(prepared: PreparedRun, name: str) -> str:
    """The job file. A node has a core for each rank and for each thread of its loader."""
    command = [sys.executable, "-m", "nextvid.train.node", str(write_prepared(prepared))]
    return SCRIPT.format(
        title=prepared.title,
        name=name,
        nodes=prepared.how.nodes,
        cores=prepared.ranks * (1 + prepared.how.threads),
        gpus=0 if prepared.how.device == "cpu" else prepared.ranks,
        command=shlex.join(command),
        port=FIRST_PORT + int(prepared.run_id, 16) % PORTS,
    )


def _states(name: str) -> dict[str, str] | None:
    """States of this user's jobs of a name that have not ended, by id; None if the controller does not answer."""
    done = _slurm(["squeue", "--noheader", "--me", f"--name={name}", "--format=%i %T"], {})
    rows = [line.split() for line in done.stdout.splitlines()]
    return None if done.returncode else {row[0]: row[1] for row in rows if row[1] != "COMPLETING"}


def _slurm_error(prepared: PreparedRun, job: str) -> NExTVidError | None:
    """What the output of a job that has left the queue says; it has no exit code if Slurm ended it."""
    path = Path(prepared.folder, f"slurm-{job}.log")
    output = path.read_text(errors="replace") if path.is_file() else ""
    codes = re.findall(r"^nextvid: exit code (\d+)$", output, re.M)
    if codes and codes[-1] == "0":
        return None
    how = f"with {codes[-1]}" if codes else "without an exit code: out of time, cancelled, or a node was lost"
    return _error(output if codes else "", f"{prepared.title}: Slurm job {job} ended {how}; see {path}")


def _slurm(command: list[str], env: Mapping[str, str]) -> "subprocess.CompletedProcess[str]":
    try:
        place = {"TMPDIR": os.environ[OUTSIDE]} if OUTSIDE in os.environ else {}  # a job outlives this command
        return subprocess.run(command, env={**os.environ, **place, **env}, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise ConfigError(
            f"'{command[0]}' is not on PATH: ask on a machine from which Slurm jobs are submitted"
        ) from error


def _error(output: str, otherwise: str) -> NExTVidError:
    """The error that processes of ours reported in a job's output; without one the job crashed, if it has no code."""
    if (found := reported(output)) is not None:
        return (LostError if found[0] == "lost" else RefusedError)(found[1])
    return RefusedError(otherwise) if ENDED.search(output) else LostError(f"{otherwise}; asking again resumes it")


def _asked(prepared: PreparedRun) -> str:
    nodes, ranks = prepared.how.nodes, prepared.ranks
    return f"{nodes} node{'s' * (nodes > 1)} of {ranks} {'CPU' if prepared.how.device == 'cpu' else 'GPU'} ranks"
