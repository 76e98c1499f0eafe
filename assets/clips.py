"""The curated clip manifest, one row a view: times, crop, flip, uses, split; kept, or the reason why not."""

import dagster as dg

from assets import checks, reporting
from assets.columns import columns
from assets.partitions import BATCHES
from assets.resources import ProjectResource
from storage import schemas


@dg.asset(
    partitions_def=BATCHES,
    group_name="corpus",
    deps=["shots"],
    kinds={"polars", "parquet"},
    owners=reporting.OWNERS,
    code_version="2",
    retry_policy=reporting.CRASHES,
    check_specs=checks.specs("clips"),
    metadata=columns(schemas.Clips),
    description=__doc__,
)
def clips(context: dg.AssetExecutionContext, project: ProjectResource) -> dg.MaterializeResult:  # type: ignore[type-arg]
    """Make the batch's clips."""
    from nextvid.corpus.clips import make_clips

    return reporting.batch_table(project, "clips", context.partition_key, make_clips, schemas.Clips)
