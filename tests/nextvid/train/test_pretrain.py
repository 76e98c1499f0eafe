"""Preparing, starting, cancelling and judging runs; torchrun itself where it matters."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import pytest

from nextvid.config.project import Project
from nextvid.config.recipe import ExecutionConfig
from nextvid.config.recipes import recipe
from nextvid.train import checkpoint, pretrain
from nextvid.train.events import NAME, EventLog, read_events
from nextvid.train.loop import train
from nextvid.train.node import PreparedRun, end_group
from nextvid.train.pretrain import finish_run, make_pretrain, prepare_run
from nextvid.train.run import open_run
from nextvid.trainset.mask_plan import make_plan
from storage import atomic
from storage.errors import ConfigError, DamagedError, RefusedError, UpstreamError
from tests.factories import flip, passed
from tests.forked import alive
from tests.nextvid.train.corpus import make_project, tiny_spec, write_trainset
from tests.nextvid.train.tiny import ALONE, HOW, tiny_recipe

pytestmark = pytest.mark.usefixtures("tiny_by_name")
LAUNCH = "01234567-89ab-cdef-0123-456789abcdef"


@pytest.fixture
def project(tmp_path: Path) -> Project:
    made = make_project(tmp_path)
    make_plan(made.root, tiny_recipe())
    return made


def _train_here(project: Project, prepared: PreparedRun) -> None:
    train(project, open_run(Path(prepared.folder)), ALONE)


def test_prepared_once_is_prepared_the_same_again(project: Project) -> None:
    one, two = (
        prepare_run(project, "tiny", how=HOW),
        prepare_run(project, "tiny", how=HOW.model_copy(update={"ranks": 2})),
    )
    assert one.run_id == two.run_id
    assert not one.complete
    assert open_run(Path(one.folder)).how == HOW.model_copy(update={"ranks": 2})
    config = json.loads((Path(one.folder) / "config.json").read_text())
    assert config["versions"]["torch"] == version("torch"), "as installed: torch itself adds its CUDA build"


def test_the_command_stands_for_itself(project: Project) -> None:
    prepared = prepare_run(project, "tiny", how=ExecutionConfig(ranks=3))
    command = prepared.command
    assert command[:4] == [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    assert command[command.index("--nproc-per-node") + 1] == "3"
    assert command[command.index("--run") + 1] == prepared.run_id
    assert prepared.child == [*command, "--launcher", str(os.getpid())], "only a child of ours can end with us"
    assert Path(command[command.index("--corpus") + 1]).is_absolute()
    assert prepared.env["OMP_NUM_THREADS"] == "1"
    assert int(prepared.env["MALLOC_TRIM_THRESHOLD_"]) > 1 << 30
    assert set(prepare_run(project, "tiny", how=ExecutionConfig(device="cuda")).env) == {"OMP_NUM_THREADS"}


@pytest.mark.parametrize(
    ("cores", "memory", "batch", "ranks"),
    [
        (1, 1 << 40, 8, 1),
        (2, 1 << 40, 8, 2),
        (3, 1 << 40, 8, 2),
        (64, 1 << 40, 8, 8),
        (64, 4 << 30, 8, 4),
        (2, 1 << 40, 9, 1),
    ],
)
def test_on_a_cpu_ranks_share_the_batch_equally_and_fit(
    monkeypatch: pytest.MonkeyPatch, cores: int, memory: int, batch: int, ranks: int
) -> None:
    monkeypatch.setattr("nextvid.machine.memory_bytes", lambda: memory)
    monkeypatch.setattr(pretrain, "memory_bytes", lambda: memory)
    demo = recipe("demo")
    stages = tuple(stage.model_copy(update={"batch": batch}) for stage in demo.stages)
    assert pretrain.cpu_ranks(demo.model_copy(update={"stages": stages}), cores) == ranks


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sed=1"], "did you mean 'seed'"),
        (["stages.warmup.steps=many"], "stages.0.steps"),
        (["seed"], "key.path=value"),
    ],
)
def test_wrong_overrides(project: Project, overrides: Sequence[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare_run(project, "tiny", overrides)


def test_overrides_make_another_run_and_draw_their_own_masks(project: Project) -> None:
    plain = prepare_run(project, "tiny")
    seeded = prepare_run(project, "tiny", ["seed=1"])
    masked = prepare_run(project, "tiny", ["masks.strategies.long.budget=5"])
    assert len({plain.run_id, seeded.run_id, masked.run_id}) == 3
    assert prepare_run(project, "tiny", ["seed=1"]).run_id == seeded.run_id
    assert prepare_run(project, "tiny", repeat=1).run_id != plain.run_id


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.cooldown.frames=16", "no clips of 16 frames; it has 1, 4, 8. Add clips of that length"),
        ("model.grid_height=8", "on a grid of 8 x 4, and the latents are"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_run_is_written(project: Project, override: str, message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        prepare_run(project, "tiny", (override,))
    assert not Path(project.root.run("tiny", "0" * 12)).parent.exists()


def test_upstream_is_asked_for(tmp_path: Path) -> None:
    project = make_project(tmp_path)
    with pytest.raises(UpstreamError, match="mask_plan"):
        prepare_run(project, "tiny")
    make_plan(project.root, tiny_recipe())
    prepare_run(project, "tiny")
    trainset = atomic.read_json(project.root.latest("trainset"))["digest"]
    passed(f"{project.root.pointed('trainset', trainset)}/checks.json", "trainset", False)
    with pytest.raises(UpstreamError, match="by hand"):
        prepare_run(project, "tiny")


def test_a_damaged_mask_plan_is_named_before_a_run_begins(project: Project) -> None:
    (damaged,) = Path(project.root.url).glob("mask_plan/*/long.npy")
    flip(damaged)
    with pytest.raises(DamagedError, match=f"^{damaged}: bytes differ .*; remove the folder {damaged.parent} and make"):
        prepare_run(project, "tiny", how=HOW)
    assert not list(Path(project.root.url).glob("pretrain/*/*"))


def test_a_retry_of_a_launch_finds_the_first_attempts_trainset(project: Project) -> None:
    first = prepare_run(project, "tiny", launch=LAUNCH)
    write_trainset(project.root, tiny_spec(), seed=1)
    assert prepare_run(project, "tiny", launch=LAUNCH).run_id == first.run_id
    assert prepare_run(project, "tiny").run_id != first.run_id
    assert prepare_run(project, "tiny", launch=LAUNCH.replace("0", "1")).run_id != first.run_id
    pointer = atomic.read_json(project.root.launch("tiny", LAUNCH))
    assert pointer["run"] == first.run_id


def test_finished_without_overrides_becomes_the_latest(project: Project) -> None:
    other = prepare_run(project, "tiny", ["seed=1"], HOW)
    _train_here(project, other)
    outcome = finish_run(project, "tiny", other.run_id)
    assert outcome.passed
    assert not atomic.exists(project.root.latest_run("tiny"))
    plain = prepare_run(project, "tiny", how=HOW)
    _train_here(project, plain)
    outcome = finish_run(project, "tiny", plain.run_id)
    assert [check.name for check in outcome.checks] == ["checkpoint_loads", "losses_finite", "rank_above_alarm"]
    assert atomic.read_json(project.root.latest_run("tiny"))["run"] == plain.run_id
    assert (outcome.rows, outcome.numbers["steps"]) == (42, 12)
    assert 0 < float(outcome.numbers["step_s"]) < outcome.seconds
    assert prepare_run(project, "tiny", how=HOW).complete


def test_unfinished_runs_are_not_judged(project: Project) -> None:
    prepared = prepare_run(project, "tiny", how=HOW)
    with pytest.raises(UpstreamError, match="0 of 12 steps"):
        finish_run(project, "tiny", prepared.run_id)
    with pytest.raises(UpstreamError, match="no such run"):
        finish_run(project, "tiny", "f" * 12)


def _finished(project: Project) -> Path:
    prepared = prepare_run(project, "tiny", how=HOW)
    _train_here(project, prepared)
    return Path(prepared.folder)


def test_each_check_can_fail_and_then_nothing_points_to_the_run(project: Project) -> None:
    folder = _finished(project)
    intact = (folder / NAME).read_bytes()
    with EventLog(folder) as log:
        log.write("step", 12, {"loss": {"flow/short": float("nan")}, "step_s": 1.0, "wait_share": 0.0})
    assert _failed(project, folder) == ["losses_finite"]
    (folder / NAME).write_bytes(intact)
    with EventLog(folder) as log:
        log.write("diagnostics", 12, {"effective_rank": 1.0})
    assert _failed(project, folder) == ["rank_above_alarm"]  # a warning: what collapsed can be scored
    assert atomic.read_json(project.root.latest_run("tiny"))["run"] == folder.name
    atomic.remove_tree(str(Path(project.root.latest_run("tiny"))))
    (folder / NAME).write_bytes(intact)
    path = checkpoint.path_at(folder / "checkpoints", 12) / "optimizer.safetensors"
    flip(path)
    assert _failed(project, folder) == ["checkpoint_loads"]
    assert not atomic.exists(project.root.latest_run("tiny"))


def _failed(project: Project, folder: Path) -> list[str]:
    return [check.name for check in finish_run(project, "tiny", folder.name).checks if not check.passed]


def _begun(folder: Path, process: "subprocess.Popen[bytes]") -> list[int]:
    """Wait for the first steps; process ids of agent and trainer."""
    deadline = time.monotonic() + 240
    while not (folder / NAME).exists() or not any(e["kind"] == "step" for e in read_events(folder)):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    trainer = next(event["process"] for event in read_events(folder) if event["kind"] == "start")
    return [process.pid, int(trainer)]


ENDLESS = ["stages.warmup.steps=1000000"]


@pytest.mark.slow
def test_a_cancelled_group_is_gone(project: Project) -> None:
    prepared = prepare_run(project, "tiny", ENDLESS, HOW)
    process = subprocess.Popen(
        prepared.child, env={**os.environ, **prepared.env}, start_new_session=True, stdout=subprocess.DEVNULL
    )
    pids = _begun(Path(prepared.folder), process)
    end_group(process)
    deadline = time.monotonic() + 60  # ten seconds are our aim, and a busy machine takes longer
    while any(map(alive, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


LAUNCHER = """
import subprocess, sys
from nextvid.config import project
from nextvid.config.project import open_project
from nextvid.train import pretrain
from tests.nextvid.train.tiny import HOW, tiny_recipe
project.recipe_by_name = lambda name, _: tiny_recipe()
pretrain.make_pretrain(open_project(sys.argv[1]), "tiny", ["stages.warmup.steps=1000000"], HOW)
"""


@pytest.mark.slow
def test_a_killed_launcher_leaves_no_trainer_behind(project: Project) -> None:
    prepared = prepare_run(project, "tiny", ENDLESS, HOW)
    command = [sys.executable, "-c", LAUNCHER, str(project.path)]
    launcher = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    _, trainer = _begun(Path(prepared.folder), launcher)
    agent = int(Path(f"/proc/{trainer}/stat").read_text().rpartition(")")[2].split()[1])
    assert agent != launcher.pid
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.wait()
    deadline = time.monotonic() + 60
    while alive(trainer):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    while alive(agent):  # the agent follows its trainer
        assert time.monotonic() < deadline + 60
        time.sleep(0.05)


@pytest.mark.slow
def test_a_failed_trainer_says_why(project: Project) -> None:
    odd = HOW.model_copy(update={"micro_batch": 3})
    with pytest.raises(RefusedError, match="micro_batch 3 does not divide the 4 clips"):
        make_pretrain(project, "tiny", how=odd)


@pytest.mark.slow
def test_two_ranks_train_as_one(tmp_path: Path) -> None:
    """The same draws at equal global batch, the same losses but for the order of sums; then nothing is left to do."""
    recipe = tiny_recipe()
    runs = []
    for ranks in (1, 2):
        (tmp_path / str(ranks)).mkdir()
        project = make_project(tmp_path / str(ranks))
        make_plan(project.root, recipe)
        how = HOW.model_copy(update={"ranks": ranks})
        outcome = make_pretrain(project, "tiny", how=how)
        assert outcome.made
        assert outcome.passed
        runs.append(Path(project.root.run("tiny", str(outcome.run))))
        stamps = {path: path.stat().st_mtime_ns for path in runs[-1].rglob("*.safetensors")}
        assert not make_pretrain(project, "tiny", how=how).made
        assert {path: path.stat().st_mtime_ns for path in runs[-1].rglob("*.safetensors")} == stamps
    one, two = ([e for e in read_events(folder) if e["kind"] == "step"] for folder in runs)
    assert read_events(runs[1])[0]["ranks"] == 2
    assert [event["draws"] for event in one] == [event["draws"] for event in two]
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-4)
        assert b["norm"] == pytest.approx(a["norm"], rel=1e-2)


@pytest.mark.faults
def test_two_launchers_that_meet_train_as_one_process(tmp_path: Path) -> None:
    runs = []
    for nodes in (1, 2):
        (tmp_path / str(nodes)).mkdir()
        project = make_project(tmp_path / str(nodes))
        make_plan(project.root, tiny_recipe())
        meet = {} if nodes == 1 else {"rendezvous": f"localhost:{free_port()}"}
        prepared = prepare_run(project, "tiny", how=HOW.model_copy(update={"ranks": nodes, "nodes": nodes, **meet}))
        processes = [subprocess.Popen(prepared.command, env=os.environ | prepared.env) for _ in range(nodes)]
        assert [process.wait(240) for process in processes] == [0] * nodes
        runs.append(Path(prepared.folder))
        assert open_run(runs[-1]).complete
    assert runs[0].name == runs[1].name
    one, two = ([e["loss"] for e in read_events(folder) if e["kind"] == "step"] for folder in runs)
    for step, (a, b) in enumerate(zip(one, two, strict=True)):
        assert b == pytest.approx(a, rel=1e-5 if step < 3 else 2e-4)  # AdamW amplifies the order of sums


@pytest.mark.faults
def test_a_node_that_never_joins_is_told_in_one_line(project: Project) -> None:
    meet = {"ranks": 2, "nodes": 2, "rendezvous": f"localhost:{free_port()}", "timeout_s": 5}
    how = HOW.model_copy(update=meet)
    with pytest.raises(RefusedError, match=r"1 of 2 nodes \(all but .*\) did not join within 5 s; start the same"):
        make_pretrain(project, "tiny", how=how)
    outcome = make_pretrain(project, "tiny", how=HOW)  # the run's folder is whole
    assert outcome.passed


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("localhost", 0))
        return int(bound.getsockname()[1])


def test_how_defaults_are_one_rank_on_whatever_there_is() -> None:
    assert (ExecutionConfig().ranks, ExecutionConfig().device) == (1, "auto")
