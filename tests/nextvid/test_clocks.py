"""A clock that jumps a day forward or back between calls, or while one is at work, changes no result."""

import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest

from nextvid.corpus import sources
from nextvid.corpus.sources import update_sources
from nextvid.features.output import COLUMNS, Output
from nextvid.train.pretrain import _seconds
from storage import atomic
from storage.errors import NExTVidError
from storage.limits import explained
from tests.factories import make_corpus, unchanged, write_project
from tests.nextvid.corpus.small_media import write_picture

DAY_S = 86_400


def age(path: Path, seconds: float) -> None:
    for one in (path, *path.rglob("*")):
        found = one.stat()
        os.utime(one, (found.st_atime - seconds, found.st_mtime - seconds))


@pytest.mark.faults
@pytest.mark.parametrize("jump_s", [DAY_S, -DAY_S])
def test_makers_find_everything_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump_s: int) -> None:
    for name in ("a", "b"):
        write_picture(tmp_path / "stills" / f"{name}.jpg", name)
    stills = {"uri": "stills", "weight": 1.0, "clips": [{"frames": 1}]}
    project = write_project(tmp_path, {"stills": stills})
    first = make_corpus(project)
    now, real = time.time, time.time_ns

    class Jumped(datetime):
        @classmethod
        def now(cls, tz: object = None) -> "Jumped":
            return super().now(UTC) + timedelta(seconds=jump_s)

    monkeypatch.setattr(time, "time", lambda: now() + jump_s)
    monkeypatch.setattr(time, "time_ns", lambda: real() + jump_s * 10**9)
    monkeypatch.setattr(sources, "datetime", Jumped)
    with unchanged(project.root.url):
        again = make_corpus(project)
    assert {name: one.digest for name, one in again.items()} == {name: one.digest for name, one in first.items()}
    write_picture(tmp_path / "stills" / "c.jpg", "c")
    assert [change.added for change in update_sources(project)] == [1]
    assert update_sources(project) == []


@pytest.mark.parametrize("jump_s", [DAY_S, -DAY_S])
def test_of_two_parts_of_features_the_later_written_counts(tmp_path: Path, jump_s: int) -> None:
    output = Output(tmp_path / "features.parquet", {"encoder": "x"}, (2,))
    output.open()
    for turn, status in enumerate(("quarantined", "ok")):
        row = {**dict.fromkeys(COLUMNS), "path": "a.mp4", "status": status, "vector": [1.0, 2.0] if turn else None}
        output.add(pl.DataFrame([row], schema=output.schema, orient="row"), str(turn % 2))
        age(output.parts, jump_s * (1 - turn))
    output.merge()
    found = pl.read_parquet(output.path)
    assert found.select("path", "status").rows() == [("a.mp4", "ok")]


def test_a_sweep_after_a_jump_costs_a_writer_its_file_and_nothing_else(tmp_path: Path) -> None:
    """Its temporary name is a day old all of a sudden: the writer is told, and what was there stays."""
    path = tmp_path / "table"
    atomic.publish_bytes(str(path), b"old")

    def write() -> None:
        with atomic.staged_file(str(path)) as temporary:
            temporary.write_bytes(b"new")
            age(temporary, DAY_S + 1)
            assert atomic.remove_leftovers(str(tmp_path), DAY_S) == [str(temporary)]

    with pytest.raises(FileNotFoundError) as caught:
        write()
    said = explained(caught.value)
    assert isinstance(said, NExTVidError)
    assert "run the command again" in str(said)
    assert path.read_bytes() == b"old"


def test_a_training_lasts_no_negative_time() -> None:
    events = [
        {"kind": kind, "time_s": time_s} for kind, time_s in (("start", 100.0), ("step", 103.0), ("step", -9000.0))
    ]
    assert _seconds(events) == 3.0
