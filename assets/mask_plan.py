"""The visible-cell sets of every mask strategy of a recipe, drawn once and stored under their digest."""

import dagster as dg

from assets import checks, reporting
from assets.partitions import RECIPE
from assets.resources import ProjectResource


@dg.asset(
    partitions_def=RECIPE,
    group_name="trainset",
    kinds={"numpy"},
    owners=reporting.OWNERS,
    code_version="1",
    retry_policy=reporting.CRASHES,
    check_specs=checks.specs("mask_plan"),
    description=__doc__,
)
def mask_plan(context: dg.AssetExecutionContext, project: ProjectResource) -> dg.MaterializeResult:  # type: ignore[type-arg]
    """Draw the recipe's plan, unless it is there."""
    from nextvid.trainset.mask_plan import make_mask_plan

    return reporting.materialised(lambda: make_mask_plan(project.open(), context.partition_key))
