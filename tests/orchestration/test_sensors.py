"""One thing that is away or wrong does not stop a tick: of the sensor `new_sources`, of the schedule `nightly`.

Batches are tables without media (benchmarks/registered.py), so that a tick takes no run.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from assets.declare import BATCHES
from assets.resources import ProjectResource
from assets.sources import sources
from benchmarks.registered import register
from nextvid.config.project import Project, open_project
from nextvid.graph import GRAPH
from nextvid.planning import costs
from nextvid.planning.acceptance import accept_asked
from orchestration import sensors
from orchestration.schedules import NIGHT, nightly_at
from orchestration.sensors import apply_partitions
from storage.errors import CorpusError
from tests.factories import edit_project
from tests.orchestration.conftest import load_defs
from tests.orchestration.ticks import look

KEYS = [f"pictures.{number:06d}" for number in range(4)]
Change = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four batches of two files, done."""
    return Path(register(tmp_path_factory.mktemp("registered") / "data", 4, 2).root.url)


@pytest.fixture
def project(registered: Path, tmp_path: Path) -> Project:
    """A copy of them, whose files stay where they are."""
    shutil.copytree(registered, tmp_path / "data", ignore=shutil.ignore_patterns("pictures"))
    return edit_project(tmp_path / "data" / "corpus.yaml", lambda said: said.update(root=str(tmp_path / "data")))


@pytest.fixture
def instance(project: Project) -> Iterator[dg.DagsterInstance]:
    """An instance that knows these batches."""
    with dg.instance_for_test() as found:
        apply_partitions(found, project)
        yield found


def with_a_dataset(project: Project, **fields: Any) -> Project:
    """The project with a second dataset `others` of two new pictures."""
    folder = Path(project.root.url) / "others"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        (folder / name).touch()
    value = {"uri": str(folder), "weight": 1.0, "clips": [{"frames": 1, "crop": "whole"}], **fields}
    return edit_project(project.path, lambda said: said["datasets"].update(others=value))


def lose(project: Project, *batches: str) -> None:
    """Their clips are to be made again."""
    for batch in batches:
        Path(project.root.checks("clips", batch)).unlink()


def asked(result: dg.SensorResult) -> list[str | None]:
    return [request.partition_key for request in result.run_requests or []]


def night(project: Project, instance: dg.DagsterInstance, hour: int = 3) -> list[dg.RunRequest]:
    resources = {"project": ProjectResource(corpus=str(project.path))}
    moment = datetime(2026, 11, 21, hour, tzinfo=UTC)
    context = dg.build_schedule_context(instance=instance, resources=resources, scheduled_execution_time=moment)
    found = nightly_at(NIGHT)(context)
    assert isinstance(found, Iterator)
    return [request for request in found if isinstance(request, dg.RunRequest)]


@pytest.mark.filterwarnings("ignore::dagster.BetaWarning")  # of DataVersionsByPartition
def test_a_label_file_that_is_away_stops_its_own_dataset_alone(
    project: Project, instance: dg.DagsterInstance, capfd: pytest.CaptureFixture[str]
) -> None:
    labels = Path(project.root.url) / "labels.csv"
    labels.write_text("path,what\n00000000.png,a\n")
    described = {"layout": "csv", "file": str(labels), "targets": {"what": "what"}}
    edit_project(project.path, lambda said: said["datasets"]["pictures"].update(labels=described))
    away = with_a_dataset(project)
    accept_asked(away)
    look(away, instance)  # the new files must hold still
    labels.unlink()
    assert asked(look(away, instance)) == ["others.000000"]
    assert "dataset pictures: " in capfd.readouterr().err
    apply_partitions(instance, away)
    job = dg.define_asset_job("observe", [sources])
    resources = {"project": ProjectResource(corpus=str(away.path))}
    defs = dg.Definitions([sources], jobs=[job], resources=resources)
    assert defs.resolve_job_def("observe").execute_in_process(instance=instance).success
    seen = instance.fetch_observations(dg.AssetKey("sources"), limit=10).records
    assert [record.partition_key for record in seen] == ["others.000000"]
    alone = edit_project(away.path, lambda said: said["datasets"].pop("others"))
    with pytest.raises(CorpusError, match=r"dataset pictures: .*labels.csv"):  # nothing is left to ask for
        look(alone, instance)


def test_a_dataset_that_cannot_be_listed_stops_no_other_request(project: Project, instance: dg.DagsterInstance) -> None:
    """Not those of a changed configuration, and not the night's."""
    lose(project, KEYS[1])
    away = edit_project(project.path, lambda said: said["datasets"]["pictures"].update(uri="/nowhere"))
    assert asked(look(away, instance)) == [KEYS[1]]
    assert [request.partition_key for request in night(away, instance)] == [KEYS[1]]
    shutil.copy(project.root.checks("media", KEYS[0]), project.root.checks("clips", KEYS[1]))


def test_observations_are_limited(
    project: Project, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sensors, "OBSERVED", 1)
    more = with_a_dataset(project, max_batch_images=1)
    accept_asked(more)
    look(more, instance)  # the new files must hold still
    result = look(more, instance)
    assert asked(result) == ["others.000000", "others.000001"]
    assert [event.partition for event in result.asset_events] == ["others.000000"]
    assert "2 batches changed: observations show the first 1 of them" in capfd.readouterr().err


def test_requests_are_limited_and_go_on_by_the_cursor(
    project: Project, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensors, "REQUESTS", 2)
    lose(project, *KEYS[:3])
    first = look(project, instance)
    second = look(project, instance, first.cursor)
    third = look(project, instance, second.cursor)
    assert [sorted(map(str, asked(one))) for one in (first, second, third)] == [KEYS[:2], [KEYS[0], KEYS[2]], KEYS[1:3]]


@pytest.mark.parametrize("cursor", ["no JSON", "[1]", '{"digests": ["a"], "cost": null}', '{"after": 7}', "null"])
def test_a_cursor_that_a_person_or_an_earlier_version_wrote_is_tolerated(
    project: Project, instance: dg.DagsterInstance, cursor: str
) -> None:
    lose(project, KEYS[3])
    assert asked(look(project, instance, cursor)) == [KEYS[3]]


def test_an_unmounted_root_is_not_an_empty_one(project: Project, instance: dg.DagsterInstance) -> None:
    folder = Path(project.root.folder("sources"))
    folder.rename(folder.with_name("unmounted"))
    for what in (look, night):
        with pytest.raises(CorpusError, match=r"holds no batch, but Dagster knows 4: mount it"):
            what(project, instance)
    assert not folder.exists(), "nothing is written where the root is not"
    assert instance.get_dynamic_partitions("batch") == KEYS


def test_many_partitions_are_not_deleted_and_few_are(project: Project, instance: dg.DagsterInstance) -> None:
    look(project, instance)  # a listing completes what the newest one may have left undone
    for batch in KEYS[:3]:
        Path(project.root.table("sources", batch)).unlink()
    result = look(project, instance)
    assert result.dynamic_partitions_requests == []
    assert result.skip_reason is not None
    assert "3 of the 4 batches that Dagster knows are not in" in str(result.skip_reason.skip_message)
    assert apply_partitions(instance, project)
    assert instance.get_dynamic_partitions("batch") == KEYS
    instance.add_dynamic_partitions("batch", [f"more.{number:06d}" for number in range(3)])
    instance.delete_dynamic_partition("batch", KEYS[0])
    instance.delete_dynamic_partition("batch", KEYS[1])
    for name in ("more.000000", "more.000001"):
        shutil.copy(project.root.table("sources", KEYS[3]), project.root.table("sources", name))
    requests = look(project, instance).dynamic_partitions_requests or []
    (deleted,) = [request for request in requests if isinstance(request, dg.DeleteDynamicPartitionsRequest)]
    assert list(deleted.partition_keys) == ["more.000002", KEYS[2]]


def test_what_was_accepted_before_is_asked_for_again(project: Project, instance: dg.DagsterInstance) -> None:
    """Dagster runs a key once: from one policy to another and back is a new key."""

    def policy(flip: bool) -> str | None:
        clips = [{"frames": 1, "crop": "whole", "flip": flip}]
        on = edit_project(project.path, lambda said: said["datasets"]["pictures"].update(clips=clips))
        accept_asked(on)
        lose(on, KEYS[0]) if Path(on.root.checks("clips", KEYS[0])).exists() else None
        return next(r.run_key for r in look(on, instance).run_requests or [] if r.partition_key == KEYS[0])

    keys = [policy(True), policy(False), policy(True)]
    assert len(set(keys)) == 3


def test_each_evaluation_of_the_night_has_keys_of_its_own(project: Project, instance: dg.DagsterInstance) -> None:
    lose(project, KEYS[0])
    (first,), (again,), (second,) = night(project, instance), night(project, instance), night(project, instance, 15)
    assert first.run_key == again.run_key != second.run_key


def test_the_forecast_is_computed_by_a_job_and_read_by_the_sensor(
    project: Project, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept_asked(project)
    other = edit_project(project.path, lambda said: said["encoding"].update(resolution=32))
    with monkeypatch.context() as patched:
        patched.setattr(costs, "forecast", None)  # a tick has no time for it
        result = look(other, instance)
    (request,) = result.run_requests or []
    assert request.job_name == "forecast"
    assert load_defs(other).resolve_job_def("forecast").execute_in_process(instance=instance).success
    said = look(other, instance)
    assert said.run_requests == []
    assert said.skip_reason is not None
    assert "the accepted encoding: 4 batches are outdated, 8 rows" in str(said.skip_reason.skip_message)
    again = edit_project(project.path, lambda said: said["encoding"].update(resolution=16))
    (request,) = look(again, instance).run_requests or []
    assert request.job_name == "forecast", "it answers another question"


def test_a_wrong_autoencoder_does_not_stop_what_is_accepted(project: Project, instance: dg.DagsterInstance) -> None:
    accept_asked(project)
    lose(project, KEYS[2])
    wrong = edit_project(project.path, lambda said: said["encoding"].update(autoencoder="/nowhere"))
    assert asked(look(wrong, instance)) == [KEYS[2]]


def test_a_raised_version_is_asked_for_under_auto_and_not_under_ask(
    project: Project, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept_asked(project)
    monkeypatch.setitem(GRAPH, "shots", replace(GRAPH["shots"], version=GRAPH["shots"].version + 1))
    (request,) = look(open_project(project.path), instance).run_requests or []
    assert request.job_name == "forecast"
    auto = edit_project(project.path, lambda said: said.update(reencode="auto"))
    assert asked(look(auto, instance)) == KEYS


def test_projects_on_one_instance_have_names_of_their_own(tmp_path: Path) -> None:
    """Definitions are loaded in a process each, which the environment tells apart."""
    import os
    import subprocess
    import sys

    code = (
        "from assets.declare import BATCHES, PREFIX; from orchestration.definitions import defs;"
        "print(BATCHES.name, PREFIX, defs.resolve_asset_graph().get_all_asset_keys() != set())"
    )
    repository = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "NEXTVID_PROJECT": "mine"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["mine_batch", "mine_", "True"]
    assert BATCHES.name == "batch"
