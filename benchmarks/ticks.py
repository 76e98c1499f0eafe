"""`python -m benchmarks.ticks`: what a tick of the sensor costs with 10,000 batches, in seconds and memory.

First new files for as many batches are listed: one tick sees them, the next takes those that have settled. Then 1,000
batches are registered (benchmarks/registered.py) and copied nine times as batches of other numbers: a tick reads checks
and tables, whatever their rows. Each tick goes on by the cursor of the one before, as in Dagster's daemon.
"""

import argparse
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import dagster as dg
import polars as pl

from assets.resources import ProjectResource
from benchmarks.measure import machine, show, write
from benchmarks.registered import register, write_unlisted
from nextvid.config.project import Project, open_project
from nextvid.corpus.sources import batch_fingerprint
from nextvid.encode.plan import accepted_spec
from nextvid.making.batches import VERSIONED, batch_key, batch_number
from nextvid.planning.acceptance import accept_asked
from orchestration.jobs import forecast_of
from orchestration.sensors import TICK_S, apply_partitions, new_sources_every
from storage import atomic
from storage.schemas import Sources
from storage.tables import read_table, write_table

BATCHES, QUICK_BATCHES, FILES, COPIES = 1000, 20, 4, 9
FIRST_S, LATER_S = 60.0, 10.0  # Dagster aborts a tick after 60 s; a later one leaves 20 s of the 30 between two
LATER = 5  # ticks


@dataclass(frozen=True)
class Row:
    """One tick."""

    name: str
    seconds: float
    requests: int
    memory_mb: float  # largest resident size of the process so far


def multiply(project: Project, copies: int) -> None:
    """Copy every batch so many times, each copy with files of its own; stored latents are hard links."""
    root, spec = project.root, accepted_spec(project).digest()
    batches = root.batches()
    for copy in range(1, copies + 1):
        for batch in batches:
            dataset, _, _ = batch.rpartition(".")
            other = batch_key(dataset, batch_number(batch) + copy * len(batches))
            sources = read_table(root.table("sources", batch), Sources)
            named = {name: pl.col(name).str.replace("/0([^/]*)$", f"/{copy}$1") for name in ("uri",)}
            renamed = sources.with_columns(pl.col("path").str.replace("^0", str(copy)), batch=pl.lit(other), **named)
            for uri in renamed["uri"]:
                Path(uri).touch()
            stamps = [f"mtime {Path(uri).stat().st_mtime_ns}" for uri in renamed["uri"]]
            write_table(root.table("sources", other), renamed.with_columns(fingerprint=pl.Series(stamps)), Sources)
            for noun in VERSIONED:
                shutil.copyfile(root.table(noun, batch), root.table(noun, other))
                checks = atomic.read_json(root.checks(noun, batch))
                checks["made_from"]["listing"] = batch_fingerprint(project, other)
                atomic.publish_json(root.checks(noun, other), checks)
            shutil.copytree(root.stored_batch(spec, batch), root.stored_batch(spec, other))
            shutil.copyfile(root.latents_checks(spec, batch), root.latents_checks(spec, other))


def ticker(project: Project, instance: dg.DagsterInstance) -> Callable[[str], Row]:
    """A function that carries out the next tick of the sensor."""
    resources = {"project": ProjectResource(corpus=str(project.path))}
    sensor, cursor = new_sources_every(TICK_S, forecast_of(resources["project"])), None

    def tick(name: str) -> Row:
        nonlocal cursor
        context = dg.build_sensor_context(instance=instance, resources=resources, cursor=cursor)
        began_s = time.perf_counter()
        result = sensor(context)
        seconds = time.perf_counter() - began_s
        assert isinstance(result, dg.SensorResult)
        cursor = result.cursor
        memory_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return Row(name, seconds, len(result.run_requests or []), memory_mb)

    return tick


def ticks(project: Project, instance: dg.DagsterInstance) -> list[Row]:
    """The first tick of this process, later ones with nothing new, and those after a changed curation is accepted."""
    tick = ticker(project, instance)
    rows = [tick("first"), *(tick(f"later {number + 1}") for number in range(LATER))]
    project.path.write_text(project.path.read_text().replace("frames: 1, crop: whole", "frames: 1, crop: centre"))
    rows.append(tick("corpus.yaml edited"))
    accept_asked(open_project(project.path))
    return [*rows, tick("accepted"), tick("accepted, the next")]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_BATCHES} batches, not {BATCHES}, copied as often")
    parser.add_argument("--folder", type=Path, help="keep the batches in this folder; where it has them, use them")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, dg.instance_for_test() as instance:
        count = QUICK_BATCHES if arguments.quick else BATCHES
        tick = ticker(write_unlisted(Path(temporary) / "new", count * (COPIES + 1), FILES), instance)
        new = [tick("new files, seen"), tick("new files, assigned to batches")]
        folder = (arguments.folder or Path(temporary)) / "data"
        if not folder.exists():
            multiply(register(folder, count, FILES), COPIES)
        project = open_project(folder / "corpus.yaml")
        apply_partitions(instance, project)
        rows, batches = ticks(project, instance), len(project.root.batches())
    listed_s = max(row.seconds for row in new)
    later_s = max(row.seconds for row in rows[1:])
    targets = {
        "first listing, s": {"measured": listed_s, "at_most": FIRST_S, "met": listed_s <= FIRST_S},
        "first tick, s": {"measured": rows[0].seconds, "at_most": FIRST_S, "met": rows[0].seconds <= FIRST_S},
        "later ticks, s": {"measured": later_s, "at_most": LATER_S, "met": later_s <= LATER_S},
    }
    show(f"{batches} batches of {FILES} files, no media", ("tick", "seconds", "requests", "memory, MB"), [
        (row.name, row.seconds, row.requests, row.memory_mb) for row in (*new, *rows)
    ])  # fmt: skip
    for name, said in targets.items():
        print(f"{name}: {said['measured']:.2f}, at most {said['at_most']:.0f}: {'met' if said['met'] else 'missed'}")
    write(arguments.json, {
        "benchmark": "ticks", "quick": arguments.quick, "machine": machine(), "batches": batches,
        "files_per_batch": FILES, "rows": [asdict(row) for row in (*new, *rows)], "targets": targets,
    })  # fmt: skip


if __name__ == "__main__":
    main()
