"""The order in which `make demo` makes assets."""

from typing import cast

import pytest

from examples.demo import run
from nextvid.config.project import Project
from nextvid.graph import BY_BATCH, GRAPH, assets
from nextvid.planning.waiting import Waiting


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
