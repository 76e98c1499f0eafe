"""Set the pool `decode` of a Dagster instance by the cores of this machine: `python -m orchestration.pools`.

Run it where steps run. The instance keeps the limit: run it again when the machine or `execution.cores` changes. The
pool `gpu` stays at one step, which takes every device (docs/decisions/0042). On Ray and Kubernetes nodes bound it.
"""

import sys

import dagster as dg

from nextvid.config.project import open_project
from nextvid.machine import available_cores, batches_at_once
from storage.errors import NExTVidError, exit_code


def set_pools(instance: dg.DagsterInstance, cores: int) -> str:
    """Let as many batches decode at once as the cores are shared among; says so in a line."""
    batches = batches_at_once(cores)
    instance.event_log_storage.set_concurrency_slots("decode", batches)
    return f"pool decode: {batches} at once, {cores // batches} of {cores} cores each\n"


if __name__ == "__main__":
    try:
        found = available_cores(open_project().corpus.execution.cores)
        sys.stdout.write(set_pools(dg.DagsterInstance.get(), found))
    except NExTVidError as error:
        sys.stderr.write(f"{error.kind}: {error}\n")
        sys.exit(exit_code(error))
