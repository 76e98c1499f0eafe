"""What looks for change: the sensor of new sources, and the automation sensor that lets the corpus follow.

The sensors keep no state that matters: what was listed, and what has not yet held still over two listings, stands
beside the tables in sources/; the cursor only spares reckoning a cost twice.
"""

import json

import dagster as dg

from assets.partitions import BATCHES, BENCHMARK
from assets.resources import ProjectResource
from nextvid.config.project import Project
from nextvid.corpus.batches import BatchChange
from nextvid.graph import assets
from orchestration.jobs import ingest
from storage.errors import CorpusError

TICK_S = 30  # a listing a tick; object stores bill listings


def new_sources_every(tick_s: int) -> dg.SensorDefinition:
    """The sensor `new_sources`, by the seconds between two listings."""

    @dg.sensor(
        job=ingest,
        minimum_interval_seconds=tick_s,
        description="Lists every dataset, assigns new files to batches and requests a run for each batch that changed.",
    )
    def new_sources(context: dg.SensorEvaluationContext, project: ProjectResource) -> dg.SensorResult:
        """One listing: partitions equal to sources/, observations of what changed, one run a changed batch."""
        from nextvid.planning.acceptance import in_force
        from nextvid.planning.waiting import left_behind, waiting

        opened = project.open()
        changes = listed(context, opened)
        in_force(opened)
        asked = [dg.RunRequest(run_key=key, partition_key=batch) for batch, key in waiting(opened).items()]
        cursor = asked_for(opened, context.cursor)
        said = [*left_behind(opened), *([cost] if (cost := json.loads(cursor)["said"]) else [])]
        for line in said:
            context.log.info(line)
        return dg.SensorResult(
            run_requests=asked,
            skip_reason=None if asked else "; ".join(["nothing new", *said]),
            cursor=cursor,
            dynamic_partitions_requests=partition_requests(context.instance, opened),
            asset_events=[observation(opened, change.batch) for change in changes],
        )

    return new_sources


def listed(context: dg.SensorEvaluationContext, project: Project) -> list[BatchChange]:
    """What changed, by batch; a dataset that cannot be listed does not hold up the others.

    Raises its CorpusError where nothing changed, so that the tick shows it.
    """
    from nextvid.corpus.sources import update_sources

    changes: list[BatchChange] = []
    failed: list[CorpusError] = []
    for name in sorted(project.corpus.datasets):
        try:
            changes += update_sources(project, settle=True, datasets=[name])
        except CorpusError as error:
            failed.append(error)
            context.log.error(str(error))
    if failed and not changes:
        raise failed[0]  # what the others need was asked for when they changed
    return changes


def asked_for(project: Project, before: str | None) -> str:
    """What corpus.yaml asks for beyond what is in force, and at what cost, as the sensor's cursor.

    Reckoned anew only when one of them changes: a plan of every batch is no matter of seconds.
    """
    from nextvid.config.accepted import pixels_digest
    from nextvid.encode.plan import encoding_spec
    from nextvid.planning.acceptance import in_force, outdated
    from nextvid.planning.costs import forecast

    wanted = pixels_digest(project.asked.encoding.pixels)
    asked = [encoding_spec(project).digest(), project.asked.curation_digest(), wanted, *in_force(project).digests]
    if before is not None and json.loads(before)["asked"] == asked:
        return before
    return json.dumps({"asked": asked, "said": forecast(project).summary() if outdated(project) else None})


def observation(project: Project, batch: str) -> dg.AssetObservation:
    """A new data version of `sources` for one batch."""
    from nextvid.corpus.sources import batch_fingerprint

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
    target=dg.AssetSelection.assets(*assets("none")),
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Requests statistics, duplicates and the trainset whenever their batches have changed.",
)
