"""A small project of real files with the demo's autoencoder, and an instance of its own."""

import contextvars
import shutil
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from examples.demo.write_corpus import write_corpus
from nextvid.config.project import Project, open_project
from orchestration.definitions import build_defs
from tests.factories import demo_settings


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight videos and eight images with what the writer adds to them: copies, re-encodings, broken files."""
    folder = tmp_path_factory.mktemp("small") / "corpus"
    write_corpus(folder, videos=8, images=8)
    return folder


@pytest.fixture
def project(small_corpus: Path, tmp_path: Path) -> Project:
    """The demo's corpus.yaml over a copy of the small corpus."""
    shutil.copytree(small_corpus, tmp_path / "data" / "corpus")
    (tmp_path / "corpus.yaml").write_text(demo_settings(tmp_path))
    return open_project(tmp_path / "corpus.yaml")


def load_defs(project: Project) -> dg.Definitions:
    """The project's Definitions with their repository built, in a context of its own.

    Dagster keeps the newest instance's state storage in a context variable; a test's instance that is gone by the time
    another loads definitions would be asked for state, and fail.
    """

    def load() -> dg.Definitions:
        defs = build_defs(str(project.path))
        defs.get_repository_def()
        return defs

    return contextvars.Context().run(load)


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    """An instance in a temporary folder."""
    with dg.instance_for_test() as found:
        yield found
