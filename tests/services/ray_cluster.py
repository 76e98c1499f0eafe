"""A Ray cluster on this machine: a head that takes no work, and workers of one CPU each.

Ray's own `Cluster` of several nodes in one machine's processes: `ray start` would have the nodes share ports.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.services.conftest import free_port

MEMORY_BYTES = 100_000_000  # of each object store; nothing of ours goes through it


@dataclass
class RayCluster:
    """Where its jobs are submitted, and its workers."""

    address: str
    nodes: Any  # ray.cluster_utils.Cluster
    workers: list[Any] = field(default_factory=list)

    def add(self) -> None:
        """One more worker. It has no GPU and says that it has one, which Ray believes."""
        worker = self.nodes.add_node(
            num_cpus=1, num_gpus=1, object_store_memory=MEMORY_BYTES, dashboard_agent_listen_port=free_port()
        )
        self.workers.append(worker)

    def kill(self, count: int | None = None) -> None:
        """SIGKILL workers, by default all, with what runs on them, as machines that go away: Ray leaves the steps."""
        doomed = self.workers[-(count or len(self.workers)) :]
        for worker in doomed:
            started = [pid for entry in _entries(worker) for pid in below(entry)]
            self.nodes.remove_node(worker, allow_graceful=False)
            for pid in started:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.workers.remove(worker)


def _entries(worker: Any) -> list[int]:
    """Process ids that a node was started with: its raylet and agents."""
    return [info.process.pid for infos in worker.all_processes.values() for info in infos]


def below(top: int) -> list[int]:
    """Every process below one, by /proc."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = [top]
    for process in found:
        found += [pid for pid, parent in parents.items() if parent == process]
    return found[1:]


@contextmanager
def ray_cluster(workers: int) -> Iterator[RayCluster]:
    """Start it, wait until every worker has joined, end all of it."""
    from ray.cluster_utils import Cluster

    dashboard = free_port()
    head = {
        "num_cpus": 0,
        "object_store_memory": MEMORY_BYTES,
        "include_dashboard": True,
        "dashboard_host": "127.0.0.1",
        "dashboard_port": dashboard,
        "dashboard_agent_listen_port": free_port(),
    }
    nodes = Cluster(initialize_head=True, head_node_args=head)
    try:
        found = RayCluster(f"http://127.0.0.1:{dashboard}", nodes)
        for _ in range(workers):
            found.add()
        nodes.wait_for_nodes()
        yield found
    finally:
        nodes.shutdown()
