"""The asset `clips`."""

import dagster as dg

from assets.declare import asset
from assets.reporting import batch_table
from assets.resources import ProjectResource
from storage import schemas


@asset("clips", schema=schemas.Clips, kinds={"polars", "parquet"})
def clips(context: dg.AssetExecutionContext, project: ProjectResource) -> dg.MaterializeResult:  # type: ignore[type-arg]
    """Make the table of one batch."""
    from nextvid.corpus.clips import make_clips

    return batch_table(context, project, "clips", make_clips, schemas.Clips)
