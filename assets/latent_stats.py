"""Mean, standard deviation and posterior width of the latents by channel and dataset, from the sums in every commit."""

import dagster as dg

from assets import checks, reporting
from assets.resources import ProjectResource


@dg.asset(
    group_name="latents",
    deps=["latents"],
    kinds={"json"},
    owners=reporting.OWNERS,
    code_version="1",
    retry_policy=reporting.CRASHES,
    check_specs=checks.specs("latent_stats"),
    automation_condition=reporting.follows(),
    description=__doc__,
)
def latent_stats(project: ProjectResource) -> dg.MaterializeResult:  # type: ignore[type-arg]
    """Sum the commits."""
    from nextvid.encode.latent_stats import make_latent_stats

    return reporting.materialised(lambda: make_latent_stats(project.open()))
