"""One machine's share of a training or of probes: torchrun in a process group of its own, and in one line why it ended.

A work is prepared once (`PreparedRun`). `carry_out` starts it here; as a job of a cluster (job.py) each of its machines
runs `python -m nextvid.train.node FILE`, whose file is the prepared run, so that all of them start the same.
"""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Annotated, Literal

import tyro

from nextvid.config.project import Project
from nextvid.config.recipe import ExecutionConfig
from nextvid.config.strict import parse
from nextvid.machine import VISIBLE, WATCH_S, Tell, available_cores, launcher_id, leased_gpus, run_rank
from storage.digest import digest
from storage.errors import (
    LOST,
    ConfigError,
    ConflictError,
    DamagedError,
    LostError,
    MachineError,
    NExTVidError,
    RefusedError,
    UnwritableError,
)
from storage.limits import KILLED
from storage.records import publish_record, read_record

GRACE_S = 8.0  # our choice: a cancelled run must end within 10 s, so processes left after this are killed
# our choice: torchrun ends its other ranks in less. Where it asks a machine that is silent for the state of the others,
# it waits until TCP gives up, 15 minutes on Linux
AGENT_S = 40.0
LOG = "trainer.log"
STDERR = 2  # the trainer's progress goes to stderr: stdout is for the command's result
# What a process of ours ended with (nextvid/machine.py, `run_rank`)
KINDS = "config|corpus|upstream|damaged|table|store|conflict|unwritable|refused|system|lost"
SAID = re.compile(rf"^({KINDS}): (.*)$", re.M)
# torchrun's summary of a rank that a signal ended first: "exitcode  : -9 (pid: 4711)" (torch.distributed.elastic)
SIGNALLED = re.compile(r"Root Cause[^:]*:.*?exitcode\s*: (-?\d+)", re.S)
# glibc keeps freed pages: 3.30 instead of 4.04 s for 11 steps of `demo`, 2 cores
CPU_VARIABLES = {
    "MALLOC_MMAP_THRESHOLD_": "33554432",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
}


@dataclass(frozen=True)
class PreparedRun:
    """Work on a run that is ready to start: with `command`, and `env` added to the environment.

    `asset` is what it makes: `pretrain` the run itself, `probes` its scores.
    """

    run_id: str
    trainset: str  # digest
    folder: str
    command: list[str]
    complete: bool
    how: ExecutionConfig = field(default_factory=ExecutionConfig)
    asset: Literal["pretrain", "probes"] = "pretrain"
    cores: int | None = None  # the most that corpus.yaml allows

    @property
    def title(self) -> str:
        """The work in words, by which leases and jobs tell it from other work on the same run."""
        return f"{self.asset} {self.run_id}"

    @property
    def child(self) -> list[str]:
        """`command` for a child that ends when this process does, or when the process that spawned this one does."""
        return [*self.command, "--launcher", str(launcher_id())]

    @property
    def ranks(self) -> int:
        """Processes on each machine."""
        return self.how.ranks // self.how.nodes

    @property
    def env(self) -> dict[str, str]:
        """Variables for the trainers: threads, for CPU runs what makes them faster, and where several machines meet."""
        cores = str(max(1, available_cores(self.cores) // self.ranks))
        found = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", cores)}
        if self.how.device != "cuda":
            found |= {name: os.environ.get(name, value) for name, value in CPU_VARIABLES.items()}
        return found if self.how.rendezvous is None else found | meeting(self.how)

    @property
    def log(self) -> Path:
        """What the trainers of this machine say; each machine of several has a file of its own."""
        return Path(self.folder, LOG if self.how.nodes == 1 else f"trainer.{node_name()}.log")


def torchrun(module: str, how: ExecutionConfig, project: Project, arguments: Sequence[str]) -> list[str]:
    """The command that starts a module on one machine's ranks. Where several machines meet, `meeting` says."""
    together = ["--standalone"]
    if how.nodes > 1:
        together = ["--nnodes", str(how.nodes), "--rdzv-backend", "c10d", "--rdzv-id", digest(arguments)]
    return [
        sys.executable,
        *("-m", "torch.distributed.run", *together, "--nproc-per-node", str(how.ranks // how.nodes)),
        # `--` ends torchrun's own options: it would read our --run as its --run-path
        *("-m", "--", module, "--corpus", str(project.path), *arguments),
    ]


def meeting(how: ExecutionConfig, address: str | None = None, first: bool = False) -> dict[str, str]:
    """Torchrun's own variables for where machines meet: `how.rendezvous`.

    `address` is this machine's, and `first` whether the others come to it, where a cluster knows: else torchrun guesses
    from what DNS says of the host's name.
    """
    assert how.rendezvous is not None
    limits = f"join_timeout={how.timeout_s},read_timeout={how.timeout_s}"
    found = {"PET_RDZV_ENDPOINT": how.rendezvous, "PET_RDZV_CONF": limits}
    if address is not None:
        found |= {"PET_RDZV_CONF": f"{limits},is_host={int(first)}", "PET_LOCAL_ADDR": address}
    return found


def node_name() -> str:
    """This machine's name, for people: Slurm's name of it, else the host's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def carry_out(prepared: PreparedRun, tell: Tell, env: Mapping[str, str] | None = None) -> None:
    """Run the command to its end, here. Raises RefusedError or LostError with the last error that it reported."""
    with prepared.log.open("ab+") as log:
        if prepared.how.nodes > 1:
            line = f"{node_name()}: {prepared.ranks} of {prepared.how.ranks} ranks meet at {prepared.how.rendezvous}\n"
            log.write(line.encode())  # also tells the others that this machine has started
            log.flush()
        began = log.seek(0, os.SEEK_END)
        with trainers(prepared, STDERR, log, tell, env) as process:
            code = _wait(prepared, process, log, began)
        log.seek(began)
        output = log.read().decode(errors="replace")
    if code:
        raise why(prepared, code, output)


def _wait(prepared: PreparedRun, process: "subprocess.Popen[bytes]", log: IO[bytes], began: int) -> int:
    """The command's exit code; LOST where its ranks have missed a machine, and torchrun itself still waits for it."""
    lost_s: float | None = None
    while prepared.how.nodes > 1:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(WATCH_S)
        log.seek(began)
        if lost_s is None and re.search(rb"^lost: ", log.read(), re.M):
            lost_s = time.monotonic()
        if lost_s is not None and time.monotonic() - lost_s > AGENT_S:
            return LOST
    return process.wait()


def why(prepared: PreparedRun, code: int, output: str) -> NExTVidError:
    """The error that this output of a failed attempt amounts to, in one line."""
    title, meet = prepared.title, prepared.how.rendezvous
    if "RendezvousTimeoutError" in output:
        return RefusedError(
            f"{title}: {_missing(prepared)} did not join within {prepared.how.timeout_s} s; start the same command on "
            f"every node, and let each reach {meet}"
        )
    if "num_nodes_waiting" in output and reported(output) is None:  # torchrun's watch over nodes that had joined
        return LostError(f"{title}: {node_name()} hears nothing more from {meet}; asking again resumes it")
    if "RendezvousConnectionError" in output and reported(output) is None:
        return RefusedError(
            f"{title}: {node_name()} did not reach {meet}, tried for at most {prepared.how.timeout_s} s; start the "
            "same command there, and open that port to the other nodes"
        )
    first = SIGNALLED.search(output)
    if (signalled := min(code, int(first[1]) if first else 0)) < 0:
        killed = f"; {KILLED} (`how.micro_batch`, `ranks`)" if -signalled == signal.SIGKILL else ""
        return LostError(
            f"{title}: signal {-signalled} ended a rank, see {prepared.log}; asking again resumes it{killed}"
        )
    kind, said = reported(output) or ("", f"see {prepared.log}")
    if kind == "conflict":  # another process is at work on the same run; asking again would meet it again
        return ConflictError(f"{title}: {said}")
    if kind in ("damaged", "table"):  # the message names the file and the remedy
        return DamagedError(f"{title}: {said}")
    classes = {"lost": LostError, "unwritable": UnwritableError, "system": MachineError}
    return classes.get(kind, RefusedError)(f"{title} ended with exit code {code} ({said}); asking again resumes it")


def reported(output: str) -> tuple[str, str] | None:
    """Kind and message of the error that processes of ours ended with: the last that is no consequence of another."""
    found: list[tuple[str, str]] = SAID.findall(output)
    causes = [error for error in found if error[0] != "lost"]
    return (causes or found)[-1] if found else None


def _missing(prepared: PreparedRun) -> str:
    """The nodes that did not start, by name where the cluster knows them; if all did, those that did not get through.

    A node's log is written when it starts. The time of the file server is compared with itself.
    """
    began_s = prepared.log.stat().st_mtime - prepared.how.timeout_s - GRACE_S
    logs = [path for path in Path(prepared.folder).glob("trainer.*.log") if path.stat().st_mtime >= began_s]
    started = {path.name.removeprefix("trainer.").removesuffix(".log") for path in logs}
    expected: set[str] = set()
    if "SLURM_JOB_NODELIST" in os.environ:
        listed = subprocess.run(["scontrol", "show", "hostnames"], capture_output=True, text=True, check=True)
        expected = set(listed.stdout.split())
    if missing := sorted(expected - started):
        return f"node {', '.join(missing)}"
    if (absent := prepared.how.nodes - len(started)) > 0:
        return f"{absent} of {prepared.how.nodes} nodes (all but {', '.join(sorted(started))})"
    return f"node {' or '.join(sorted(started - {node_name()}))}"


@contextlib.contextmanager
def trainers(
    run: PreparedRun,
    stdout: int | IO[bytes],
    stderr: int | IO[bytes],
    tell: Tell,
    env: Mapping[str, str] | None = None,
) -> Iterator["subprocess.Popen[bytes]"]:
    """The run's command in a process group of its own, which ends with the block, on GPUs that are leased meanwhile.

    `tell` gets a line where it waits for them. Raises ConfigError where several nodes have no place to meet.
    """
    if run.how.nodes > 1 and run.how.rendezvous is None:
        raise ConfigError(
            f"how.nodes={run.how.nodes}: nodes that are started by hand need a place to meet, such as "
            "how.rendezvous=first-host:29400; on a cluster, ask for '--on ray' or '--on slurm'"
        )
    with leased_gpus(run.ranks, run.how.device, run.title, tell) as gpus:
        devices = {VISIBLE: ",".join(gpus)} if gpus else {}
        child_env = {**os.environ, **run.env, **devices, **(env or {})}
        process = subprocess.Popen(run.child, env=child_env, stdout=stdout, stderr=stderr, start_new_session=True)
        try:
            yield process
        finally:
            end_group(process)


def end_group(process: "subprocess.Popen[bytes]") -> None:
    """End what is left of a process group: SIGTERM, then SIGKILL after GRACE_S."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def write_prepared(prepared: PreparedRun) -> Path:
    """Publish the prepared run in its folder, for `python -m nextvid.train.node`; the file."""
    path = Path(prepared.folder, f"{prepared.asset}.job.json")
    publish_record(str(path), asdict(prepared) | {"how": prepared.how.model_dump(mode="json")})
    return path


def run_node(file: str, rendezvous: str | None = None, address: str | None = None, first: bool = False) -> None:
    """This machine's share of the prepared run in `file`, to its end. Raises what `carry_out` does; see `meeting`."""
    values = read_record(file)
    how = parse(ExecutionConfig, values["how"], f"{file}, how")
    if how.nodes > 1:
        how = how.model_copy(update={"rendezvous": rendezvous})
    env = meeting(how, address, first) if how.nodes > 1 else {}
    carry_out(PreparedRun(**values | {"how": how}), _tell, env)


def _tell(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def main(
    file: Annotated[str, tyro.conf.Positional],
    rendezvous: Annotated[str | None, tyro.conf.arg(help="host:port where several nodes meet")] = None,
) -> None:
    """Carry out this machine's share of a prepared run."""
    run_node(file, rendezvous)


if __name__ == "__main__":
    run_rank(main, "nextvid.train.node")
