"""Committed shards of frame latents for the encoding spec in force; only rows that are missing are encoded."""

import dagster as dg

from assets import checks, reporting
from assets.columns import columns
from assets.partitions import BATCHES
from assets.resources import ProjectResource
from nextvid.making.outcome import Outcome
from storage import schemas


@dg.asset(
    partitions_def=BATCHES,
    group_name="latents",
    deps=["clips"],
    kinds={"zarr", "pytorch"},
    owners=reporting.OWNERS,
    code_version="1",
    retry_policy=reporting.CRASHES,
    pool="encode",
    check_specs=checks.specs("latents"),
    metadata=columns(schemas.Commits),
    description=__doc__,
)
def latents(context: dg.AssetExecutionContext, project: ProjectResource) -> dg.MaterializeResult:  # type: ignore[type-arg]
    """Make the batch's latents."""
    from nextvid.corpus.sources import refuse_unknown
    from nextvid.encode.latents import make_latents
    from nextvid.making.progress import Lines
    from nextvid.planning.costs import forecast

    def make() -> Outcome:
        opened, batch = project.open(), context.partition_key
        refuse_unknown(opened, batch)
        context.log.info(forecast(opened, batch).text())  # before anything runs
        return make_latents(opened, batch, Lines(context.log.info))

    return reporting.materialised(make)
