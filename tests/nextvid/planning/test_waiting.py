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
from storage.schemas import Clips, Shots
from storage.store import LatentStore
from storage.tables import read_table, write_table
from tests.factories import flip

BATCHES = ["pictures.000000", "pictures.000001", "pictures.000002"]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """Three batches of four files, done, of which this process remembers that."""
    found = register(tmp_path / "data", 3, 4)
    assert found.root.batches() == BATCHES
    assert waiting(standard(found)).keys == {}
    return found


def asked(project: Project) -> list[str]:
    """As remembered, and the same reckoned anew."""
    found = list(waiting(standard(project)).keys)
    kept = dict(module._KNOWN)
    module._KNOWN.clear()
    assert list(waiting(standard(project)).keys) == found
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
    assert waiting(standard(project)).keys == {}


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
    assert waiting(standard(project)).keys[BATCHES[1]] == standard(project).key(BATCHES[1]) != before


def test_a_damaged_table_is_told(project: Project) -> None:
    path = commit_of(project, BATCHES[2])
    flip(path, path.stat().st_size // 2)
    lose_a_commit(project)
    found = waiting(standard(project))
    assert list(found.keys) == [BATCHES[1]], "the damaged one does not stop the others"
    (error,) = found.errors
    assert error.startswith(f"{BATCHES[2]}: ")
    assert "damaged" in error


def test_judging_goes_on_where_it_stopped(project: Project) -> None:
    change = Path(project.corpus.datasets["pictures"].uri)
    for number in (0, 4, 8):
        (change / f"{number:08d}.png").write_bytes(b"changed")
    update_sources(project)
    against = standard(project)
    assert list(waiting(against).keys) == BATCHES
    one = waiting(against, limit=1)
    assert (list(one.keys), one.last) == ([BATCHES[0]], BATCHES[0])
    two = waiting(against, limit=1, after=one.last)
    assert (list(two.keys), two.last) == ([BATCHES[1]], BATCHES[1])
    ahead = waiting(against, limit=2, after=two.last, first=[BATCHES[0]])
    assert (list(ahead.keys), ahead.last) == ([BATCHES[0], BATCHES[2]], BATCHES[2])
    assert list(waiting(against, after="pictures.999999").keys) == BATCHES, "from the start again"


def test_judging_ends_with_its_time(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "JUDGED_AT_ONCE", 1)
    lose_a_commit(project)
    late = waiting(standard(project), within_s=-1.0)
    assert (late.keys, late.last) == ({}, BATCHES[0])
    later = waiting(standard(project), within_s=-1.0, after=late.last)
    assert (list(later.keys), later.last) == ([BATCHES[1]], BATCHES[1])


def test_what_could_not_be_read_is_remembered_and_seen_when_it_changes(project: Project) -> None:
    assert list(waiting(standard(project), retry=True).keys) == []
    path = project.root.table("shots", BATCHES[0])
    shots = read_table(path, Shots)
    lost = {"status": pl.lit("quarantined", shots.schema["status"]), "reason": pl.lit("timeout")}
    write_table(path, shots.with_columns(**lost), Shots)
    assert list(waiting(standard(project), retry=True).keys) == [BATCHES[0]]
