"""The frozen snapshot of rows used for pretraining, with weights and statistics, under one digest.

The one gate: it takes batches that passed their checks, are complete in the encoding spec in force and are known to the
`duplicates` it cites, and lists those it left out.
"""

from collections.abc import Iterator
from datetime import timedelta

import dagster as dg

from assets import checks, reporting
from assets.columns import columns
from assets.resources import ProjectResource
from storage import schemas
from storage.errors import UpstreamError

# It is compared with all batches once a day, changed or not, so that its age says whether it still follows them
# (docs/decisions/0032). An hour after the nightly schedule, in UTC; late by two hours, stale by a second night.
AFTER_NIGHT = "0 4 * * *"
LATE, STALE = timedelta(hours=26), timedelta(hours=50)


@dg.multi_asset(
    name="trainset",
    specs=[
        dg.AssetSpec(
            "trainset",
            deps=["latents", "latent_stats", "duplicates"],
            group_name="trainset",
            kinds={"numpy", "parquet"},
            owners=reporting.OWNERS,
            code_version="1",
            automation_condition=reporting.follows(AFTER_NIGHT),
            freshness_policy=dg.FreshnessPolicy.time_window(fail_window=STALE, warn_window=LATE),
            metadata=columns(schemas.Lineage),
            description=__doc__,
            skippable=True,
        )
    ],
    check_specs=checks.specs("trainset"),
    can_subset=True,  # only so may checks be left out, when there is nothing yet to check
    retry_policy=reporting.CRASHES,
)
def trainset(context: dg.AssetExecutionContext, project: ProjectResource) -> Iterator[dg.MaterializeResult]:  # type: ignore[type-arg]
    """Freeze, or say why not: a person's run fails, automation's waits for the batches that are missing."""
    from nextvid.trainset.trainset import make_trainset

    with reporting.readable_errors():
        opened = project.open()
        try:
            outcome = make_trainset(opened)
        except UpstreamError as error:
            if "dagster/from_automation_condition" not in context.run.tags:
                raise
            context.log.info(f"no trainset yet: {error}")
            return
        reported = reporting.traced(opened, outcome)
    yield reported
