"""One training run of a recipe on the newest trainset: checkpoints of the four stages, events, curves.

torchrun is started through Pipes in its own process group. Asking again resumes the run, or does nothing when it is
complete; the metadata names the digests of trainset and mask plan.
"""

import dagster as dg
from pydantic import Field

from assets import checks, reporting
from assets.partitions import RECIPE
from assets.resources import ProjectResource, TrainerResource


class PretrainConfig(dg.Config):
    """What the launchpad offers. The recipe is the partition."""

    overrides: list[str] = Field(
        default=[],
        description="`key.path=value` of the recipe, as `seed=1` or `stages.warmup.steps=100`: another run, "
        "with another id",
    )
    how: list[str] = Field(
        default=[],
        description="`key=value` of how it is carried out, as `ranks=8`, `device=cpu` or `checkpoint_every_steps=100`: "
        "the same run, faster or slower",
    )
    repeat: int = Field(
        default=0, description="0 resumes or finds the run; 1, 2, ... train it once more from the start"
    )


@dg.asset(
    partitions_def=RECIPE,
    group_name="training",
    deps=["trainset", "mask_plan"],
    kinds={"pytorch", "torchrun"},
    owners=reporting.OWNERS,
    code_version="1",
    pool="gpu",
    retry_policy=reporting.CRASHES,
    check_specs=checks.specs("pretrain"),
    description=__doc__,
)
def pretrain(
    context: dg.AssetExecutionContext, config: PretrainConfig, project: ProjectResource, trainer: TrainerResource
) -> dg.MaterializeResult:  # type: ignore[type-arg]
    """Prepare the run, train until it is complete, verify what is on disk."""
    from nextvid.config.overrides import apply_how
    from nextvid.config.recipe import HowConfig
    from nextvid.train.pretrain import finish_run, prepare_run

    opened, recipe = project.open(), context.partition_key
    with reporting.readable_errors():
        launch = context.run.root_run_id or context.run.run_id
        how = apply_how(HowConfig(), config.how)
        run = prepare_run(opened, recipe, config.overrides, how, launch=launch, repeat=config.repeat)
        context.log.info(f"run {run.run_id} in {run.folder}")
        if not run.complete:
            trainer.train(context, run)
        return reporting.traced(opened, finish_run(opened, recipe, run.run_id, made=not run.complete))
