"""The asset `latent_stats`."""

import dagster as dg

from assets.declare import asset, follows
from assets.reporting import readable_errors, result, watched
from assets.resources import ProjectResource


@asset("latent_stats", kinds={"json"}, automation_condition=follows())
def latent_stats(context: dg.AssetExecutionContext, project: ProjectResource) -> dg.MaterializeResult:  # type: ignore[type-arg]
    """Add up the sums of all commits."""
    from nextvid.encode.latent_stats import make_latent_stats

    with readable_errors():
        return result(make_latent_stats(project.open(), watched(context)))
