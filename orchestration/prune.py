"""Delete old Dagster runs and their event logs: `python -m orchestration.prune --days 90`, a plan without --yes.

Dagster never deletes them itself. A run that made what an asset or partition is now is kept, however old: without its
events the partition would count as missing, and whatever follows it would be requested again.
"""

import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Annotated

import dagster as dg
import tyro

PAGE = 500  # runs or events of one question to the database
ENDED = [dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED]


def runs_in_use(instance: dg.DagsterInstance) -> set[str]:
    """Ids of the runs whose materialization is the newest of an asset or of one of its partitions."""
    found = set()
    for asset in instance.all_asset_keys():
        if event := instance.get_latest_materialization_event(asset):
            found.add(event.run_id)
        newest = instance.get_latest_storage_id_by_partition(asset, dg.DagsterEventType.ASSET_MATERIALIZATION)
        ids = list(newest.values())
        for first in range(0, len(ids), PAGE):
            asked = dg.AssetRecordsFilter(asset, storage_ids=ids[first : first + PAGE])
            found.update(record.run_id for record in instance.fetch_materializations(asked, limit=PAGE).records)
    return found


def old_runs(instance: dg.DagsterInstance, days: float) -> Iterator[str]:
    """Ids of the runs that ended, are older than so many days, and made nothing that an asset is now."""
    before = datetime.now(UTC) - timedelta(days=days)
    kept, cursor = runs_in_use(instance), None
    wanted = dg.RunsFilter(statuses=ENDED, created_before=before)
    while page := instance.get_run_records(wanted, limit=PAGE, cursor=cursor):
        yield from (record.dagster_run.run_id for record in page if record.dagster_run.run_id not in kept)
        cursor = page[-1].dagster_run.run_id


def main(
    days: Annotated[float, tyro.conf.arg(help="runs younger than so many days are kept")],
    yes: Annotated[bool, tyro.conf.arg(help="delete them; otherwise only print how many they are")] = False,
) -> None:
    """Delete old runs of the instance in DAGSTER_HOME, with their event logs."""
    with dg.DagsterInstance.get() as instance:
        old = list(old_runs(instance, days))
        for number, run in enumerate(old if yes else [], 1):
            instance.delete_run(run)
            if number % PAGE == 0:
                sys.stderr.write(f"{number} of {len(old)} deleted\n")
    done = "deleted" if yes else "would be deleted; nothing is changed without --yes"
    sys.stdout.write(f"{len(old)} runs of more than {days:g} days ago {done}\n")


if __name__ == "__main__":
    tyro.cli(main)
