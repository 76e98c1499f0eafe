"""Attentive-probe and k-NN accuracies of the frozen encoders, beside a random-init one of the same shape and input."""

import dagster as dg

from assets import reporting
from assets.partitions import RECIPE_BENCHMARK
from assets.resources import ProjectResource, WhichRun


@dg.asset(
    partitions_def=RECIPE_BENCHMARK,
    group_name="evaluation",
    deps=["pretrain", dg.AssetDep("latents", partition_mapping=dg.AllPartitionMapping())],
    kinds={"pytorch", "scikitlearn"},
    owners=reporting.OWNERS,
    code_version="1",
    retry_policy=reporting.CRASHES,
    pool="gpu",
    description=__doc__,
)
def probes(context: dg.AssetExecutionContext, config: WhichRun, project: ProjectResource) -> dg.MaterializeResult:  # type: ignore[type-arg]
    """Probe one run on one benchmark."""
    from nextvid.evaluate.probes import make_probes

    key = context.partition_key
    assert isinstance(key, dg.MultiPartitionKey)
    names = key.keys_by_dimension
    with reporting.readable_errors():
        opened = project.open()
        return reporting.traced(
            opened, make_probes(opened, names["recipe"], names["benchmark"], run=config.run_id or None)
        )
