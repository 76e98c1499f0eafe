"""The asset `report`."""

import dagster as dg

from assets.declare import asset
from assets.reporting import readable_errors, traced
from assets.resources import ProjectResource, WhichRun


@asset("report", kinds={"html"}, pool="gpu")
def report(context: dg.AssetExecutionContext, config: WhichRun, project: ProjectResource) -> dg.MaterializeResult:  # type: ignore[type-arg]
    """Write the report of one run."""
    from nextvid.report.report import make_report

    with readable_errors():
        opened = project.open()
        return traced(opened, make_report(opened, context.partition_key, run=config.run_id or None))
