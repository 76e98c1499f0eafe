"""The driver of a Ray job that trains: a placement group with one bundle a node, and a task in each.

`python -m nextvid.train.ray_driver FILE`, whose file is a prepared run (node.py). Nodes meet at the first bundle's
address. The first node that fails ends the others.
"""

import socket
import time
from typing import Annotated, Any

import ray
import tyro
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from nextvid.config.recipe import ExecutionConfig
from nextvid.config.strict import parse
from nextvid.machine import run_rank
from nextvid.train.node import run_node
from storage.errors import LostError, NExTVidError, RefusedError
from storage.records import read_record

LATE_S = 10.0  # our choice: a node's own error, behind that of a node that misses it, comes within seconds


def main(file: Annotated[str, tyro.conf.Positional]) -> None:
    """Carry out a prepared run on nodes of this cluster."""
    how = parse(ExecutionConfig, read_record(file)["how"], f"{file}, how")
    ray.init(logging_level="warning")
    ranks = how.ranks // how.nodes
    bundle = {"CPU": float(ranks)} | ({} if how.device == "cpu" else {"GPU": float(ranks)})
    group = placement_group([bundle] * how.nodes, strategy="STRICT_SPREAD" if how.nodes > 1 else "PACK")
    if not group.wait(how.timeout_s):
        there = "; ".join(_offer(node) for node in ray.nodes() if node["Alive"])
        raise RefusedError(
            f"Ray did not give {how.nodes} nodes with {bundle} each within {how.timeout_s} s; its nodes: {there}"
        )

    def start(number: int, function: Any, *arguments: Any) -> "ray.ObjectRef[Any]":  # noqa: ANN401 - Ray's are Any
        # one of the bundle's CPUs, from which Ray sets OMP_NUM_THREADS for each rank; the others are kept for ranks
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number)
        options = {"num_cpus": 1, "num_gpus": bundle.get("GPU", 0), "max_retries": 0, "scheduling_strategy": strategy}
        found: ray.ObjectRef[Any] = ray.remote(function).options(**options).remote(*arguments)
        return found

    addresses = ray.get([start(number, address) for number in range(how.nodes)])
    rendezvous = f"{addresses[0]}:{ray.get(start(0, free_port))}"
    tasks = {start(number, attempt, file, rendezvous, at, number == 0): at for number, at in enumerate(addresses)}
    if failed := _failures(tasks):
        raise next((error for error in failed if not isinstance(error, LostError)), failed[0])


def _failures(tasks: "dict[ray.ObjectRef[Any], str]") -> list[NExTVidError]:
    """Wait for all nodes, or for the first that fails and what follows within LATE_S; the others are killed."""
    failed: list[NExTVidError] = []
    until_s: float | None = None
    while tasks and (until_s is None or time.monotonic() < until_s):
        for task in ray.wait(list(tasks), timeout=1.0)[0]:
            node = tasks.pop(task)
            try:
                error = ray.get(task)
            except ray.exceptions.RayError as lost:
                error = LostError(f"Ray lost the node or its task ({type(lost).__name__}); asking again resumes it")
            if error is not None:
                failed.append(type(error)(f"node {node}: {error}"))
                until_s = until_s or time.monotonic() + LATE_S
    for task in tasks:
        ray.cancel(task, force=True)
    return failed


def attempt(file: str, rendezvous: str, at: str, first: bool) -> NExTVidError | None:
    """A node's share, on that node; the error that it ended with."""
    try:
        run_node(file, rendezvous, at, first)
    except NExTVidError as error:
        return error
    return None


def address() -> str:
    """This node's address in the cluster."""
    found: str = ray.util.get_node_ip_address()
    return found


def free_port() -> int:
    """A port of this node that nobody listens at."""
    with socket.socket() as bound:
        bound.bind(("", 0))
        return int(bound.getsockname()[1])


def _offer(node: dict[str, Any]) -> str:
    resources = {name: node["Resources"].get(name, 0) for name in ("CPU", "GPU")}
    return f"{node['NodeManagerHostname']} {resources}"


if __name__ == "__main__":
    from nextvid.train import ray_driver  # tasks are sent by name, and `__main__` is another module on other machines

    run_rank(ray_driver.main, "nextvid.train.ray_driver")
