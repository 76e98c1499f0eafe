"""The model card: scores beside random initialisation, curves, t-SNE, samples, lineage down to datasets.

HTML and Markdown.
"""

import dagster as dg

from assets import reporting
from assets.partitions import RECIPE
from assets.resources import ProjectResource, WhichRun


@dg.asset(
    partitions_def=RECIPE,
    group_name="evaluation",
    deps=["probes", "samples"],
    kinds={"html"},
    owners=reporting.OWNERS,
    code_version="1",
    retry_policy=reporting.CRASHES,
    pool="gpu",
    description=__doc__,
)
def report(context: dg.AssetExecutionContext, config: WhichRun, project: ProjectResource) -> dg.MaterializeResult:  # type: ignore[type-arg]
    """Make the report of a run."""
    from nextvid.report.model_card import make_report

    with reporting.readable_errors():
        opened = project.open()
        return reporting.traced(opened, make_report(opened, context.partition_key, run=config.run_id or None))
