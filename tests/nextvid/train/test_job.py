"""Training as a job of Slurm, by a stand-in that runs the job file for real on this machine."""

import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nextvid.config.project import Project
from nextvid.config.recipe import ExecutionConfig
from nextvid.making.progress import Progress
from nextvid.train import job
from nextvid.train.events import read_events
from nextvid.train.node import PreparedRun, reported, why
from nextvid.train.pretrain import make_pretrain, prepare_run
from nextvid.train.run import open_run
from nextvid.trainset.mask_plan import make_plan
from storage.errors import (
    ConfigError,
    ConflictError,
    DamagedError,
    LostError,
    MachineError,
    NExTVidError,
    RefusedError,
    UnwritableError,
)
from tests.forked import alive
from tests.nextvid.train import slurm
from tests.nextvid.train.corpus import make_project
from tests.nextvid.train.tiny import HOW, tiny_recipe

pytestmark = pytest.mark.usefixtures("tiny_by_name")
TWO = HOW.model_copy(update={"ranks": 2, "nodes": 2, "timeout_s": 60})


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """In a folder that a shell would cut in two, on a machine that submits to the stand-in."""
    slurm.install(tmp_path / "bin")
    (tmp_path / "jobs").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_STAND_IN", str(tmp_path / "jobs"))
    monkeypatch.setenv("PYTHONPATH", str(Path.cwd()))
    monkeypatch.setattr(job, "POLL_S", 0.2)
    folder = tmp_path / "it's 5% of $HOME"
    folder.mkdir()
    made = make_project(folder)
    make_plan(made.root, tiny_recipe())
    return made


def _losses(folder: Path) -> list[dict[str, Any]]:
    return [event["loss"] for event in read_events(folder) if event["kind"] == "step"]


def test_the_job_file_asks_for_a_task_a_node_and_quotes_what_it_runs(project: Project) -> None:
    how = ExecutionConfig(ranks=16, nodes=2, threads=3, device="cuda")
    prepared = prepare_run(project, "tiny", how=how)
    lines = job._script(prepared, "name").splitlines()
    asked = {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")}
    assert {"nodes=2", "ntasks-per-node=1", "gpus-per-node=8", "cpus-per-task=32"} <= asked
    (srun,) = [shlex.split(line) for line in lines if line.startswith("srun")]
    assert srun[3:7] == [sys.executable, "-m", "nextvid.train.node", f"{prepared.folder}/pretrain.job.json"]
    assert srun[-1].startswith("$(hostname):2")


@pytest.mark.faults
def test_a_job_of_two_nodes_trains_as_one_process(project: Project, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    here = make_project(tmp_path / "here")
    make_plan(here.root, tiny_recipe())
    told: list[Progress] = []
    runs = []
    for where, on, how in ((here, "here", HOW), (project, "slurm", TWO)):
        outcome = make_pretrain(where, "tiny", how=how, on=on, on_progress=told.append)  # type: ignore[arg-type]
        assert outcome.passed
        runs.append(Path(where.root.run("tiny", str(outcome.run))))
    assert open_run(runs[1]).how == TWO
    notes = [one.note for one in told]
    assert f"Slurm job 1: RUNNING, pretrain {runs[1].name} on 2 nodes of 1 CPU ranks" in notes
    assert any(note.startswith("step 12/12 end") for note in notes)
    for step, (a, b) in enumerate(zip(*map(_losses, runs), strict=True)):
        assert b == pytest.approx(a, rel=1e-5 if step < 3 else 2e-4)  # AdamW amplifies the order of sums


@pytest.mark.faults
def test_a_node_that_never_joins_is_named(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STAND_IN_ABSENT", "node2")
    with pytest.raises(RefusedError, match=r"pretrain \w+: node node2 did not join within 5 s; .*\d$"):
        make_pretrain(project, "tiny", how=TWO.model_copy(update={"timeout_s": 5}), on="slurm")


@pytest.mark.faults
def test_ctrl_c_cancels_the_job_and_a_lost_terminal_does_not(project: Project, tmp_path: Path) -> None:
    endless = ["stages.warmup.steps=1000000"]
    prepared = prepare_run(project, "tiny", endless, TWO)

    def stop(progress: Progress) -> None:
        if "align" in progress.note:
            raise KeyboardInterrupt

    with job.submitted(prepared, job.SLURM, {}, print):  # whoever left this block without an error left the job
        pass
    with pytest.raises(KeyboardInterrupt):
        make_pretrain(project, "tiny", endless, TWO, on="slurm", on_progress=stop)
    assert [path.name for path in (tmp_path / "jobs").iterdir()] == ["1"], "the job that there was is followed"
    (start,) = [event for event in read_events(Path(prepared.folder)) if event["kind"] == "start"]
    until_s = time.monotonic() + 60
    while alive(start["process"]):
        assert time.monotonic() < until_s
        time.sleep(0.1)


def test_without_slurm_or_with_a_place_to_meet_nothing_is_submitted(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_hand = TWO.model_copy(update={"rendezvous": "a:1"})
    with pytest.raises(ConfigError, match="a cluster finds one itself"):
        make_pretrain(project, "tiny", how=by_hand, on="slurm")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="'squeue' is not on PATH"):
        make_pretrain(project, "tiny", how=TWO, on="slurm")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match="--on ray needs RAY_ADDRESS"):
        make_pretrain(project, "tiny", how=TWO, on="ray")
    with pytest.raises(ConfigError, match="need a place to meet, such as"):
        make_pretrain(project, "tiny", how=TWO)


SUMMARY = "Failures:\n  exitcode  : -15 (pid: 2)\nRoot Cause (first observed failure):\n[0]:\n  exitcode  : {} (pid: 1)"


@pytest.mark.parametrize(
    ("output", "error", "says"),
    [
        (SUMMARY.format(-9), LostError, "signal 9 ended a rank"),
        (SUMMARY.format(1), RefusedError, "exit code 1 (see "),
        ("conflict: another process (id 4) is at work\n" + SUMMARY.format(1), ConflictError, "(id 4) is at work"),
        ("refused: no\nlost: rank 1 misses another node: x\n" + SUMMARY.format(1), RefusedError, "(no)"),
        ("lost: rank 1 misses another node: x\n" + SUMMARY.format(75), LostError, "(rank 1 misses another node: x)"),
        ("damaged: /a: bytes differ; remove it\n" + SUMMARY.format(4), DamagedError, "/a: bytes differ; remove it"),
        ("unwritable: /a is full\n" + SUMMARY.format(5), UnwritableError, "(/a is full)"),
        ("system: memory is used up\n" + SUMMARY.format(5), MachineError, "(memory is used up)"),
        ("RendezvousTimeoutError", RefusedError, "1 of 2 nodes (all but"),
        ("RendezvousConnectionError", RefusedError, "did not reach a:1, tried for at most 60 s"),
        ("num_nodes_waiting RendezvousConnectionError", LostError, "hears nothing more from a:1"),
    ],
)
def test_why_says_in_one_line_what_ended_a_group(
    tmp_path: Path, output: str, error: type[NExTVidError], says: str
) -> None:
    how = TWO.model_copy(update={"rendezvous": "a:1"})
    prepared = PreparedRun("0" * 12, "0" * 32, str(tmp_path), [], False, how)
    prepared.log.touch()
    found = why(prepared, 1, output)
    assert type(found) is error
    assert says in str(found)
    assert "\n" not in str(found)
    assert reported(f"{found.kind}: {found}") == (found.kind, str(found))
