"""The sensors: `new_sources` lists the datasets, `follow` requests what reads all batches.

No sensor keeps state that matters: listings, and files that may still be growing, are recorded in sources/. The cursor
only saves computing a cost twice.
"""

import json

import dagster as dg

from assets.declare import BATCHES
from assets.resources import ProjectResource
from nextvid.config.project import Project
from nextvid.corpus.assignment import BatchChange
from nextvid.graph import assets
from orchestration.jobs import ingest
from storage.errors import CorpusError

TICK_S = 30  # our choice: every tick lists all datasets, and object stores bill listings


def new_sources_every(tick_s: int) -> dg.SensorDefinition:
    """The sensor `new_sources` with so many seconds between two listings."""

    @dg.sensor(
        job=ingest,
        minimum_interval_seconds=tick_s,
        description="Lists every dataset, assigns new files to batches and requests a run for each batch that changed.",
    )
    def new_sources(context: dg.SensorEvaluationContext, project: ProjectResource) -> dg.SensorResult:
        """List once; update the partitions, report changed batches as observations and request a run for each."""
        from nextvid.planning.acceptance import ensure_accepted
        from nextvid.planning.waiting import left_behind, waiting

        opened = project.open()
        changes = listed(context, opened)
        ensure_accepted(opened)
        requests = [dg.RunRequest(run_key=key, partition_key=batch) for batch, key in waiting(opened).items()]
        cursor = unaccepted(opened, context.cursor)
        notes = [*left_behind(opened), *([cost] if (cost := json.loads(cursor)["cost"]) else [])]
        for note in notes:
            context.log.info(note)
        return dg.SensorResult(
            run_requests=requests,
            skip_reason=None if requests else "; ".join(["nothing new", *notes]),
            cursor=cursor,
            dynamic_partitions_requests=partition_requests(context.instance, opened),
            asset_events=[observation(opened, change.batch) for change in changes],
        )

    return new_sources


def listed(context: dg.SensorEvaluationContext, project: Project) -> list[BatchChange]:
    """The batches that changed; a dataset that cannot be listed is logged and does not hold up the others.

    Raises its CorpusError where no batch changed, so that the tick shows it.
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
        raise failed[0]  # earlier changes of other datasets were requested in their own ticks
    return changes


def unaccepted(project: Project, before: str | None) -> str:
    """How corpus.yaml differs from what was accepted, and what accepting it would cost, as the sensor's cursor.

    Computed only when either changes: planning every batch takes more than seconds.
    """
    from nextvid.config.accepted import pixels_digest
    from nextvid.encode.plan import encoding_spec
    from nextvid.planning.acceptance import ensure_accepted, outdated
    from nextvid.planning.costs import forecast

    pixels = pixels_digest(project.asked.encoding.pixels)
    accepted = ensure_accepted(project).digests
    digests = [encoding_spec(project).digest(), project.asked.curation_digest(), pixels, *accepted]
    if before is not None and json.loads(before).get("digests") == digests:
        return before
    return json.dumps({"digests": digests, "cost": forecast(project).summary() if outdated(project) else None})


def observation(project: Project, batch: str) -> dg.AssetObservation:
    """The current data version of `sources` for one batch."""
    from nextvid.corpus.sources import batch_fingerprint

    version = batch_fingerprint(project, batch)
    return dg.AssetObservation("sources", partition=batch, tags={"dagster/data_version": version})


def partition_requests(
    instance: dg.DagsterInstance, project: Project
) -> list[dg.AddDynamicPartitionsRequest | dg.DeleteDynamicPartitionsRequest]:
    """Requests that make Dagster's partitions the batches of sources/."""
    requests: list[dg.AddDynamicPartitionsRequest | dg.DeleteDynamicPartitionsRequest] = []
    assert BATCHES.name
    keys, known = project.root.batches(), instance.get_dynamic_partitions(BATCHES.name)
    if new := [key for key in keys if key not in known]:
        requests.append(BATCHES.build_add_request(new))
    if gone := [key for key in known if key not in keys]:
        requests.append(BATCHES.build_delete_request(gone))
    return requests


def apply_partitions(instance: dg.DagsterInstance, project: Project) -> None:
    """Carry out `partition_requests`, for schedules and scripts, which cannot return them."""
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
