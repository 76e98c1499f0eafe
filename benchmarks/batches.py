"""`python -m benchmarks.batches`: what many batches cost where nothing is encoded: listing, plan, gate, UI.

The corpus is benchmarks/registered.py's: done up to its latents, one row a file, no media. So each figure is what the
machinery takes to find out that nothing, or one batch, is to be done. docs/scale.md extrapolates from these figures by
the batch. Seconds, of one run each: a tick of minutes would look the same as one of seconds under a better clock.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

import dagster as dg

from assets.resources import ProjectResource
from benchmarks.measure import machine, show, write
from benchmarks.registered import register
from nextvid.config.project import Project
from nextvid.corpus.sources import update_sources
from nextvid.encode.latent_stats import make_latent_stats
from nextvid.planning.costs import forecast
from nextvid.trainset.duplicates import make_duplicates
from nextvid.trainset.trainset import make_trainset
from orchestration.jobs import forecast_of
from orchestration.sensors import TICK_S, apply_partitions, new_sources_every

BATCHES, FILES = 1000, 10  # our scale: 1,000 batches; ten files each, so that it is batches that cost
QUICK_BATCHES = 110  # above 100 partitions Dagster marks nothing (tests/orchestration/test_gate.py)
UI_WAIT_S = 120.0
LIMIT_S = 60  # for a tick in a code server (dagster/_grpc: DAGSTER_SENSOR_GRPC_TIMEOUT_SECONDS)


@dataclass(frozen=True)
class Row:
    """One piece of work over the whole corpus."""

    name: str
    seconds: float
    ms_per_batch: float


def measured(project: Project, instance: dg.DagsterInstance, batches: int, registered_s: float) -> list[Row]:
    """Every piece of work, in the order in which a corpus meets them."""
    resources = {"project": ProjectResource(corpus=str(project.path))}

    def tick() -> None:
        new_sources_every(TICK_S, forecast_of(resources["project"]))(
            dg.build_sensor_context(instance=instance, resources=resources)
        )

    work: tuple[tuple[str, Callable[[], object]], ...] = (
        ("listing", lambda: update_sources(project)),
        ("sensor tick, the first of a process", tick),
        ("sensor tick, nothing new", tick),
        ("partitions into Dagster", lambda: apply_partitions(instance, project)),
        ("plan", lambda: forecast(project)),
        ("latent_stats", lambda: make_latent_stats(project)),
        ("duplicates", lambda: make_duplicates(project)),
        ("trainset, made", lambda: make_trainset(project)),
        ("trainset, nothing new", lambda: make_trainset(project)),
    )
    rows = [Row("register (not part of any run)", registered_s, 1000 * registered_s / batches)]
    for name, function in work:
        began = time.perf_counter()
        function()
        seconds = time.perf_counter() - began
        rows.append(Row(name, seconds, 1000 * seconds / batches))
    return rows


def ui_start(project: Project, home: Path) -> float:
    """Seconds from the webserver's start until it answers with every partition of `latents`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "DAGSTER_HOME": str(home), "NEXTVID_CORPUS": str(project.path)}
    command = ["-m", "dagster_webserver", "-m", "orchestration.definitions", "-h", "127.0.0.1", "-p", str(port)]
    top = Path(__file__).resolve().parents[1]
    began = time.perf_counter()
    server = subprocess.Popen(
        [sys.executable, *command], cwd=top, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
    )
    try:
        while time.perf_counter() - began < UI_WAIT_S:
            if _partitions(port) == len(project.root.batches()):
                return time.perf_counter() - began
            time.sleep(0.1)
        raise TimeoutError(f"the webserver did not answer within {UI_WAIT_S:.0f} s")
    finally:
        server.terminate()
        server.wait(30)


def _partitions(port: int) -> int:
    """How many partitions of `latents` the webserver knows; -1 while it does not answer."""
    query = {"query": '{ assetNodes(assetKeys: [{path: ["latents"]}]) { partitionKeys } }'}
    request = Request(
        f"http://127.0.0.1:{port}/graphql", json.dumps(query).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urlopen(request, timeout=60) as answer:  # noqa: S310
            (node,) = json.load(answer)["data"]["assetNodes"]
            return len(node["partitionKeys"])
    except (URLError, ConnectionError, TimeoutError):
        return -1


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_BATCHES} batches instead of {BATCHES}")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    batches = QUICK_BATCHES if arguments.quick else BATCHES
    with tempfile.TemporaryDirectory() as folder, dg.instance_for_test() as instance:
        began = time.perf_counter()
        project = register(Path(folder) / "data", batches, FILES)
        rows = measured(project, instance, batches, time.perf_counter() - began)
        ui_s = ui_start(project, Path(instance.root_directory))
        rows.append(Row("UI, from start to every partition", ui_s, 1000 * ui_s / batches))
    first_s, tick_s = (row.seconds for row in rows if row.name.startswith("sensor tick"))
    targets = {
        "sensor tick within its interval, s": {"measured": tick_s, "at_most": TICK_S, "met": tick_s <= TICK_S},
        "the first within Dagster's, s": {"measured": first_s, "at_most": LIMIT_S, "met": first_s <= LIMIT_S},
    }
    found = {
        "benchmark": "batches",
        "quick": arguments.quick,
        "machine": machine(),
        "batches": batches,
        "files_per_batch": FILES,
        "rows": [asdict(row) for row in rows],
        "targets": targets,
    }
    show(f"{batches} batches of {FILES} files, no media", ("work", "seconds", "ms a batch"), [
        (row.name, row.seconds, row.ms_per_batch) for row in rows
    ])  # fmt: skip
    for name, said in targets.items():
        print(f"{name}: {said['measured']:.2f}, at most {said['at_most']}: {'met' if said['met'] else 'missed'}")
    write(arguments.json, found)


if __name__ == "__main__":
    main()
