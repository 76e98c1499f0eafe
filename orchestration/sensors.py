"""What looks for change: the sensor of new sources, and the automation sensor that lets the corpus follow.

The sensors keep no state of their own: what was listed, and what has not yet held still over two listings, stands
beside the tables in sources/ (design, section 4).
"""

import dagster as dg

from assets.partitions import BATCHES, BENCHMARK
from assets.resources import ProjectResource
from nextvid.corpus.project import Project
from orchestration.jobs import ingest
from storage.errors import CorpusError

TICK_S = 30  # a listing a tick; object stores bill listings


@dg.sensor(
    job=ingest,
    minimum_interval_seconds=TICK_S,
    description="Lists every dataset, assigns new files to batches, and requests one run for each batch that changed.",
)
def new_sources(context: dg.SensorEvaluationContext, project: ProjectResource) -> dg.SensorResult:
    """One listing: partitions equal to sources/, observations of what changed, one run a changed batch."""
    from nextvid.corpus.batches import BatchChange
    from nextvid.corpus.discover import update_sources
    from nextvid.encode.acceptance import in_force, outdated
    from nextvid.encode.unfinished import unfinished

    opened = project.open()
    changes: list[BatchChange] = []
    failed: list[CorpusError] = []
    for name in sorted(opened.corpus.datasets):  # one that cannot be listed does not hold up the others
        try:
            changes += update_sources(opened, settle=True, datasets=[name])
        except CorpusError as error:
            failed.append(error)
            context.log.error(str(error))
    in_force(opened)
    if waiting := outdated(opened):
        context.log.info(f"corpus.yaml asks for another {' and '.join(waiting)}; `nextvid plan` says what it costs")
    if failed and not changes:
        raise failed[0]  # so that the tick shows it; what the others need was asked for when they changed
    return dg.SensorResult(
        run_requests=[
            dg.RunRequest(run_key=run_key(opened, batch), partition_key=batch)
            for batch in opened.root.batches()
            if unfinished(opened, batch)
        ],
        dynamic_partitions_requests=partition_requests(context.instance, opened),
        asset_events=[observation(opened, change.batch) for change in changes],
    )


def run_key(project: Project, batch: str) -> str:
    """The same batch, listing, curation and encoding spec ask for one run only: Dagster never repeats a key."""
    from nextvid.corpus.discover import batch_fingerprint
    from nextvid.encode.acceptance import in_force

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


def apply_partitions(instance: dg.DagsterInstance, project: Project) -> None:
    """The same, at once: for schedules and scripts, which cannot return requests."""
    for request in partition_requests(instance, project):
        name, keys = request.partitions_def_name, list(request.partition_keys)
        match request:
            case dg.AddDynamicPartitionsRequest():
                instance.add_dynamic_partitions(name, keys)
            case dg.DeleteDynamicPartitionsRequest():
                for key in keys:
                    instance.delete_dynamic_partition(name, key)


follow = dg.AutomationConditionSensorDefinition(
    "follow",
    target=dg.AssetSelection.assets("latent_stats", "duplicates", "trainset"),
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Lets statistics, duplicates and the trainset follow the batches.",
)

SENSORS = [new_sources, follow]
