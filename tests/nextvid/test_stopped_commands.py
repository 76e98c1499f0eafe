"""Ctrl-C and SIGTERM of commands at random moments: one line, nothing left running, the same again goes on."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nextvid.config.project import Project
from nextvid.stopping import descendants
from nextvid.train.run import find_run
from tests.factories import copy_project
from tests.nextvid.corpus.small_media import write_picture
from tests.nextvid.test_stopping import alive
from tests.nextvid.tiny_project import RECIPE

pytestmark = [pytest.mark.faults, pytest.mark.timeout(2400)]
TRIES = max(1, int(os.environ.get("NEXTVID_TRIES", "200")) // 40)
DONE = 0


def words_of(project: Project, encoder: Path, folder: Path, what: str) -> list[str]:
    where = ["--corpus", str(project.path)]
    run = find_run(project, RECIPE).id
    match what:
        case "export":
            return ["export", run, str(folder / "exported"), *where]
        case "features":
            return ["features", str(folder / "media"), "--encoder", str(encoder), "--out", str(folder / "out.parquet")]
        case _:
            return ["make", what, "--recipe", RECIPE, "--run", run, "--how", "device=cpu", *where]


def started(words: list[str], temporary: Path) -> "subprocess.Popen[str]":
    temporary.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "nextvid", *words]
    environment = {**os.environ, "TMPDIR": str(temporary)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("what", ["export", "features", "probes", "report"])
def test_a_command_is_stopped_at_any_moment(
    evaluated: Project, tmp_path: Path, what: str, record_property: Callable[[str, object], None]
) -> None:
    encoder = tmp_path / "encoder"
    own = copy_project(evaluated, tmp_path / "whole")
    for number in range(6):
        write_picture(tmp_path / "media" / f"{number}.jpg", str(number))
    for needed in [["export", find_run(own, RECIPE).id, str(encoder), "--corpus", str(own.path)]] + (
        [words_of(own, encoder, tmp_path, name) for name in ("probes", "samples")] if what == "report" else []
    ):
        subprocess.run([sys.executable, "-m", "nextvid", *needed], check=True, capture_output=True)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "media").symlink_to(tmp_path / "media")
    began = time.monotonic()
    whole = started(words_of(own, encoder, tmp_path / "own", what), tmp_path / "tmp")
    err = whole.communicate(timeout=600)[1]
    assert whole.returncode == DONE, err
    took_s = time.monotonic() - began
    stopped = 0
    for seed in range(TRIES):
        folder = tmp_path / str(seed)
        project = copy_project(own if what == "report" else evaluated, folder)
        (folder / "media").symlink_to(tmp_path / "media")
        number = (signal.SIGINT, signal.SIGTERM)[seed % 2]
        words = words_of(project, encoder, folder, what)
        running = started(words, tmp_path / f"tmp{seed}")
        until = time.monotonic() + 60
        while not list((tmp_path / f"tmp{seed}").iterdir()) and time.monotonic() < until:
            time.sleep(0.005)  # before that, the interpreter itself starts
        time.sleep(random.Random(seed).uniform(0, took_s))
        children = descendants(running.pid)
        running.send_signal(number)
        err = running.communicate(timeout=60)[1]
        if running.returncode != DONE:
            stopped += 1
            assert running.returncode == 128 + number, err
            assert [line for line in err.splitlines() if line.startswith("stopped by")], err
            assert "Traceback" not in err
        assert not [child for child in children if alive(child)]
        assert not list((tmp_path / f"tmp{seed}").iterdir())
        again = started(words, tmp_path / f"tmp{seed}")
        err = again.communicate(timeout=600)[1]
        assert again.returncode == DONE or (what == "export" and "exists already" in err), err
    record_property("tries", stopped)
