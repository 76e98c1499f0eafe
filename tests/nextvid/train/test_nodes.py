"""Training on several hosts that are started by hand, with the command line: `nextvid make pretrain` on each."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nextvid.config.project import Project, open_project
from nextvid.train.events import read_events
from nextvid.trainset.trainset import Trainset
from storage.errors import UpstreamError
from tests.nextvid.tiny_project import OVERRIDES
from tests.nextvid.train.corpus import make_project, tiny_spec
from tests.nextvid.train.hosts import Host, refused, two_hosts

pytestmark = [
    pytest.mark.faults,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(bool(refused()), reason=f"no network namespaces: {refused()}"),
]

RECIPE = "small"
HOW = {"device": "cpu", "log_every_steps": 1, "diagnose_every_steps": 1000, "checkpoint_every_steps": 5}
MEET: dict[str, Any] = {"nodes": 2, "ranks": 2, "rendezvous": "host-a:29400", "timeout_s": 60}
ENDS_WITHIN_S = 300  # on a machine that is busy with other things; 15 s of them were measured on a quiet one


def _project(folder: Path) -> Project:
    """With a recipe of its own, whose path has a space."""
    (folder / "recipes").mkdir(parents=True)
    changes = "".join(f"  {path}: {value}\n" for path, _, value in (change.partition("=") for change in OVERRIDES))
    (folder / "recipes" / f"{RECIPE}.yaml").write_text(f"base: demo\noverrides:\n{changes}")
    return open_project(make_project(folder, spec=tiny_spec(height=8, channels=16)).path)


def _start(host: Host | None, project: Project, steps: int = 3, **how: object) -> "subprocess.Popen[str]":
    """`nextvid make pretrain` on a host, or here; ended with the test."""
    words = [sys.executable, "-m", "nextvid", "make", "pretrain", "--corpus", str(project.path), "--recipe", RECIPE]
    words += ["--trainset", Trainset.open(project.root).digest, "--set", f"stages.warmup.steps={steps}"]
    words += ["--how", *(f"{name}={value}" for name, value in (HOW | how).items())]
    return subprocess.Popen(
        words if host is None else host.command(*words),
        env={**os.environ, "PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _ended(process: "subprocess.Popen[str]", within_s: float = 300) -> tuple[int, str]:
    """Exit code, and the line that says why or that it is done."""
    output, _ = process.communicate(timeout=within_s)
    lines = [line for line in output.splitlines() if line.startswith(("pretrain small", "lost:", "refused:"))]
    assert len(lines) == 1, output
    return process.returncode, lines[0]


def _folder(project: Project) -> Path:
    """Of the one run."""
    (folder,) = Path(project.root.recipe_folder(RECIPE)).iterdir()
    return folder


def _events(project: Project, kind: str) -> list[dict[str, Any]]:
    """None before training has begun."""
    try:
        return [event for event in read_events(_folder(project)) if event["kind"] == kind]
    except (UpstreamError, FileNotFoundError, ValueError):
        return []


def _at_step(project: Project, ranks: int, after: int) -> int:
    """Wait until so many ranks have made two checkpoints behind this step; the step at which they started."""
    until_s = time.monotonic() + 300
    while time.monotonic() < until_s:
        time.sleep(0.2)
        starts, saved = _events(project, "start"), _events(project, "checkpoint")
        if (
            starts
            and starts[-1]["ranks"] == ranks
            and saved
            and saved[-1]["step"] >= max(starts[-1]["step"], after) + 10
        ):
            return int(starts[-1]["step"])
    raise TimeoutError(f"no checkpoint of {ranks} ranks behind step {after}: {_events(project, 'start')}")


def test_two_hosts_train_as_one_process(tmp_path: Path) -> None:
    alone, together = _project(tmp_path / "one host"), _project(tmp_path / "two hosts")
    assert _ended(_start(None, alone, ranks=1))[0] == 0
    with two_hosts(tmp_path) as hosts:
        processes = [_start(host, together, **MEET) for host in hosts]
        assert [_ended(process)[0] for process in processes] == [0, 0]
    assert _folder(alone).name == _folder(together).name
    assert _events(together, "start")[0]["ranks"] == 2
    one, two = ([event["loss"] for event in _events(project, "step")] for project in (alone, together))
    for step, (a, b) in enumerate(zip(one, two, strict=True)):
        assert b == pytest.approx(a, rel=1e-5 if step < 3 else 2e-4)  # AdamW amplifies the order of sums


def test_a_lost_host_ends_the_other_and_any_number_of_hosts_resumes(tmp_path: Path) -> None:
    project = _project(tmp_path / "run")
    with two_hosts(tmp_path) as (one, two):
        kept, lost = (_start(host, project, steps=10**6, **MEET) for host in (one, two))
        _at_step(project, 2, 0)
        two.kill()
        code, said = _ended(kept, ENDS_WITHIN_S)
        assert (code, said[:6]) == (75, "lost: "), said
        lost.communicate(timeout=60)
    saved = _events(project, "checkpoint")[-1]["step"]
    alone = _start(None, project, steps=10**6, ranks=1)
    assert _at_step(project, 1, saved) == saved
    alone.terminate()
    alone.communicate(timeout=60)
    with two_hosts(tmp_path) as (one, two):
        processes = [_start(host, project, steps=10**6, **MEET) for host in (one, two)]
        assert _at_step(project, 2, saved) > saved
        two.run("ip", "link", "set", "cable", "down")  # nothing comes any more, and nobody says so
        for process in processes:
            code, said = _ended(process, MEET["timeout_s"] + ENDS_WITHIN_S)
            assert (code, said[:6]) == (75, "lost: "), said


def test_a_host_that_never_joins_is_named(tmp_path: Path) -> None:
    project = _project(tmp_path / "run")
    with two_hosts(tmp_path) as (one, two):
        code, said = _ended(_start(two, project, **MEET | {"timeout_s": 5}))
        assert (code, said.partition(": ")[0]) == (1, "refused")
        assert "host-b did not reach host-a:29400, tried for at most 5 s" in said
        code, said = _ended(_start(one, project, **MEET | {"timeout_s": 5}))
        assert (code, said.partition(": ")[0]) == (1, "refused")
        assert "1 of 2 nodes (all but host-a) did not join within 5 s" in said
    assert _ended(_start(None, project))[0] == 0  # the run's folder is whole
