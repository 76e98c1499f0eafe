"""The asset `pretrain`."""

from pathlib import Path

import dagster as dg

from assets.declare import asset
from assets.launchpad import fields
from assets.reporting import picture_markdown, readable_errors, traced
from assets.resources import ProjectResource, TrainerResource
from assets.training_run import launch_of, made_from, tag_run
from nextvid.config.overrides import apply_how, as_overrides
from nextvid.config.recipe import ExecutionConfig, RecipeConfig

OPTIONS = {
    "overrides": dg.Field(
        dg.Shape(fields(RecipeConfig, "recipe")),
        default_value={},
        description="Changes of the recipe, such as `seed: 1` or `stages: {warmup: {steps: 100}}`; they make another "
        "run with another id. The recipe is the partition",
    ),
    "how": dg.Field(
        dg.Shape(fields(ExecutionConfig, "how")),
        default_value={},
        description="How the run is executed, such as `ranks: 8` or `device: cpu`; the run and its id stay the same",
    ),
    "trainset": dg.Field(
        str,
        default_value="",
        description="Digest of the trainset to train on; empty: the newest. Name that of a failed run to resume it "
        "though the trainset has changed since",
    ),
    "repeat": dg.Field(
        int,
        default_value=0,
        description="0 resumes or finds the run; 1, 2, ... train it again from the start, as a run of its own",
    ),
}


@asset("pretrain", kinds={"pytorch", "torchrun"}, pool="gpu", config_schema=OPTIONS)
def pretrain(
    context: dg.AssetExecutionContext, project: ProjectResource, trainer: TrainerResource
) -> dg.MaterializeResult:  # type: ignore[type-arg]
    """Prepare the run, train until it is complete, check what is on disk."""
    from nextvid.report.training import curves_png
    from nextvid.train.events import read_events
    from nextvid.train.pretrain import default_ranks, finish_run, prepare_run

    opened, recipe, options = project.open(), context.partition_key, context.op_execution_context.op_config
    with readable_errors():
        overrides = as_overrides(options["overrides"])
        how = ExecutionConfig() if trainer.on else ExecutionConfig(ranks=default_ranks(opened, recipe, overrides))
        run = prepare_run(
            opened,
            recipe,
            overrides,
            apply_how(how, as_overrides(options["how"])),
            launch=launch_of(context),
            repeat=options["repeat"],
            trainset=options["trainset"] or None,
        )
        context.log.info(f"run {run.run_id} in {run.folder}")
        tag_run(context, run.run_id, run.trainset)
        if not run.complete:
            trainer.train(context, run)
        outcome = finish_run(opened, recipe, run.run_id, made=not run.complete)
        read = {name: str(outcome.numbers[name]) for name in ("trainset", "mask_plan")}
        curves = dg.MetadataValue.md(picture_markdown(curves_png(read_events(Path(run.folder))), "training curves"))
        reported = made_from(traced(opened, outcome), read)
        return reported._replace(metadata={**(reported.metadata or {}), "training curves": curves})
