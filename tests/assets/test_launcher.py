"""The trainer as a child of a step: its end, its failure and its process group, with real processes."""

import contextvars
import os
import sys
import time
from pathlib import Path

import dagster as dg
import pytest

from assets import launcher
from assets.launcher import run_group
from nextvid.machine import WATCH_S
from nextvid.train.events import EventLog
from nextvid.train.node import PreparedRun

PARENT = (
    "import subprocess, sys, time; "
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
    "open(sys.argv[1], 'w').write(str(child.pid)); {then}"
)


def step(prepared: PreparedRun) -> dg.ExecuteInProcessResult:
    """Run a prepared run inside a real step."""

    @dg.asset(retry_policy=dg.RetryPolicy(max_retries=2))
    def pretrain(context: dg.AssetExecutionContext) -> dg.MaterializeResult:  # type: ignore[type-arg]
        run_group(context, prepared)
        return dg.MaterializeResult()

    # in a context of its own: an instance of another test, gone by now, is not asked for its state
    return contextvars.Context().run(lambda: dg.materialize([pretrain], raise_on_error=False))


def prepared(folder: Path, code: str, *arguments: str) -> PreparedRun:
    """A run whose command is a line of Python."""
    return PreparedRun("0" * 12, "0" * 32, str(folder), [sys.executable, "-c", code, *arguments], False)


def gone(process: int, within_s: float = 60.0) -> bool:
    """Whether a process ends within the time that cancelling may take."""
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        if Path(f"/proc/{process}/stat").read_text().split(") ")[-1].startswith("Z"):
            return True
        time.sleep(0.05)
    return False


def test_what_a_trainer_prints_stands_in_its_log(tmp_path: Path) -> None:
    assert step(prepared(tmp_path, "print('trained')")).success
    assert (tmp_path / "trainer.log").read_text() == "trained\n"


def test_a_failed_trainer_fails_the_step_and_says_why(tmp_path: Path) -> None:
    result = step(prepared(tmp_path, "raise SystemExit('no trainset')"))
    assert not result.success
    (failure,) = [event for event in result.all_events if event.is_step_failure]
    said = failure.step_failure_data.user_failure_data
    assert said is not None
    assert "exit code 1" in str(said.description)
    about = {name: value.value for name, value in said.metadata.items()}
    assert about == {"run": "0" * 12, "log": str(tmp_path / "trainer.log")}
    assert "no trainset" in str(said.description)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads process states from /proc")
def test_nothing_of_the_group_outlives_the_step(tmp_path: Path) -> None:
    note = tmp_path / "child"
    assert step(prepared(tmp_path, PARENT.format(then="raise SystemExit(0)"), str(note))).success
    assert gone(int(note.read_text()))


COUNTED = "open(sys.argv[1], 'a').write('x'); "


@pytest.mark.parametrize(
    ("end", "attempts"),
    [
        ("os.kill(os.getpid(), 9)", 3),  # killed: the out-of-memory killer, say
        (
            "print('Root Cause (first):\\n  exitcode  : -9 (pid: 4711)'); raise SystemExit(1)",
            3,
        ),  # torchrun, of a rank that was killed
        ("raise SystemExit('config: wrong')", 1),
        ("raise ValueError('a bug')", 1),
    ],
)
def test_crashes_alone_are_retried(tmp_path: Path, end: str, attempts: int) -> None:
    note = tmp_path / "attempts"
    assert not step(prepared(tmp_path, f"import os, sys; {COUNTED}{end}", str(note))).success
    assert len(note.read_text()) == attempts


def test_a_run_that_has_not_ended_is_observed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "OBSERVE_S", 0.0)
    with EventLog(tmp_path) as log:
        log.write("start", 0, {"run": "0" * 12})
        log.write("scores", 0, {"accuracy": {"shape/knn": 0.25}, "chance": {"shape": 0.1}})
        log.write("step", 20, {"stage": "warmup", "align": 1.5, "flow": 0.5, "lr": 1e-3, "norm": {"encoder": 1.0}})
    result = step(prepared(tmp_path, f"import time; time.sleep({4 * WATCH_S})"))
    (event,) = result.filter_events(lambda e: e.event_type_value == "ASSET_OBSERVATION")  # once: nothing newer came
    metadata = event.asset_observation_data.asset_observation.metadata
    assert {name: value.value for name, value in metadata.items()} == {
        "step": 20, "stage": "warmup", "align": 1.5, "flow": 0.5, "lr": 1e-3, "shape_knn": 0.25
    }  # fmt: skip
