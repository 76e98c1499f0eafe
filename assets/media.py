"""The asset `media`."""

import dagster as dg

from assets.declare import asset
from assets.reporting import batch_table
from assets.resources import ProjectResource
from storage import schemas


@asset("media", schema=schemas.Media, kinds={"polars", "parquet"}, pool="decode")
def media(context: dg.AssetExecutionContext, project: ProjectResource) -> dg.MaterializeResult:  # type: ignore[type-arg]
    """Make the table of one batch."""
    from nextvid.corpus.media import make_media

    return batch_table(context, project, "media", make_media, schemas.Media)
