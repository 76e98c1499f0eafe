"""The jobs that sensors and schedules request, and that people find in the UI.

One run per batch makes all four assets up to the latents: assets that share a run share its start-up.
"""

import dagster as dg

from assets.compute import Compute, tags
from assets.resources import ProjectResource
from nextvid.graph import BY_BATCH, assets

ingest = dg.define_asset_job(
    "ingest",
    selection=dg.AssetSelection.assets(*BY_BATCH),
    description="Media, shots, clips and latents of one batch of files. Makes only what is missing.",
    # behind what people launch, in the queue and in the pools; dagster.yaml bounds how many runs have `ingest`
    tags={"dagster/priority": "-1", "ingest": "1"},
)

freeze = dg.define_asset_job(
    "freeze",
    selection=dg.AssetSelection.assets(*assets("none")),
    description="Statistics, duplicates and the trainset, over all batches. The sensor `follow` requests them too.",
)

experiment = dg.define_asset_job(
    "experiment",
    selection=dg.AssetSelection.assets(*assets("recipe")),
    description="Mask plan, training run, probes on every benchmark, samples and report of one recipe. All of them "
    "are about the run that `pretrain` makes.",
)


@dg.op(tags=tags(Compute()))
def compute_forecast(context: dg.OpExecutionContext, project: ProjectResource) -> None:
    """Write forecast.json and log it; 11 ms a batch (docs/performance.md) are too long for a tick of the sensor."""
    from assets.reporting import readable_errors
    from nextvid.planning.costs import publish_forecast

    with readable_errors():
        context.log.info(publish_forecast(project.open()))


def forecast_of(project: ProjectResource) -> dg.JobDefinition:
    """The job `forecast`, which the sensor `new_sources` requests whenever corpus.yaml differs from what is accepted.

    The resource is bound here, since Dagster would otherwise bind it to a copy of the job and of that sensor.
    """

    @dg.job(
        resource_defs={"project": project},
        description="What accepting corpus.yaml and the makers' versions would cost; `nextvid plan` lists it by batch.",
    )
    def forecast() -> None:
        compute_forecast()

    return forecast


JOBS = [ingest, freeze, experiment]
