"""One training run of a recipe on the newest trainset: checkpoints of the four stages, events, curves.

torchrun is started through Pipes in its own process group. Asking again resumes the run, or does nothing when it is
complete; the metadata names the digests of trainset and mask plan.
"""

import dagster as dg
from pydantic import Field

from assets import checks, reporting
from assets.partitions import RECIPE
from assets.resources import ProjectResource


class PretrainConfig(dg.Config):
    """What the launchpad offers: overrides change the recipe (and the run's id), ranks change nothing but speed."""

    overrides: list[str] = Field(default=[])
    ranks: int = 1


@dg.asset(
    partitions_def=RECIPE,
    group_name="training",
    deps=["trainset", "mask_plan"],
    kinds={"pytorch", "torchrun"},
    owners=reporting.OWNERS,
    code_version="1",
    pool="gpu",
    check_specs=checks.specs("pretrain"),
    description=__doc__,
)
def pretrain(
    context: dg.AssetExecutionContext, config: PretrainConfig, project: ProjectResource
) -> dg.MaterializeResult:  # type: ignore[type-arg]
    """Prepare the run, train until it is complete, verify what is on disk."""
    from assets.launcher import run_group
    from nextvid.train.launch import finish_run, prepare_run

    opened, recipe = project.open(), context.partition_key
    with reporting.readable_errors():
        launch = context.run.root_run_id or context.run.run_id
        run = prepare_run(opened, recipe, config.overrides, ranks=config.ranks, launch=launch)
        context.log.info(f"run {run.run_id} in {run.folder}")
        if not run.complete:
            run_group(context, run)
        return reporting.result(finish_run(opened, recipe, run.run_id, made=not run.complete))
