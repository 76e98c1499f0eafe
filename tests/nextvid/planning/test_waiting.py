"""Which batches ask for a run, and that what a process remembers of them is what it would reckon anew."""

import os
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from benchmarks.registered import make_batch, register
from nextvid.config.project import Project
from nextvid.corpus.sources import update_sources
from nextvid.encode.plan import accepted_spec
from nextvid.planning import waiting as module
from nextvid.planning.waiting import standard, waiting
from storage.errors import TableError
from storage.schemas import Clips
from storage.store import LatentStore
from storage.tables import read_table, write_table
from tests.factories import flip

BATCHES = ["pictures.000000", "pictures.000001", "pictures.000002"]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """Three batches of four files, done, of which this process remembers that."""
    found = register(tmp_path / "data", 3, 4)
    assert found.root.batches() == BATCHES
    assert waiting(found) == {}
    return found


def asked(project: Project) -> list[str]:
    """As remembered, and the same reckoned anew."""
    found = list(waiting(project))
    kept = dict(module._KNOWN)
    module._KNOWN.clear()
    assert list(waiting(project)) == found
    module._KNOWN.update(kept)
    return found


def commit_of(project: Project, batch: str) -> Path:
    return Path(LatentStore(project.root, accepted_spec(project)).part(batch, 1, 0).commit_path(0))


def lose_a_commit(project: Project) -> None:
    path = commit_of(project, BATCHES[1])
    path.rename(path.with_name("away"))


def want_no_row(project: Project) -> None:
    path = project.root.table("clips", BATCHES[1])
    write_table(path, read_table(path, Clips).with_columns(uses=pl.lit([], pl.List(pl.String))), Clips)


def want_another_row(project: Project) -> None:
    path = project.root.table("clips", BATCHES[1])
    clips = read_table(path, Clips)
    changed = {"row_id": pl.lit(b"another row 1234"), "view_index": pl.lit(7, clips.schema["view_index"])}
    write_table(path, pl.concat([clips, clips.head(1).with_columns(**changed)]), Clips)


def change_a_file(project: Project) -> None:
    path = Path(project.corpus.datasets["pictures"].uri) / "00000005.png"
    path.write_bytes(b"changed")
    os.utime(path, ns=(10**18, 10**18))
    update_sources(project)


def test_nothing_is_read_of_a_batch_that_is_as_it_was(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("this was computed before")

    monkeypatch.setattr(module, "plan_batch", never)
    monkeypatch.setattr(module, "batch_fingerprint", never)
    assert waiting(project) == {}


@pytest.mark.parametrize(
    ("change", "batches"),
    [(lose_a_commit, [BATCHES[1]]), (want_another_row, [BATCHES[1]]), (change_a_file, [BATCHES[1]]), (want_no_row, [])],
)
def test_every_change_is_seen(project: Project, change: Callable[[Project], None], batches: list[str]) -> None:
    change(project)
    assert asked(project) == batches
    if change is change_a_file:
        make_batch(project, BATCHES[1])
        assert asked(project) == []


def test_the_key_of_a_batch_follows_its_listing(project: Project) -> None:
    before = standard(project).key(BATCHES[1])
    change_a_file(project)
    assert waiting(project)[BATCHES[1]] == standard(project).key(BATCHES[1]) != before


def test_a_damaged_table_is_told(project: Project) -> None:
    path = commit_of(project, BATCHES[2])
    flip(path, path.stat().st_size // 2)
    with pytest.raises(TableError, match="damaged"):
        waiting(project)
