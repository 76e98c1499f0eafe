"""A Ray cluster on this machine: a head that takes no work, and workers of one CPU each.

Ray's own `Cluster` of several nodes in one machine's processes: `ray start` would have the nodes share ports.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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
        """One more worker."""
        worker = self.nodes.add_node(
            num_cpus=1, object_store_memory=MEMORY_BYTES, dashboard_agent_listen_port=free_port()
        )
        self.workers.append(worker)

    def kill(self) -> None:
        """SIGKILL the oldest worker with what runs on it, as a machine that goes away."""
        self.nodes.remove_node(self.workers.pop(0), allow_graceful=False)


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
