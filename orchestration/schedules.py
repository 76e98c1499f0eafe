"""The nightly schedule: every batch that changed, and every batch with quarantined or failed rows, to retry them."""

from collections.abc import Iterator

import dagster as dg

from assets.resources import ProjectResource
from orchestration.jobs import ingest
from orchestration.sensors import apply_partitions

NIGHT = "0 3 * * *"  # our choice: a retry opens every quarantined file, so once a day, at night


def nightly_at(cron: str) -> dg.ScheduleDefinition:
    """The schedule `nightly` at the times of a cron line."""

    @dg.schedule(
        job=ingest,
        cron_schedule=cron,
        description="Every night: lists the datasets; requests each batch that changed or has quarantined rows.",
    )
    def nightly(
        context: dg.ScheduleEvaluationContext, project: ProjectResource
    ) -> Iterator[dg.RunRequest | dg.SkipReason]:
        """One run for each batch that needs one. The run key has the date: yesterday's failures are retried."""
        from nextvid.corpus.sources import update_sources
        from nextvid.planning.acceptance import ensure_accepted
        from nextvid.planning.waiting import waiting

        opened = project.open()
        update_sources(opened)
        ensure_accepted(opened)  # for `reencode: auto`, which must not depend on the sensor
        apply_partitions(context.instance, opened)
        day = context.scheduled_execution_time.strftime("%Y-%m-%d")
        batches = waiting(opened, retry=True)
        if not batches:
            yield dg.SkipReason("every batch is complete and nothing is quarantined")
        for batch, key in batches.items():
            yield dg.RunRequest(run_key=f"{day}:{key}", partition_key=batch)

    return nightly
