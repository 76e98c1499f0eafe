"""What runs by the clock: the nightly look at every batch, which also retries what was quarantined or failed."""

from collections.abc import Iterator

import dagster as dg

from assets.resources import ProjectResource
from orchestration.jobs import ingest
from orchestration.sensors import apply_partitions

NIGHT = "0 3 * * *"  # once a night, when a trainer's users sleep


def nightly_at(cron: str) -> dg.ScheduleDefinition:
    """The schedule `nightly`, by its cron line."""

    @dg.schedule(
        job=ingest,
        cron_schedule=cron,
        description="Every night: lists the datasets; requests each batch that changed or has quarantined rows.",
    )
    def nightly(
        context: dg.ScheduleEvaluationContext, project: ProjectResource
    ) -> Iterator[dg.RunRequest | dg.SkipReason]:
        """One run a batch that needs one. The date is in the key, so that what failed yesterday is tried again."""
        from nextvid.corpus.sources import update_sources
        from nextvid.planning.acceptance import in_force
        from nextvid.planning.waiting import waiting

        opened = project.open()
        update_sources(opened)
        in_force(opened)  # `reencode: auto` holds for those too who have no sensor
        apply_partitions(context.instance, opened)
        day = context.scheduled_execution_time.strftime("%Y-%m-%d")
        asking = waiting(opened, retry=True)
        if not asking:
            yield dg.SkipReason("every batch is complete and nothing is quarantined")
        for batch, key in asking.items():
            yield dg.RunRequest(run_key=f"{day}:{key}", partition_key=batch)

    return nightly
