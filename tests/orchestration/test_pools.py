"""Pools are set by the rule by which steps share the cores."""

from pathlib import Path

import dagster as dg

from orchestration.pools import set_pools


def test_as_many_batches_decode_at_once_as_share_the_cores(tmp_path: Path) -> None:
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        for cores, batches, each in ((64, 4, 16), (40, 2, 20), (2, 1, 2)):
            told = set_pools(instance, cores)
            limits = {pool.name: pool.limit for pool in instance.event_log_storage.get_pool_limits()}
            assert limits == {"decode": batches}
            assert told == f"pool decode: {batches} at once, {each} of {cores} cores each\n"
