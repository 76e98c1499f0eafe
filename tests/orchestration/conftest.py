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
    return write_small(small_corpus, tmp_path)


def write_small(corpus: Path, folder: Path) -> Project:
    """The project of the fixture `project` in a folder."""
    shutil.copytree(corpus, folder / "data" / "corpus")
    (folder / "corpus.yaml").write_text(demo_settings(folder))
    return open_project(folder / "corpus.yaml")


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
    """An instance in memory: one on disk waits for the disk at every event."""
    with dg.DagsterInstance.ephemeral() as found:
        yield found


@pytest.fixture
def instance_on_disk() -> Iterator[dg.DagsterInstance]:
    """One that a schedule's context can be built with."""
    with dg.instance_for_test() as found:
        yield found


@pytest.fixture(scope="session")
def made_once(small_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the small project, both of whose batches are made, and the home of the instance that made them."""
    from tests.orchestration.ticks import run, tick  # which imports this module

    folder = tmp_path_factory.mktemp("made") / "project"
    project = write_small(small_corpus, folder)
    (folder / "home").mkdir()
    with dg.instance_for_test(temp_dir=str(folder / "home")) as instance:
        tick(project, instance)
        assert run(project, instance, tick(project, instance)) == [True, True]
    shutil.copytree(folder, folder.with_name("kept"))
    return folder


@pytest.fixture
def made(made_once: Path) -> Iterator[tuple[Project, dg.DagsterInstance]]:
    """That project and that instance as they were then, at the same place, which their tables name."""
    shutil.rmtree(made_once)
    shutil.copytree(made_once.with_name("kept"), made_once)
    with dg.instance_for_test(temp_dir=str(made_once / "home")) as instance:
        yield open_project(made_once / "corpus.yaml"), instance
