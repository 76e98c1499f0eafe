"""Which training run a step looks at, and what Dagster records of it.

A run's id is the data version of `pretrain`. Partitions must exist before they are launched, and a run's id is known
only once its trainset is: so Dagster's runs carry the id as the tag `training_run`, by which the UI filters them.
"""

from collections.abc import Callable, Mapping
from typing import Any

import dagster as dg
from pydantic import Field

from assets.reporting import readable_errors, traced
from assets.resources import ProjectResource
from nextvid.making.outcome import Outcome
from storage import atomic
from storage.records import read_record

TAG = "training_run"
NEWEST = 100  # our choice: materialisations of `pretrain` among which a run is looked for
# Tags (dagster 1.13.27, `DataProvenance`) by which Dagster tells whether what an asset was made from has changed. It
# fills them with the newest upstream materialisation, which is not always what was read.
INPUT_VERSION, INPUT_EVENT = "dagster/input_data_version", "dagster/input_event_pointer"


class WhichRun(dg.Config):
    """Options in the launchpad of an asset that evaluates a run."""

    run_id: str = Field(
        default="",
        description="Id of a training run of this recipe; empty: the one that `pretrain` made in this Dagster run, "
        "else in its last materialisation",
    )


class WhichScores(WhichRun):
    """Options in the launchpad of `probes`."""

    benchmarks: list[str] = Field(default=[], description="Benchmarks of corpus.yaml; empty: all of them")
    checkpoint: int | None = Field(
        default=None,
        description="Step of the run's checkpoint; without one the newest. A run that `run_id` names need not have "
        "ended",
    )
    how: dict[str, Any] = Field(default={}, description="How they are computed, such as `ranks: 8` or `device: cpu`")


def launch_of(context: dg.AssetExecutionContext) -> str:
    """Id of the Dagster run, and of all its retries."""
    return context.run.root_run_id or context.run.run_id


def tag_run(context: dg.AssetExecutionContext, run: str, trainset: str) -> None:
    """Tag the Dagster run with the id of the training run that it makes or looks at, and with that run's trainset."""
    context.instance.add_run_tags(context.run.run_id, {TAG: run, "trainset": trainset})


def made_from(result: dg.MaterializeResult, versions: Mapping[str, str]) -> dg.MaterializeResult:  # type: ignore[type-arg]
    """The result with the data versions of the upstream assets that were read, whatever has become of them since."""
    return result._replace(tags={f"{INPUT_VERSION}/{name}": version for name, version in versions.items()})


def evaluate(
    context: dg.AssetExecutionContext,
    config: WhichRun,
    project: ProjectResource,
    make: Callable[..., Outcome],
    *,
    ended: bool = True,
) -> dg.MaterializeResult:  # type: ignore[type-arg]
    """Make what looks at a training run: the one that is named, else this Dagster run's, else the last materialised.

    With `ended` a run that has not ended is refused.
    """
    from nextvid.train.run import find_run

    with readable_errors():
        opened, recipe = project.open(), context.partition_key
        opened.recipe(recipe)
        pretrained = context.instance.fetch_materializations(
            dg.AssetRecordsFilter(dg.AssetKey("pretrain"), asset_partitions=[recipe]), limit=NEWEST
        ).records
        materialised = {
            str(record.asset_materialization.metadata["run"].value): record.storage_id
            for record in reversed(pretrained)
            if record.asset_materialization
        }  # the newest last
        launched = opened.root.launch(recipe, launch_of(context))
        named = config.run_id or (read_record(launched)["run"] if atomic.exists(launched) else None)
        found = find_run(opened, recipe, named or next(reversed(materialised), None), ended=ended)
        run = found.id
        tag_run(context, run, found.trainset)
        reported = traced(opened, make(opened, recipe, run))
        if run not in materialised:
            return reported
        event = {f"{INPUT_EVENT}/pretrain": str(materialised[run]), f"{INPUT_VERSION}/pretrain": run}
        return reported._replace(tags=event)
