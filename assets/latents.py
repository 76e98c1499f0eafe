"""The asset `latents`."""

import dagster as dg

from assets.declare import asset
from assets.reporting import open_batch, readable_errors, result, watched
from assets.resources import ProjectResource
from storage import schemas


@asset("latents", schema=schemas.Commits, kinds={"zarr", "pytorch"}, pool="gpu")
def latents(context: dg.AssetExecutionContext, project: ProjectResource) -> dg.MaterializeResult:  # type: ignore[type-arg]
    """Encode the rows of one batch that are missing; the log begins with what that will cost."""
    from nextvid.encode.latents import make_latents
    from nextvid.planning.costs import forecast

    with readable_errors():
        opened, batch = open_batch(context, project)
        context.log.info(forecast(opened, batch).text())
        return result(make_latents(opened, batch, watched(context)))
