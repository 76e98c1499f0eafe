"""The asset `pretrain`."""

import dagster as dg
from pydantic import Field

from assets.declare import asset
from assets.reporting import readable_errors, traced
from assets.resources import ProjectResource, TrainerResource
from assets.training_run import launch_of, made_from, tag_run


class PretrainConfig(dg.Config):
    """Options in the launchpad. The recipe is the partition."""

    overrides: list[str] = Field(
        default=[],
        description="Changes of the recipe as `key.path=value`, such as `seed=1` or `stages.warmup.steps=100`; they "
        "make another run with another id",
    )
    how: list[str] = Field(
        default=[],
        description="How the run is executed, as `key=value`, such as `ranks=8`, `device=cpu` or "
        "`checkpoint_every_steps=100`; the run and its id stay the same",
    )
    trainset: str = Field(
        default="",
        description="Digest of the trainset to train on; empty: the newest. Name that of a failed run to resume it "
        "though the trainset has changed since",
    )
    repeat: int = Field(
        default=0,
        description="0 resumes or finds the run; 1, 2, ... train it again from the start, as a run of its own",
    )


@asset("pretrain", kinds={"pytorch", "torchrun"}, pool="gpu")
def pretrain(
    context: dg.AssetExecutionContext, config: PretrainConfig, project: ProjectResource, trainer: TrainerResource
) -> dg.MaterializeResult:  # type: ignore[type-arg]
    """Prepare the run, train until it is complete, check what is on disk."""
    from nextvid.config.overrides import apply_how
    from nextvid.config.recipe import ExecutionConfig
    from nextvid.train.pretrain import finish_run, prepare_run

    opened, recipe = project.open(), context.partition_key
    with readable_errors():
        run = prepare_run(
            opened,
            recipe,
            config.overrides,
            apply_how(ExecutionConfig(), config.how),
            launch=launch_of(context),
            repeat=config.repeat,
            trainset=config.trainset or None,
        )
        context.log.info(f"run {run.run_id} in {run.folder}")
        tag_run(context, run.run_id)
        if not run.complete:
            trainer.train(context, run)
        outcome = finish_run(opened, recipe, run.run_id, made=not run.complete)
        read = {name: str(outcome.numbers[name]) for name in ("trainset", "mask_plan")}
        return made_from(traced(opened, outcome), read)
