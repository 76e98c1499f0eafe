"""The asset `probes`."""

import dagster as dg

from assets.declare import asset
from assets.reporting import readable_errors, traced
from assets.resources import ProjectResource, WhichRun


@asset("probes", kinds={"pytorch", "scikitlearn"}, pool="gpu")
def probes(context: dg.AssetExecutionContext, config: WhichRun, project: ProjectResource) -> dg.MaterializeResult:  # type: ignore[type-arg]
    """Probe one run on one benchmark."""
    from nextvid.evaluate.probes import make_probes

    key = context.partition_key
    assert isinstance(key, dg.MultiPartitionKey)
    names = key.keys_by_dimension
    with readable_errors():
        opened = project.open()
        return traced(opened, make_probes(opened, names["recipe"], names["benchmark"], run=config.run_id or None))
