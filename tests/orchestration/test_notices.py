"""What was accepted or withdrawn on the command line is reported once, by asset, with its rows."""

from pathlib import Path

import dagster as dg
import pytest

from assets.resources import ProjectResource
from nextvid.config.project import Project
from nextvid.making.publishing import publish_notice
from orchestration.notices import notices
from storage.errors import DamagedError
from tests.factories import write_project


def tick(project: Project, cursor: str | None = None) -> tuple[list[tuple[str, str, int]], str]:
    """The observations of one tick as (asset, what, rows), and the cursor after it."""
    with dg.instance_for_test() as instance:
        resources = {"project": ProjectResource(corpus=str(project.path))}
        found = notices(dg.build_sensor_context(instance, cursor=cursor, resources=resources))
    assert isinstance(found, dg.SensorResult)
    events = [event for event in found.asset_events if isinstance(event, dg.AssetObservation)]
    told = [(e.asset_key.to_user_string(), e.metadata["what"].value, e.metadata["rows"].value) for e in events]
    return told, str(found.cursor)  # type: ignore[return-value]


def test_each_notice_is_reported_once_in_order(tmp_path: Path) -> None:
    project = write_project(tmp_path, {"stills": {"uri": "stills"}})
    assert tick(project) == ([], "")
    publish_notice(project.root, "withdrew a.mp4", {"media": 1, "latents": 5, "pretrain": 0})
    told, cursor = tick(project)
    assert told == [("media", "withdrew a.mp4", 1), ("latents", "withdrew a.mp4", 5)]
    assert tick(project, cursor) == ([], cursor)
    publish_notice(project.root, "accepted: encoding", {"latents": 7})
    assert tick(project, cursor)[0] == [("latents", "accepted: encoding", 7)]
    assert len(tick(project, "by hand")[0]) == 3, "a cursor that names none begins with the first"


def test_a_damaged_notice_is_named(tmp_path: Path) -> None:
    project = write_project(tmp_path, {"stills": {"uri": "stills"}})
    path = Path(project.root.notices(), f"{10**18}.json")
    path.parent.mkdir(parents=True)
    path.write_text("{")
    with pytest.raises(DamagedError, match=path.name):
        tick(project)
