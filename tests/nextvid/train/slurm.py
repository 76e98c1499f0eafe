"""A stand-in for Slurm on this machine: sbatch, squeue, scancel, srun and scontrol, which run a job file for real.

One program, called by the command's name. The folder that SLURM_STAND_IN names has a file for each job with its
process group and name. Nodes are called node1, node2, ...; one that SLURM_STAND_IN_ABSENT names never starts its task.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = ("sbatch", "squeue", "scancel", "srun", "scontrol")


def install(folder: Path) -> None:
    """Write the commands into a folder, which the caller puts on PATH."""
    folder.mkdir()
    for command in COMMANDS:
        path = folder / command
        path.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(__file__)} {command} "$@"\n')
        path.chmod(0o755)


def jobs() -> Path:
    """Where the jobs are."""
    return Path(os.environ["SLURM_STAND_IN"])


def sbatch(words: list[str]) -> int:
    """Start the job file in a session of its own; prints its id."""
    options = dict(word[2:].split("=", 1) for word in words[:-1] if "=" in word)
    script = Path(words[-1])
    asked = [
        line.removeprefix("#SBATCH --").split("=", 1) for line in script.read_text().splitlines() if "#SBATCH" in line
    ]
    options |= {name: value for name, *rest in asked for value in rest}
    job = str(len(list(jobs().iterdir())) + 1)
    nodes = ",".join(f"node{number}" for number in range(1, int(options["nodes"]) + 1))
    with Path(options["output"].replace("%j", job).replace("%%", "%")).open("ab") as output:
        process = subprocess.Popen(
            ["/bin/sh", str(script)],
            env=os.environ | {"SLURM_JOB_ID": job, "SLURM_JOB_NODELIST": nodes},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    (jobs() / job).write_text(f"{process.pid} {options['job-name']}")
    sys.stdout.write(f"{job};here\n")
    return 0


def squeue(words: list[str]) -> int:
    """Jobs of a name whose process has not ended, as `id STATE`."""
    (wanted,) = [word.partition("=")[2] for word in words if word.startswith("--name=")]
    for path in jobs().iterdir():
        group, name = path.read_text().split()
        if name == wanted and alive(int(group)):
            sys.stdout.write(f"{path.name} RUNNING\n")
    return 0


def scancel(words: list[str]) -> int:
    """SIGTERM to the job's processes, as Slurm does before it kills them."""
    os.killpg(int((jobs() / words[0]).read_text().split()[0]), signal.SIGTERM)
    return 0


def srun(words: list[str]) -> int:
    """The command once for each node; the first that fails ends the others."""
    command = words[next(at for at, word in enumerate(words) if not word.startswith("--")) :]
    tasks = []
    for node in os.environ["SLURM_JOB_NODELIST"].split(","):
        absent = node == os.environ.get("SLURM_STAND_IN_ABSENT")
        told = os.environ | {"SLURMD_NODENAME": node}
        tasks.append(subprocess.Popen(["sleep", "600"] if absent else command, env=told))
    while all(task.poll() in (None, 0) for task in tasks) and any(task.poll() is None for task in tasks):
        time.sleep(0.1)
    for task in tasks:
        task.terminate()
    return max((task.wait() for task in tasks), key=abs)


def scontrol(_: list[str]) -> int:
    """`show hostnames`: one name a line."""
    sys.stdout.write(os.environ["SLURM_JOB_NODELIST"].replace(",", "\n") + "\n")
    return 0


def alive(process: int) -> bool:
    """Whether a process has not ended; one that ended and waits for its parent has."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(globals()[sys.argv[1]](sys.argv[2:]))
