"""Files dropped into a folder become committed rows: the sensor's ticks and the runs that it requests."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

import dagster as dg
import polars as pl
import pytest

from assets.resources import ProjectResource
from nextvid.config.project import Project
from nextvid.corpus.sources import update_sources
from nextvid.encode.plan import accepted_spec
from orchestration.schedules import NIGHT, nightly_at
from orchestration.sensors import apply_partitions
from storage.schemas import Sources
from storage.store import LatentStore
from storage.tables import read_table
from tests.orchestration.conftest import load_defs
from tests.orchestration.ticks import committed, edit, look, run, tick

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]


def requested(said: object) -> list[dg.RunRequest]:
    """The run requests among what a schedule yields."""
    assert isinstance(said, Iterable)
    return [request for request in said if isinstance(request, dg.RunRequest)]


def test_a_dropped_file_is_found_encoded_and_nothing_else_is(project: Project, instance: dg.DagsterInstance) -> None:
    assert tick(project, instance) == [], "a file joins only once it held still over two listings"
    first = tick(project, instance)
    assert sorted(str(request.partition_key) for request in first) == ["demo_images.000000", "demo_videos.000000"]
    assert instance.get_dynamic_partitions("batch") == ["demo_images.000000", "demo_videos.000000"]
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
    second = look(project, instance)
    asked = [request for request in second.run_requests or [] if request.run_key not in {r.run_key for r in first}]
    assert [request.partition_key for request in asked] == ["demo_videos.000000"]
    tags = {"dataset": "demo_videos", "reason": "the listing or a label file changed"}
    assert tags.items() <= asked[0].tags.items()
    (seen,) = second.asset_events
    counts = {name: value.value for name, value in seen.metadata.items()}
    assert counts == {"added": 1, "changed": 0, "gone": 0, "returned": 0}
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


def test_a_missing_folder_is_an_error_and_deletes_nothing(
    project: Project, instance: dg.DagsterInstance, capfd: pytest.CaptureFixture[str]
) -> None:
    tick(project, instance)
    asked = tick(project, instance)
    videos = Path(project.root.url) / "corpus" / "videos"
    videos.rename(videos.with_name("unmounted"))
    assert [request.run_key for request in tick(project, instance)] == [request.run_key for request in asked]
    assert "dataset demo_videos: " in capfd.readouterr().err
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


def test_the_night_asks_again_for_what_is_quarantined(project: Project, instance_on_disk: dg.DagsterInstance) -> None:
    instance = instance_on_disk
    resources = {"project": ProjectResource(corpus=str(project.path))}
    night = datetime(2026, 11, 21, 3, tzinfo=UTC)
    context = dg.build_schedule_context(instance=instance, resources=resources, scheduled_execution_time=night)
    asked = requested(nightly_at(NIGHT)(context))
    assert len(asked) == 2
    assert all(run(project, instance, asked))
    again = requested(nightly_at(NIGHT)(context))
    assert {request.partition_key for request in again} == {"demo_images.000000", "demo_videos.000000"}, (
        "the small corpus holds broken files of both kinds"
    )


def test_a_deleted_file_is_marked_and_its_rows_stay(made: tuple[Project, dg.DagsterInstance]) -> None:
    project, instance = made
    before = committed(project)
    videos = Path(project.root.url) / "corpus" / "videos"
    gone = next(path for path in sorted(videos.rglob("scene_*.mp4")))
    gone.unlink()
    assert [request.partition_key for request in tick(project, instance)] == ["demo_videos.000000"]
    sources = read_table(project.root.table("sources", "demo_videos.000000"), Sources)
    marked = sources.filter(pl.col("gone_at").is_not_null())
    assert marked["uri"].to_list() == [str(gone)]
    assert committed(project).equals(before)


def test_a_dataset_that_is_removed_or_renamed_says_so_and_loses_nothing(
    made: tuple[Project, dg.DagsterInstance],
) -> None:
    project, instance = made
    before = committed(project)
    renamed = edit(project, ("demo_videos", "films"))
    said = look(renamed, instance)
    assert said.run_requests == []
    message = str(said.skip_reason.skip_message) if said.skip_reason else ""
    assert "dataset demo_videos is not in" in message
    assert "Its files are listed as films now: call that demo_videos again" in message
    assert committed(project).equals(before)
    tick(renamed, instance)
    asked = tick(renamed, instance)
    assert [request.partition_key for request in asked] == ["films.000000"]
    failed = load_defs(renamed).resolve_job_def("ingest").execute_in_process(
        instance=instance, partition_key="demo_videos.000000", raise_on_error=False
    )  # fmt: skip
    assert not failed.success
    assert "names no dataset 'demo_videos'; add it again" in failure_of(failed)
    assert committed(project).equals(before)


def failure_of(result: dg.ExecuteInProcessResult) -> str:
    """What the first failed step says."""
    (failure, *_) = result.filter_events(lambda event: event.is_step_failure)
    said = failure.step_failure_data.user_failure_data
    assert said is not None
    return str(said.description)


def test_a_partition_that_does_not_exist_is_refused(project: Project, instance: dg.DagsterInstance) -> None:
    tick(project, instance)
    job = load_defs(project).resolve_job_def("ingest")
    with pytest.raises(dg.DagsterUnknownPartitionError, match="demo_videos"):
        job.execute_in_process(instance=instance, partition_key="demo_videos.000009", raise_on_error=False)
    assert project.root.batches() == []


def test_a_clock_that_jumps_back_repeats_no_run_and_loses_none(
    project: Project, instance_on_disk: dg.DagsterInstance
) -> None:
    instance = instance_on_disk
    resources = {"project": ProjectResource(corpus=str(project.path))}

    def night(day: int) -> list[str | None]:
        moment = datetime(2026, 11, day, 3, tzinfo=UTC)
        context = dg.build_schedule_context(instance=instance, resources=resources, scheduled_execution_time=moment)
        return [request.run_key for request in requested(nightly_at(NIGHT)(context))]

    first, later, back = night(21), night(22), night(21)
    assert first == back, "the same keys again, which Dagster runs once"
    assert not set(first) & set(later)
    future = next(path for path in sorted((Path(project.root.url) / "corpus" / "videos").rglob("scene_*.mp4")))
    os.utime(future, (4e9, 4e9))  # a file from the year 2096 is a changed file, no more
    assert [change.changed for change in update_sources(project)] == [1]
    assert update_sources(project) == []


def test_a_new_database_finds_everything_done(made: tuple[Project, dg.DagsterInstance]) -> None:
    project, _ = made
    before = committed(project)
    with dg.instance_for_test() as other:  # the old one is lost
        said = look(project, other)
        assert said.run_requests == []
        added = [
            request for request in said.dynamic_partitions_requests or [] if request.partitions_def_name == "batch"
        ]
        assert [sorted(request.partition_keys) for request in added] == [["demo_images.000000", "demo_videos.000000"]]
        apply_partitions(other, project)
        (outcome,) = run(project, other, [dg.RunRequest(partition_key="demo_images.000000")])
        assert outcome, "asked for all the same, it makes nothing"
    assert committed(project).equals(before)


RUN_OF_AN_INSTANCE = """
import sys
import dagster as dg
from nextvid.corpus.sources import update_sources
from nextvid.config.project import open_project
from orchestration.definitions import build_defs
from orchestration.sensors import apply_partitions

if __name__ == "__main__":
    with dg.instance_for_test() as instance:
        project = open_project(sys.argv[1])
        update_sources(project)
        apply_partitions(instance, project)
        job = build_defs(sys.argv[1]).resolve_job_def("ingest")
        done = job.execute_in_process(instance=instance, partition_key=sys.argv[2], raise_on_error=False)
        sys.exit(not done.success)
"""


def test_two_instances_on_one_root_make_each_row_once(project: Project, tmp_path: Path) -> None:
    script = tmp_path / "run_of_an_instance.py"
    script.write_text(RUN_OF_AN_INSTANCE)
    command = [sys.executable, str(script), str(project.path), "demo_images.000000"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    both = [subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(600) for process in both] == [0, 0]
    rows = committed(project)
    assert rows.height >= 8
    assert rows["row_id"].n_unique() == rows.height
    assert LatentStore(project.root, accepted_spec(project)).verify() == []
