"""Files dropped into a folder become committed rows: the sensor's ticks and the runs that it requests."""

import shutil
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import dagster as dg
import polars as pl
import pytest

from assets.resources import ProjectResource
from nextvid.corpus.project import Project
from nextvid.encode.plan import spec_in_force
from orchestration.schedules import nightly
from orchestration.sensors import apply_partitions, new_sources
from storage.errors import CorpusError
from storage.latents import LatentStore
from tests.orchestration.conftest import load_defs

pytestmark = pytest.mark.slow


def tick(project: Project, instance: dg.DagsterInstance) -> list[dg.RunRequest]:
    """One tick of the sensor, with its partitions applied as the daemon would; the runs that it requests."""
    context = dg.build_sensor_context(
        instance=instance, resources={"project": ProjectResource(corpus=str(project.path))}
    )
    result = new_sources(context)
    assert isinstance(result, dg.SensorResult)
    apply_partitions(instance, project)
    return list(result.run_requests or [])


def run(project: Project, instance: dg.DagsterInstance, requests: Sequence[dg.RunRequest]) -> list[bool]:
    """What the daemon does with requests: one run of the job each."""
    job = load_defs(project).resolve_job_def("ingest")
    return [
        job.execute_in_process(instance=instance, partition_key=request.partition_key, raise_on_error=False).success
        for request in requests
    ]


def requested(said: object) -> list[dg.RunRequest]:
    """The run requests among what a schedule yields."""
    assert isinstance(said, Iterable)
    return [request for request in said if isinstance(request, dg.RunRequest)]


def committed(project: Project) -> pl.DataFrame:
    """Every committed row that is ok."""
    store = LatentStore(project.root, spec_in_force(project))
    commits = pl.concat([store.commits(batch) for batch in project.root.batches("clips")])
    return commits.filter(pl.col("status") == "ok")


def test_a_dropped_file_is_found_encoded_and_nothing_else_is(project: Project, instance: dg.DagsterInstance) -> None:
    assert tick(project, instance) == [], "a file joins only once it held still over two listings"
    first = tick(project, instance)
    assert sorted(str(request.partition_key) for request in first) == ["demo_images.000000", "demo_videos.000000"]
    assert instance.get_dynamic_partitions("batch") == ["demo_images.000000", "demo_videos.000000"]
    assert instance.get_dynamic_partitions("benchmark") == ["motion", "shape"]
    assert run(project, instance, first) == [True, True]
    before = committed(project)
    assert before.height > 20

    videos = Path(project.root.url) / "corpus" / "videos"
    source = next(path for path in sorted(videos.rglob("scene_*.mp4")))
    added = videos / "added.mp4"
    shutil.copy(source, added)
    with added.open("ab") as file:
        file.write(b"\x00\x00\x00\x10free" + bytes(8))  # another digest, the same pictures
    tick(project, instance)
    second = tick(project, instance)
    asked = [request for request in second if request.run_key not in {r.run_key for r in first}]
    assert [request.partition_key for request in asked] == ["demo_videos.000000"]
    assert run(project, instance, asked) == [True]

    after = committed(project)
    new = after.join(before, on="row_id", how="anti")
    assert new.height > 0
    assert after.height == before.height + new.height
    assert set(new["part"]) == {1}, "new rows open the next part; the old part stays as it was"


def test_nothing_new_starts_no_run(project: Project, instance: dg.DagsterInstance) -> None:
    shutil.rmtree(Path(project.root.url) / "corpus" / "videos")
    (Path(project.root.url) / "corpus" / "videos").mkdir()
    for broken in (Path(project.root.url) / "corpus" / "images").rglob("broken*"):
        broken.unlink()
    tick(project, instance)
    assert run(project, instance, tick(project, instance)) == [True]
    assert tick(project, instance) == []


def test_a_missing_folder_is_an_error_and_deletes_nothing(project: Project, instance: dg.DagsterInstance) -> None:
    tick(project, instance)
    tick(project, instance)
    videos = Path(project.root.url) / "corpus" / "videos"
    videos.rename(videos.with_name("unmounted"))
    with pytest.raises(CorpusError, match="demo_videos"):
        tick(project, instance)
    assert project.root.batches() == ["demo_images.000000", "demo_videos.000000"]


def test_a_dataset_that_cannot_be_listed_does_not_hold_up_another(
    project: Project, instance: dg.DagsterInstance
) -> None:
    tick(project, instance)
    videos = Path(project.root.url) / "corpus" / "videos"
    videos.rename(videos.with_name("unmounted"))
    assert [request.partition_key for request in tick(project, instance)] == ["demo_images.000000"]


def test_a_batch_over_its_budget_stops_alone(project: Project, instance: dg.DagsterInstance) -> None:
    project.path.write_text(project.path.read_text().replace("quarantine_budget: 0.9", "quarantine_budget: 0.0"))
    for broken in (Path(project.root.url) / "corpus" / "images").rglob("broken*"):
        broken.unlink()
    tick(project, instance)
    requests = tick(project, instance)
    outcome = dict(zip([r.partition_key for r in requests], run(project, instance, requests), strict=True))
    assert outcome == {"demo_images.000000": True, "demo_videos.000000": False}
    assert project.root.batches("shots") == ["demo_images.000000"]


def test_the_night_asks_again_for_what_is_quarantined(project: Project, instance: dg.DagsterInstance) -> None:
    resources = {"project": ProjectResource(corpus=str(project.path))}
    night = datetime(2026, 11, 21, 3, tzinfo=UTC)
    context = dg.build_schedule_context(instance=instance, resources=resources, scheduled_execution_time=night)
    asked = requested(nightly(context))
    assert len(asked) == 2
    assert all(run(project, instance, asked))
    again = requested(nightly(context))
    assert {request.partition_key for request in again} == {"demo_images.000000", "demo_videos.000000"}, (
        "the small corpus holds broken files of both kinds"
    )
