"""The asset `mask_plan`."""

import dagster as dg

from assets.declare import asset
from assets.reporting import readable_errors, result, watched
from assets.resources import ProjectResource


@asset("mask_plan", kinds={"numpy"})
def mask_plan(context: dg.AssetExecutionContext, project: ProjectResource) -> dg.MaterializeResult:  # type: ignore[type-arg]
    """Draw the recipe's plan, unless it exists."""
    from nextvid.trainset.mask_plan import make_mask_plan

    with readable_errors():
        return result(make_mask_plan(project.open(), context.partition_key, watched(context)))
