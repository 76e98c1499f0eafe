"""Fixtures shared by the tests of evaluation, and the command line as a function."""

import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from nextvid.commands import main
from nextvid.config.corpus import MachineConfig
from nextvid.config.project import Project
from nextvid.machine import VISIBLE, leased_gpus
from nextvid.making.outcome import Outcome
from nextvid.making.progress import OnProgress, Progress
from tests.factories import copy_project

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def nextvid(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `nextvid ...` here: (exit code, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["nextvid", *arguments])
        code = 0
        try:
            main()
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture
def refuse_to_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Of a machine that pretends to one GPU, which a training holds: checks that a maker waits for it, and says so."""
    monkeypatch.setenv(VISIBLE, "7")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def stop(progress: Progress) -> None:
        if progress.note:
            raise InterruptedError(progress.line())

    def check(name: str, project: Project, make: Callable[[Project, OnProgress], Outcome]) -> None:
        corpus = project.corpus.model_copy(update={"execution": MachineConfig()})
        line = rf"{re.escape(name)}: waiting for 1 GPUs: 7 is held by process \d+ \(pretrain 1\)"
        with pytest.raises(InterruptedError, match=line):
            make(replace(project, corpus=corpus), stop)

    with leased_gpus(1, "auto", "pretrain 1", print):
        yield check


@pytest.fixture(scope="session")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with a trainset and a complete run of a few steps. Session-wide: write nothing below pretrain/."""
    from tests.nextvid.tiny_project import write_evaluated  # torch: most tests here do without

    return write_evaluated(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def own_copy(evaluated: Project, tmp_path: Path) -> Project:
    """A copy of that project, before evaluation, that a test may change."""
    return copy_project(evaluated, tmp_path / "copy")
