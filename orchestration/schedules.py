"""The nightly schedule: every batch that changed, and every batch with quarantined or failed rows, to retry them."""

from collections.abc import Iterator

import dagster as dg

from assets.resources import ProjectResource
from orchestration.jobs import ingest
from orchestration.sensors import apply_partitions, ingest_requests, list_datasets, show_errors

NIGHT = "0 3 * * *"  # our choice: a retry opens every quarantined file, so once a day, at night
JUDGE_S = 40.0  # our choice: Dagster aborts the evaluation of a schedule after 60 s


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
        """One run for each batch that needs one. The run key has the time: what failed before is retried."""
        from nextvid.planning.waiting import waiting

        opened = project.open()
        listed = list_datasets(context.instance, opened, settle=False)
        found = waiting(listed.standard, retry=True, within_s=JUDGE_S)
        for line in apply_partitions(context.instance, opened):
            context.log.info(line)
        if found.last:
            context.log.warning(f"batches after {found.last} were not judged within {JUDGE_S:g} s")
        show_errors(context, [*listed.errors, *found.errors], alone=not found.keys)
        if not found.keys:
            yield dg.SkipReason("every batch is complete and nothing is quarantined")
        yield from ingest_requests(found, context.scheduled_execution_time.strftime("%Y-%m-%dT%H:%M:"))

    return nightly
