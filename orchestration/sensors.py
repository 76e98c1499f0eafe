"""The sensors: `new_sources` lists the datasets, `follow` requests what reads all batches.

No sensor keeps state that matters: listings, and files that may still be growing, are recorded in sources/. The cursor
only says after which batch the next tick goes on.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import dagster as dg

from assets.declare import BATCHES, PREFIX
from assets.resources import ProjectResource
from nextvid.config.project import Project
from nextvid.corpus.assignment import BatchChange
from nextvid.graph import assets
from nextvid.making.batches import dataset_of
from orchestration.jobs import ingest
from storage.errors import CorpusError, NExTVidError

if TYPE_CHECKING:
    from nextvid.planning.waiting import Standard, Waiting

PartitionRequest = dg.AddDynamicPartitionsRequest | dg.DeleteDynamicPartitionsRequest

TICK_S = 30  # our choice: every tick lists all datasets, and object stores bill listings
# Our choices. Dagster aborts a tick after 60 s; judging leaves most of that for listings. It then submits each request
# in about 0.1 s, during which no other sensor of the daemon's thread runs.
JUDGE_S, REQUESTS = 3.0, 100
OBSERVED = (
    100  # our choice: batches of a tick; Dagster stores each observation in 20 to 90 ms, while other sensors wait
)
GONE_SHARE = 0.5  # our choice: of the batches that Dagster knows; a root loses more by a wrong mount than on purpose


def new_sources_every(tick_s: int, forecast: dg.JobDefinition) -> dg.SensorDefinition:
    """The sensor `new_sources` with so many seconds between two listings, and the job that it requests for costs."""

    @dg.sensor(
        jobs=[ingest, forecast],
        minimum_interval_seconds=tick_s,
        description="Lists every dataset, assigns new files to batches and requests a run for each batch that changed.",
    )
    def new_sources(context: dg.SensorEvaluationContext, project: ProjectResource) -> dg.SensorResult:
        """List once; update the partitions, report changed batches as observations and request a run for each."""
        from nextvid.planning.waiting import left_behind, waiting

        opened = project.open()
        listed = list_datasets(context.instance, opened, settle=True)
        changed = [change.batch for change in listed.changes]
        found = waiting(listed.standard, first=changed, after=_position(context), limit=REQUESTS, within_s=JUDGE_S)
        requests = ingest_requests(found)
        partitions, kept = partition_requests(context.instance, opened)
        errors = [*listed.errors, *found.errors]
        try:
            cost, asked = _cost(opened, forecast)
        except NExTVidError as error:  # such as an autoencoder that is not there: what is accepted goes on
            cost, asked = [], []
            errors.append(str(error))
        notes, requests = [*left_behind(opened), *kept, *cost], requests + asked
        if len(changed) > OBSERVED:
            notes.append(f"{len(changed)} batches changed: observations show the first {OBSERVED} of them")
        observed = listed.changes[:OBSERVED]
        for note in notes:
            context.log.info(note)
        show_errors(context, errors, alone=not (requests or partitions or changed))
        return dg.SensorResult(
            run_requests=requests,
            skip_reason=None if requests else "; ".join(["nothing new", *notes, *errors]),
            cursor=json.dumps({"after": found.last}),
            dynamic_partitions_requests=partitions,
            asset_events=[observation(change, listed.standard.listing(change.batch)) for change in observed],
        )

    return new_sources


@dataclass(frozen=True)
class Listed:
    """What a listing of all datasets found."""

    changes: Sequence[BatchChange]
    standard: "Standard"  # what batches are compared with now
    errors: Sequence[str]  # a line for each dataset that cannot be listed, or whose label files cannot be read


def list_datasets(instance: dg.DagsterInstance, project: Project, *, settle: bool) -> Listed:
    """List every dataset and accept what needs no person; a dataset with an error does not stop the others.

    Raises CorpusError where the root is empty and Dagster knows batches of it: then it is not mounted.
    """
    from nextvid.corpus.labels import readable_labels
    from nextvid.corpus.sources import update_sources
    from nextvid.planning.acceptance import ensure_accepted
    from nextvid.planning.waiting import standard

    known = 0 if project.root.batches() else len(known_batches(instance))
    if known:
        raise CorpusError(
            f"root {project.root.url} holds no batch, but Dagster knows {known}: mount it. If it was emptied on "
            "purpose, run 'nextvid make sources'"
        )
    labels, unreadable = readable_labels(project.corpus.datasets)
    changes: list[BatchChange] = []
    errors = list(unreadable.values())
    for name in sorted(labels):
        try:
            changes += update_sources(project, settle=settle, datasets=[name])
        except NExTVidError as error:
            errors.append(str(error))
    ensure_accepted(project)  # with `reencode: auto` it accepts what corpus.yaml asks for
    return Listed(changes, standard(project, labels), errors)


def show_errors(
    context: dg.SensorEvaluationContext | dg.ScheduleEvaluationContext, errors: list[str], *, alone: bool
) -> None:
    """Log the errors; raise them as one CorpusError where the tick brings nothing else, so that it shows as failed."""
    for error in errors:
        context.log.error(error)
    if errors and alone:
        raise CorpusError("; ".join(errors))


def _position(context: dg.SensorEvaluationContext) -> str:
    """The batch after which the last tick stopped; empty where the cursor, which people can edit, names none."""
    try:
        found = json.loads(context.cursor or "{}")
    except ValueError:
        context.log.warning(f"the cursor {context.cursor!r:.80} is no JSON: this tick begins with the first batch")
        return ""
    return str(found.get("after", "")) if isinstance(found, dict) else ""


def _cost(project: Project, forecast: dg.JobDefinition) -> tuple[list[str], list[dg.RunRequest]]:
    """What accepting corpus.yaml would cost, if it differs; where that is unknown, a request for the job `forecast`."""
    from nextvid.planning.acceptance import difference, outdated
    from nextvid.planning.costs import published_forecast, question

    names = outdated(project)
    if not names:
        return [], []
    if (line := published_forecast(project)) is not None:
        return [line], []
    note = f"{difference(names)}: the job `forecast` computes how many batches are outdated and what they cost"
    return [note], [dg.RunRequest(job_name=forecast.name, run_key=f"{PREFIX}forecast:{question(project)}")]


def ingest_requests(found: "Waiting", moment: str = "") -> list[dg.RunRequest]:
    """A run for each batch that waits; its tags say which dataset is made, and why. `moment` begins the run keys."""
    return [
        dg.RunRequest(
            job_name=ingest.name,
            run_key=f"{PREFIX}{moment}{key}",
            partition_key=batch,
            tags={"dataset": dataset_of(batch), "reason": found.reasons[batch]},
        )
        for batch, key in found.keys.items()
    ]


def observation(change: BatchChange, listing: str) -> dg.AssetObservation:
    """What a listing found of a batch; its data version is the fingerprint of its listing."""
    counts = {name: count for name, count in asdict(change).items() if name != "batch"}
    version = {"dagster/data_version": listing}
    return dg.AssetObservation("sources", partition=change.batch, metadata=counts, tags=version)


def known_batches(instance: dg.DagsterInstance) -> set[str]:
    """The batches that Dagster has as partitions."""
    assert BATCHES.name
    return set(instance.get_dynamic_partitions(BATCHES.name))


def partition_requests(instance: dg.DagsterInstance, project: Project) -> tuple[list[PartitionRequest], list[str]]:
    """Requests that make Dagster's partitions the batches of sources/, and a line where too many would be deleted."""
    requests: list[PartitionRequest] = []
    lines: list[str] = []
    keys, known = set(project.root.batches()), known_batches(instance)
    if new := sorted(keys - known):
        requests.append(BATCHES.build_add_request(new))
    gone = sorted(known - keys)
    if len(gone) > GONE_SHARE * len(known):
        lines.append(
            f"{len(gone)} of the {len(known)} batches that Dagster knows are not in {project.root.folder('sources')}: "
            f"their partitions stay. If that is on purpose, delete them in the UI ({gone[0]} and others)"
        )
    elif gone:
        requests.append(BATCHES.build_delete_request(gone))
    return requests, lines


def apply_partitions(instance: dg.DagsterInstance, project: Project) -> list[str]:
    """Carry out `partition_requests`, for schedules and scripts, which cannot return them; returns its lines."""
    requests, lines = partition_requests(instance, project)
    for request in requests:
        name, keys = request.partitions_def_name, list(request.partition_keys)
        match request:
            case dg.AddDynamicPartitionsRequest():
                instance.add_dynamic_partitions(name, keys)
            case dg.DeleteDynamicPartitionsRequest():
                for key in keys:
                    instance.delete_dynamic_partition(name, key)
    return lines


follow = dg.AutomationConditionSensorDefinition(
    "follow",
    target=dg.AssetSelection.assets(*assets("none")),
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Requests statistics, duplicates and the trainset whenever their batches have changed.",
)
