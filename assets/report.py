"""The asset `report`."""

from functools import partial

import dagster as dg

from assets.declare import asset
from assets.reporting import watched
from assets.resources import ProjectResource
from assets.training_run import WhichRun, evaluate


@asset("report", kinds={"html"})
def report(context: dg.AssetExecutionContext, config: WhichRun, project: ProjectResource) -> dg.MaterializeResult:  # type: ignore[type-arg]
    """Write the report of one run."""
    from nextvid.report.report import make_report

    return evaluate(context, config, project, partial(make_report, on_progress=watched(context)))
