"""What looks for change: the sensor of new sources, and the automation sensor that lets the corpus follow.

The cursor holds only sizes of files that have not yet held still over two listings; losing it costs one tick. Everything
else stands in sources/*.parquet (design, section 4).
"""

import json

import dagster as dg

from assets.partitions import BATCHES, BENCHMARK
from assets.resources import ProjectResource
from nextvid.corpus.project import Project
from orchestration.jobs import ingest

TICK_S = 30  # a listing a tick; object stores bill listings


@dg.sensor(
    job=ingest,
    minimum_interval_seconds=TICK_S,
    description="Lists every dataset, assigns new files to batches, and requests one run for each batch that changed.",
)
def new_sources(context: dg.SensorEvaluationContext, project: ProjectResource) -> dg.SensorResult:
    """One listing: partitions equal to sources/, observations of what changed, one run a changed batch."""
    from nextvid.corpus.discover import update_sources

    opened = project.open()
    held = json.loads(context.cursor) if context.cursor else {}
    update = update_sources(opened, held=held)
    wanted = opened.root.batches()
    return dg.SensorResult(
        run_requests=[
            dg.RunRequest(run_key=run_key(opened, batch), partition_key=batch, job_name=ingest.name) for batch in wanted
        ],
        dynamic_partitions_requests=partition_requests(context.instance, opened),
        asset_events=[observation(opened, batch) for batch in update.changed],
        cursor=json.dumps(update.held, sort_keys=True),
    )


def run_key(project: Project, batch: str) -> str:
    """The same batch, listing, curation and encoding spec ask for one run only."""
    from nextvid.corpus.discover import batch_fingerprint
    from nextvid.corpus.accepted import in_force

    accepted = in_force(project)
    return f"{batch}:{batch_fingerprint(project, batch)}:{accepted.curation}:{accepted.encoding}"


def observation(project: Project, batch: str) -> dg.AssetObservation:
    """A new data version of `sources` for one batch."""
    from nextvid.corpus.discover import batch_fingerprint

    version = batch_fingerprint(project, batch)
    return dg.AssetObservation("sources", partition=batch, tags={"dagster/data_version": version})


def partition_requests(
    instance: dg.DagsterInstance, project: Project
) -> list[dg.AddDynamicPartitionsRequest | dg.DeleteDynamicPartitionsRequest]:
    """Make Dagster's partitions equal to sources/ and to the benchmarks of corpus.yaml."""
    requests: list[dg.AddDynamicPartitionsRequest | dg.DeleteDynamicPartitionsRequest] = []
    for definition, wanted in ((BATCHES, project.root.batches()), (BENCHMARK, sorted(project.corpus.benchmarks))):
        assert definition.name
        known = instance.get_dynamic_partitions(definition.name)
        if new := [key for key in wanted if key not in known]:
            requests.append(definition.build_add_request(new))
        if gone := [key for key in known if key not in wanted]:
            requests.append(definition.build_delete_request(gone))
    return requests


follow = dg.AutomationConditionSensorDefinition(
    "follow",
    target=dg.AssetSelection.assets("latent_stats", "duplicates", "trainset"),
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Lets statistics, duplicates and the trainset follow the batches.",
)

SENSORS = [new_sources, follow]
