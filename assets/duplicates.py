"""The asset `duplicates`."""

import dagster as dg

from assets.declare import asset, follows
from assets.reporting import readable_errors, result, watched
from assets.resources import ProjectResource
from storage import schemas


@asset(
    "duplicates",
    schema=schemas.Duplicates,
    kinds={"polars", "parquet"},
    automation_condition=follows(),
)
def duplicates(context: dg.AssetExecutionContext, project: ProjectResource) -> dg.MaterializeResult:  # type: ignore[type-arg]
    """Compare the perceptual hashes of all batches."""
    from nextvid.trainset.duplicates import make_duplicates

    with readable_errors():
        return result(make_duplicates(project.open(), watched(context)))
