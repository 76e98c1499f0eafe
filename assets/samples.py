"""The asset `samples`."""

from functools import partial

import dagster as dg

from assets.declare import asset
from assets.reporting import watched
from assets.resources import ProjectResource
from assets.training_run import WhichRun, evaluate


@asset("samples", kinds={"pytorch"}, pool="gpu")
def samples(context: dg.AssetExecutionContext, config: WhichRun, project: ProjectResource) -> dg.MaterializeResult:  # type: ignore[type-arg]
    """Generate the samples of one run."""
    from nextvid.evaluate.samples import make_samples

    return evaluate(context, config, project, partial(make_samples, on_progress=watched(context)))
