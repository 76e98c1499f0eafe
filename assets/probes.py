"""The asset `probes`."""

import time

import dagster as dg

from assets.declare import asset
from assets.reporting import readable_errors, result
from assets.resources import ProjectResource, TrainerResource
from assets.training_run import WhichScores, evaluate
from nextvid.config.overrides import apply_how, as_overrides
from nextvid.config.project import Project
from nextvid.config.recipe import ExecutionConfig
from nextvid.making.outcome import Outcome


@asset("probes", kinds={"pytorch", "scikitlearn", "torchrun"}, pool="gpu")
def probes(
    context: dg.AssetExecutionContext, config: WhichScores, project: ProjectResource, trainer: TrainerResource
) -> dg.MaterializeResult:  # type: ignore[type-arg]
    """Probe one run, or one encoder of corpus.yaml, on every benchmark."""
    from nextvid.evaluate.probes import default_how, finish_probes, plan_probes, prepare_probes

    def make(opened: Project, recipe: str, run: str | None = None) -> Outcome:
        started = time.perf_counter()
        planned = plan_probes(opened, recipe, run, config.benchmarks, config.checkpoint)
        made = bool(planned.missing)
        if made:
            device = opened.corpus.execution.device
            how = ExecutionConfig(device=device) if trainer.on else default_how(opened, planned)
            how = apply_how(how, as_overrides(config.how))
            trainer.train(context, prepare_probes(opened, planned, how))
        return finish_probes(planned, made=made, seconds=time.perf_counter() - started)

    with readable_errors():
        opened = project.open()
        if context.partition_key in opened.corpus.encoders:
            return result(make(opened, context.partition_key))
    return evaluate(context, config, project, make, ended=not config.run_id)
