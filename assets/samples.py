"""The asset `samples`."""

import dagster as dg

from assets.declare import asset
from assets.reporting import readable_errors, traced
from assets.resources import ProjectResource, WhichRun


@asset("samples", kinds={"pytorch"}, pool="gpu")
def samples(context: dg.AssetExecutionContext, config: WhichRun, project: ProjectResource) -> dg.MaterializeResult:  # type: ignore[type-arg]
    """Generate the samples of one run."""
    from nextvid.evaluate.samples import make_samples

    with readable_errors():
        opened = project.open()
        return traced(opened, make_samples(opened, context.partition_key, run=config.run_id or None))
