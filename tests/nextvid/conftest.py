"""Fixtures shared by the tests of evaluation, and the command line as a function."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nextvid.__main__ import main
from nextvid.config.project import Project, open_project

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


@pytest.fixture(scope="session")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with a trainset and a complete run of a few steps. Session-wide: write nothing below pretrain/."""
    from tests.nextvid.tiny_project import write_evaluated  # torch: most tests here do without

    return write_evaluated(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def own_copy(evaluated: Project, tmp_path: Path) -> Project:
    """A copy of that project, before evaluation, that a test may change."""
    base = evaluated.path.parent
    shutil.copytree(base, tmp_path / "copy", ignore=shutil.ignore_patterns("probes", "samples", "report"))
    said = (tmp_path / "copy" / "corpus.yaml").read_text().replace(str(base), str(tmp_path / "copy"))
    (tmp_path / "copy" / "corpus.yaml").write_text(said)
    return open_project(tmp_path / "copy" / "corpus.yaml")
