"""The asset `trainset`."""

from collections.abc import Iterator
from datetime import timedelta

import dagster as dg

from assets.compute import compute_of, tags
from assets.declare import CRASHES, OWNERS, check_specs, described, follows
from assets.reporting import readable_errors, traced, watched
from assets.resources import ProjectResource
from nextvid.graph import GRAPH
from storage import schemas
from storage.errors import UpstreamError

# Compared with all batches once a day, changed or not, so that its age says whether it still follows them
# (docs/decisions/0032). Cron in UTC, an hour after the nightly schedule; late by two hours, stale by a second night.
AFTER_NIGHT = "0 4 * * *"
LATE, STALE = timedelta(hours=26), timedelta(hours=50)


# A multi-asset of one: only such a step may end without a materialisation, and without results of its checks.
@dg.multi_asset(
    name="trainset",
    specs=[
        dg.AssetSpec(
            "trainset",
            **described("trainset", schemas.Lineage),
            kinds={"numpy", "parquet"},
            owners=OWNERS,
            code_version=str(GRAPH["trainset"].version),
            automation_condition=follows(AFTER_NIGHT),
            freshness_policy=dg.FreshnessPolicy.time_window(fail_window=STALE, warn_window=LATE),
            skippable=True,
        )
    ],
    check_specs=check_specs("trainset"),
    can_subset=True,
    retry_policy=CRASHES,
    op_tags=tags(compute_of("trainset")),
)
def trainset(context: dg.AssetExecutionContext, project: ProjectResource) -> Iterator[dg.MaterializeResult]:  # type: ignore[type-arg]
    """Freeze the trainset. Where it cannot be made yet, a person's run fails and automation's ends without one."""
    from nextvid.trainset.trainset import make_trainset

    with readable_errors():
        opened = project.open()
        try:
            outcome = make_trainset(opened, watched(context))
        except UpstreamError as error:
            if "dagster/from_automation_condition" not in context.run.tags:
                raise
            context.log.info(f"no trainset yet: {error}")
            return
        reported = traced(opened, outcome)
    yield reported
