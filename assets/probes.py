"""The asset `probes`."""

from functools import partial

import dagster as dg

from assets.declare import asset
from assets.reporting import readable_errors, result
from assets.resources import ProjectResource
from assets.training_run import WhichScores, evaluate
from nextvid.making.progress import Lines


@asset("probes", kinds={"pytorch", "scikitlearn"}, pool="gpu")
def probes(context: dg.AssetExecutionContext, config: WhichScores, project: ProjectResource) -> dg.MaterializeResult:  # type: ignore[type-arg]
    """Probe one run, or one encoder of corpus.yaml, on every benchmark."""
    from nextvid.evaluate.probes import make_probes

    make = partial(make_probes, benchmarks=config.benchmarks, on_progress=Lines(context.log.info))
    with readable_errors():
        opened = project.open()
        if context.partition_key in opened.corpus.encoders:
            return result(make(opened, context.partition_key))
    return evaluate(context, config, project, make)
