"""One row per file: digest, container facts, hazard flags, the decoder to use, status and reason; and the labels.

A file that cannot be read is a row with its reason, never a missing row.
"""

import dagster as dg

from assets import checks, reporting
from assets.columns import columns
from assets.partitions import BATCHES
from assets.resources import ProjectResource
from storage import schemas


@dg.asset(
    partitions_def=BATCHES,
    group_name="corpus",
    deps=["sources"],
    kinds={"polars", "parquet"},
    owners=reporting.OWNERS,
    code_version="2",
    retry_policy=reporting.CRASHES,
    pool="decode",
    check_specs=checks.specs("media"),
    metadata=columns(schemas.Media),
    description=__doc__,
)
def media(context: dg.AssetExecutionContext, project: ProjectResource) -> dg.MaterializeResult:  # type: ignore[type-arg]
    """Make the batch's media."""
    from nextvid.corpus.media import make_media

    return reporting.batch_table(project, "media", context.partition_key, make_media, schemas.Media)
