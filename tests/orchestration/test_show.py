"""The job `show`: a launchpad's fields become a picture and facts in the run's events."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pytest
from PIL import Image

from assets.reporting import launchpad_link
from nextvid.config.project import Project
from nextvid.lineage import shown
from nextvid.lineage.shown import Shown
from orchestration.definitions import build_defs
from tests.factories import write_project


def test_the_picture_is_in_the_events(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, instance: dg.DagsterInstance
) -> None:
    asked: list[Any] = []

    def show(_: Project, what: str, out: str, recipe: str | None, features: bool) -> Shown:
        asked.append((what, recipe, features))
        Image.new("RGB", (1200, 40), "red").save(out)
        return Shown(what, "file", ("read by pyav",), out)

    monkeypatch.setattr(shown, "show", show)
    job = build_defs(str(write_project(tmp_path, {}).path)).resolve_job_def("show")
    fields = {"what": "films/a.mp4", "features": True}
    done = job.execute_in_process(run_config={"ops": {"draw": {"config": fields}}}, instance=instance)
    assert asked == [("films/a.mp4", None, True)]
    (output,) = [event for event in done.all_node_events if event.event_type == dg.DagsterEventType.STEP_OUTPUT]
    found = output.step_output_data.metadata
    assert str(found["picture"].value).startswith("![films/a.mp4](data:image/jpeg;base64,")
    assert "read by pyav" in str(found["facts"].value)


def test_the_link_leads_to_the_launchpad_of_the_same_location() -> None:
    origin = SimpleNamespace(
        location_name="nextvid", repository_origin=SimpleNamespace(repository_name="__repository__")
    )
    found = launchpad_link(SimpleNamespace(remote_job_origin=origin), "show")  # type: ignore[arg-type]
    assert found == dg.MetadataValue.url("/locations/__repository__@nextvid/jobs/show/playground")
    assert launchpad_link(SimpleNamespace(remote_job_origin=None), "show") is None  # type: ignore[arg-type]


def test_what_is_unknown_fails_in_one_line(tmp_path: Path, instance: dg.DagsterInstance) -> None:
    job = build_defs(str(write_project(tmp_path, {}).path)).resolve_job_def("show")
    run_config = {"ops": {"draw": {"config": {"what": "nobody"}}}}
    done = job.execute_in_process(run_config=run_config, raise_on_error=False, instance=instance)
    assert not done.success
    (failed,) = [event for event in done.all_node_events if event.is_step_failure]
    assert "'nobody' is no row, clip, shot or media id and no file" in str(failed.step_failure_data.user_failure_data)
