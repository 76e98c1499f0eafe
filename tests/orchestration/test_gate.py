"""The trainset as the one gate, with more batches than Dagster watches: it compares digests itself.

Dagster stops marking what is downstream of more than 100 partitions, silently (1.13, measured). The first test
holds that premise; should it fall with a newer Dagster, the gate may be thought of anew.
"""

import os
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster._core.definitions.data_version import CachingStaleStatusResolver, StaleStatus
from dagster._core.loader import LoadingContextForTest

from benchmarks.registered import make_batch, register
from nextvid.config.project import Project, open_project
from nextvid.corpus.sources import update_sources
from nextvid.making.publishing import read_latest
from nextvid.planning.waiting import left_behind, standard, waiting
from nextvid.trainset.trainset import Trainset, make_trainset
from orchestration.sensors import apply_partitions
from storage.atomic import read_json
from storage.errors import UpstreamError
from storage.tables import publish_checks
from tests.orchestration.conftest import load_defs

pytestmark = pytest.mark.slow

BATCHES, FILES = 104, 10  # a few more batches than Dagster watches, 1,000 values a channel that statistics ask for


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project of 104 batches of 10 files."""
    return register(tmp_path_factory.mktemp("large") / "data", BATCHES, FILES)


@pytest.fixture(scope="module")
def watched(large: Project) -> Iterator[dg.DagsterInstance]:
    """An instance that has seen the latents of every batch made."""
    with dg.DagsterInstance.ephemeral() as instance:
        apply_partitions(instance, large)
        for batch in large.root.batches():
            materialise(instance, batch, "1")
        yield instance


def materialise(instance: dg.DagsterInstance, batch: str, version: str) -> None:
    """What a run of the batch reports of its latents."""
    tags = {"dagster/data_version": version}
    instance.report_runless_asset_event(dg.AssetMaterialization("latents", partition=batch, tags=tags))


def freeze(project: Project, instance: dg.DagsterInstance, *assets: str) -> dict[str, Any]:
    """Run the job `freeze`, or these assets of it; metadata and data version of the trainset."""
    job, only = load_defs(project).resolve_job_def("freeze"), [dg.AssetKey(asset) for asset in assets] or None
    result = job.execute_in_process(instance=instance, asset_selection=only)
    (event,) = [e for e in result.get_asset_materialization_events() if e.asset_key == dg.AssetKey("trainset")]
    found = {name: value.value for name, value in event.materialization.metadata.items()}
    return found | {"version": (event.materialization.tags or {})["dagster/data_version"]}


def status(project: Project, instance: dg.DagsterInstance, asset: str) -> StaleStatus:
    """What the UI says of an asset."""
    graph = load_defs(project).resolve_asset_graph()
    context = LoadingContextForTest(instance)
    return CachingStaleStatusResolver(instance, graph, context).get_status(dg.AssetKey(asset))


def change(project: Project, batch: str, name: str) -> None:
    """Other bytes under a known name, listed, and the batch made again."""
    path = Path(project.corpus.datasets["pictures"].uri) / name
    path.write_bytes(b"changed")
    os.utime(path, ns=(10**18, 10**18))
    (changed,) = update_sources(project)
    assert changed.batch == batch
    make_batch(project, batch)


def test_what_dagster_does_not_see_the_trainset_does(large: Project, watched: dg.DagsterInstance) -> None:
    batches = large.root.batches()
    assert len(batches) == BATCHES
    first = freeze(large, watched)
    assert first["version"] == first["digest"]
    assert (first["batches"], first["batches_left_out"], first["dagster/row_count"]) == (BATCHES, 0, BATCHES * FILES)
    again = freeze(large, watched, "trainset")
    assert (again["made"], again["version"]) == (False, first["version"])

    change(large, batches[77], f"{77 * FILES:08d}.png")
    materialise(watched, batches[77], "2")
    assert status(large, watched, "latent_stats") == StaleStatus.FRESH, (
        "Dagster would have marked it if there were fewer partitions"
    )
    second = freeze(large, watched)
    assert second["made"]
    assert second["version"] != first["version"]
    said = read_json(f"{large.root.pointed('trainset', second['digest'])}/trainset.json")
    assert said["parent"] == first["digest"]


def test_batches_that_are_left_out_are_named(large: Project, watched: dg.DagsterInstance) -> None:
    refused = large.root.batches()[3]
    verdict = {"name": "no_clip_crosses_a_cut", "passed": False, "numbers": {"crossing": 1}}
    publish_checks(large.root.checks("clips", refused), "clips", [verdict])
    before = read_latest(large.root, "trainset")
    found = freeze(large, watched, "trainset")
    assert found["version"] != before
    assert (found["batches"], found["batches_left_out"]) == (BATCHES - 1, 1)
    assert found["left_out"] == f"{refused}: its clips did not pass their checks"


def test_a_dataset_that_is_removed_leaves_whole_what_its_rows_are_in(large: Project, tmp_path: Path) -> None:
    digest = read_latest(large.root, "trainset")
    assert digest is not None
    (tmp_path / "empty").mkdir()
    path = tmp_path / "corpus.yaml"
    named = f"  others: {{uri: {tmp_path / 'empty'}, weight: 1.0, clips: [{{frames: 1, crop: whole}}]}}\n"
    path.write_text(re.sub(r"  pictures: .*\n", named, large.path.read_text()))
    project = open_project(path)
    assert waiting(standard(project)).keys == {}
    (line,) = left_behind(project)
    assert f"dataset pictures is not in {path} any more: its {BATCHES} batches stay as they are" in line
    with pytest.raises(UpstreamError, match="0 of 0 batches are ready"):
        make_trainset(project)
    assert read_latest(project.root, "trainset") == digest
    Trainset.open(project.root, digest).check()


@pytest.mark.filterwarnings("ignore::dagster.BetaWarning")  # of Dagster's own test function
def test_automation_asks_for_the_trainset_when_one_batch_of_many_is_made(
    large: Project, watched: dg.DagsterInstance
) -> None:
    defs = load_defs(large)
    seen = dg.evaluate_automation_conditions(defs=defs, instance=watched)
    seen = dg.evaluate_automation_conditions(defs=defs, instance=watched, cursor=seen.cursor)
    assert seen.total_requested == 0, "nothing new, nothing asked for"
    materialise(watched, large.root.batches()[90], "3")
    seen = dg.evaluate_automation_conditions(defs=defs, instance=watched, cursor=seen.cursor)
    asked = [key for key in ("latent_stats", "duplicates", "trainset") if seen.get_num_requested(dg.AssetKey(key))]
    assert asked == ["latent_stats", "trainset"]

    tomorrow = datetime.now(UTC) + timedelta(days=1)
    seen = dg.evaluate_automation_conditions(defs=defs, instance=watched, cursor=seen.cursor, evaluation_time=tomorrow)
    assert seen.get_num_requested(dg.AssetKey("trainset")) == 1, "once a day, whatever was made"
    assert seen.total_requested == 1


def test_automation_waits_without_a_failure_and_a_person_is_told(
    project: Project, instance: dg.DagsterInstance
) -> None:
    job = load_defs(project).resolve_implicit_global_asset_job_def()
    for tags, success in (({"dagster/from_automation_condition": "true"}, True), ({}, False)):
        result = job.execute_in_process(
            instance=instance, asset_selection=[dg.AssetKey("trainset")], tags=tags, raise_on_error=False
        )
        assert result.success is success
        assert result.get_asset_materialization_events() == []
        assert result.get_asset_check_evaluations() == []
