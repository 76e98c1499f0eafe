"""`make demo`: the order in which it makes assets, and what it says where it cannot."""

import errno
import re
from pathlib import Path
from typing import cast

import pytest

from examples.demo import run
from nextvid.config.project import Project
from nextvid.graph import BY_BATCH, GRAPH, assets
from nextvid.planning.waiting import Waiting
from storage.locks import locked_or_holder
from tests.factories import write_project


def test_every_asset_is_made_after_what_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "standard", lambda project: project)
    keys = {"films.000000": "key", "films.000001": "key"}
    monkeypatch.setattr(run, "waiting", lambda against: Waiting(keys, keys, (), ""))
    found = list(run.runs(cast("Project", None)))
    assert found[:3] == [("ingest", "films.000000"), ("ingest", "films.000001"), ("freeze", None)]
    made = set(BY_BATCH) | {"sources"} | set(assets("none"))
    for name, _ in found[3:]:
        assert set(GRAPH[name].reads) <= made  # type: ignore[index]
        made.add(name)
    assert made == set(GRAPH)


def test_what_stops_a_demo_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = write_project(tmp_path, {"films": {"uri": "films", "weight": 1.0, "clips": [{"frames": 1}]}})
    root = Path(project.root.url)
    monkeypatch.setattr(run, "open_project", lambda: project)

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(root / "corpus"))

    monkeypatch.setattr(run, "make_demo", full)
    with pytest.raises(SystemExit, match=f"unwritable: {re.escape(str(root))}/corpus cannot be written: its disk is"):
        run.run_demo()
    with locked_or_holder(root / "demo.lock", who="make demo") as free:
        assert free is None
        with pytest.raises(SystemExit, match=r"process \d+ \(make demo\) is at work on .*: wait until it has ended"):
            run.run_demo()
