"""Ticks of the sensor and the runs that they ask for, without a daemon; and edits of corpus.yaml between them."""

from collections.abc import Sequence

import dagster as dg
import polars as pl

from assets.resources import ProjectResource
from nextvid.config.project import Project, open_project
from nextvid.encode.plan import accepted_spec
from orchestration.jobs import forecast_of
from orchestration.sensors import TICK_S, apply_partitions, new_sources_every
from storage.store import LatentStore
from tests.orchestration.conftest import load_defs


def tick(project: Project, instance: dg.DagsterInstance) -> list[dg.RunRequest]:
    """One tick of the sensor, with its partitions applied as the daemon would; the runs of batches that it requests."""
    result = look(project, instance)
    apply_partitions(instance, project)
    return [request for request in result.run_requests or [] if request.job_name == "ingest"]


def look(project: Project, instance: dg.DagsterInstance, cursor: str | None = None) -> dg.SensorResult:
    """One tick of the sensor, nothing applied; what it said."""
    resources = {"project": ProjectResource(corpus=str(project.path))}
    context = dg.build_sensor_context(instance=instance, cursor=cursor, resources=resources)
    result = new_sources_every(TICK_S, forecast_of(resources["project"]))(context)
    assert isinstance(result, dg.SensorResult)
    return result


def run(project: Project, instance: dg.DagsterInstance, requests: Sequence[dg.RunRequest]) -> list[bool]:
    """What the daemon does with requests: one run of the job each."""
    job = load_defs(project).resolve_job_def("ingest")
    return [
        job.execute_in_process(instance=instance, partition_key=request.partition_key, raise_on_error=False).success
        for request in requests
    ]


def committed(project: Project) -> pl.DataFrame:
    """Every committed row that is ok."""
    store = LatentStore(project.root, accepted_spec(project))
    commits = pl.concat([store.commits(batch) for batch in project.root.batches("clips")])
    return commits.filter(pl.col("status") == "ok")


def edit(project: Project, *pairs: tuple[str, str]) -> Project:
    """Another corpus.yaml at the same place."""
    text = project.path.read_text()
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new)
    project.path.write_text(text)
    return open_project(project.path)
