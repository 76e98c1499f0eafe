"""The asset `shots`."""

import dagster as dg

from assets.declare import asset
from assets.reporting import batch_table
from assets.resources import ProjectResource
from storage import schemas


@asset("shots", schema=schemas.Shots, kinds={"polars", "parquet"}, pool="decode")
def shots(context: dg.AssetExecutionContext, project: ProjectResource) -> dg.MaterializeResult:  # type: ignore[type-arg]
    """Make the table of one batch."""
    from nextvid.corpus.shots import make_shots

    return batch_table(context, project, "shots", make_shots, schemas.Shots)
