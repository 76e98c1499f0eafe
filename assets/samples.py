"""Generated next frames as pictures: masked and autoregressive.

Beside them stand the autoencoder's own reconstruction and the last frame copied.
"""

import dagster as dg

from assets import reporting
from assets.partitions import RECIPE
from assets.resources import ProjectResource, WhichRun


@dg.asset(
    partitions_def=RECIPE,
    group_name="evaluation",
    deps=["pretrain"],
    kinds={"pytorch"},
    owners=reporting.OWNERS,
    code_version="1",
    retry_policy=reporting.CRASHES,
    pool="gpu",
    description=__doc__,
)
def samples(context: dg.AssetExecutionContext, config: WhichRun, project: ProjectResource) -> dg.MaterializeResult:  # type: ignore[type-arg]
    """Make the samples of a run."""
    from nextvid.evaluate.samples import make_samples

    with reporting.readable_errors():
        opened = project.open()
        return reporting.traced(opened, make_samples(opened, context.partition_key, run=config.run_id or None))
