"""`make demo`: make every asset of a small labelled corpus with Dagster, on the instance that `make ui` opens.

Writes the corpus, prints a line for each materialisation, and ends with a table of what was measured; demo.json in the
data root has the same numbers. A second run finds everything made.
"""

import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
from rich.console import Console
from rich.table import Table

from examples.demo.write_corpus import write_corpus
from nextvid.config.project import Project, open_project
from nextvid.corpus.sources import batch_fingerprint, update_sources
from nextvid.graph import GRAPH
from nextvid.making.progress import shown
from nextvid.plain_text import printable
from nextvid.planning.acceptance import ensure_accepted
from nextvid.planning.waiting import standard, waiting
from nextvid.stopping import when_stopped
from nextvid.train.events import read_events
from orchestration.definitions import build_defs
from orchestration.sensors import apply_partitions, observation
from storage import atomic
from storage.atomic import exists, publish_json, read_json
from storage.limits import explained
from storage.locks import locked_or_holder
from storage.schemas import Clips, Media, Shots
from storage.tables import read_tables

RECIPE = "demo"
WHAT_TO_DO = (  # the last line of a demo that failed
    "what is made is kept: correct what the line above says, then run `make demo` again, which goes on from there; "
    "`make ui` shows the failed step's log"
)


@dataclass
class Totals:
    """Seconds, rows and numbers of each asset, added up over its partitions."""

    console: Console
    seconds: dict[str, float] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    numbers: dict[str, dict[str, Any]] = field(default_factory=dict)
    made: int = 0

    def add(self, event: dg.AssetMaterialization) -> None:
        """Print one materialisation as a line and add its numbers."""
        values: Mapping[str, Any] = {name: value.value for name, value in event.metadata.items()}
        asset = event.asset_key.to_user_string()
        partition = str(event.partition or "")
        self.seconds[asset] = self.seconds.get(asset, 0.0) + float(values["seconds"])
        self.rows[asset] = self.rows.get(asset, 0) + int(values["dagster/row_count"])
        self.numbers.setdefault(asset, {})[partition] = {
            k: v for k, v in values.items() if isinstance(v, int | float | str)
        }
        self.made += bool(values["made"])
        state = "made" if values["made"] else "up to date"
        bad = f", {values['quarantined']} quarantined" if values["quarantined"] else ""
        self.console.print(
            f"{asset:13} {partition:22} {state:10} {values['dagster/row_count']:>7} rows "
            f"{values['seconds']:7.1f} s{bad}",
            highlight=False,
            soft_wrap=True,
        )


def run_demo() -> None:
    """Make the demo; an error ends the program with what to do."""
    try:
        root = Path(open_project().root.url)
        with atomic.writing(str(root)):
            atomic.make_folder(root)
        with locked_or_holder(root / "demo.lock", who="make demo") as holder:
            if holder is not None:
                sys.exit(f"conflict: process {holder} is at work on {root}: wait until it has ended")
            make_demo()
    except Exception as error:
        if (known := explained(error)) is None:
            raise
        sys.exit(f"{known.kind}: {known}\n{WHAT_TO_DO}")


def make_demo() -> None:
    """Write the corpus, make every asset and print what was measured."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    began = time.monotonic()
    project = open_project()
    folder = Path(project.root.url) / "corpus"
    summary = write_corpus(folder)
    files = summary.videos + summary.images
    console.print(
        f"corpus        {files} videos and images in {folder} {time.monotonic() - began:.1f} s", highlight=False
    )
    instance = dg.DagsterInstance.get()
    totals = Totals(console)
    list_sources(project, instance)
    defs = build_defs()
    with shown(console):  # the steps run in this process, and show there how far they are
        for job, partition in runs(project):
            execute(defs, instance, job, partition, totals)
    written = f"{project.root.url}/demo.json"
    if totals.made == 0 and exists(written):
        console.print("\nNothing was new, so nothing was made. Measured when it was made:")
    else:
        publish_json(written, collect(project, totals, time.monotonic() - began))
    print_table(console, read_json(written))


def list_sources(project: Project, instance: dg.DagsterInstance) -> None:
    """List the datasets, update Dagster's partitions, report changed batches as observations."""
    changes = update_sources(project)
    ensure_accepted(project)
    apply_partitions(instance, project)
    for change in changes:
        instance.report_runless_asset_event(observation(change, batch_fingerprint(project, change.batch)))


def runs(project: Project) -> Iterator[tuple[str, str | None]]:
    """Jobs and single assets with their partitions, in the order of the graph; complete batches are left out."""
    for batch in waiting(standard(project)).keys:
        yield "ingest", batch
    yield "freeze", None
    for asset, node in GRAPH.items():
        if node.partition == "recipe":
            yield asset, RECIPE


def execute(
    defs: dg.Definitions, instance: dg.DagsterInstance, name: str, partition: str | None, totals: Totals
) -> None:
    """Run a job, or one asset, in this process and print what it materialised; exit where a step failed."""
    single = name in GRAPH
    job = defs.resolve_implicit_global_asset_job_def() if single else defs.resolve_job_def(name)
    run = str(uuid.uuid4())
    with when_stopped(lambda: cancel(instance, run)):
        result = job.execute_in_process(
            instance=instance,
            run_id=run,
            partition_key=partition,
            asset_selection=[dg.AssetKey(name)] if single else None,
            run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},  # our own lines are enough
            raise_on_error=False,
        )
    for event in result.get_asset_materialization_events():
        totals.add(event.materialization)
    if not result.success:
        for failure in result.filter_events(lambda event: event.is_step_failure):
            data = failure.step_failure_data
            message = data.user_failure_data.description if data.user_failure_data else data.error
            told = printable(f"{failure.step_key}: {message}", keep="\n")
            totals.console.print(told, style="red", markup=False, soft_wrap=True)
        sys.exit(WHAT_TO_DO)


def cancel(instance: dg.DagsterInstance, run: str) -> None:
    """Record that a run was stopped: else Dagster shows it as running, and counts its places in the pools as taken."""
    if found := instance.get_run_by_id(run):
        instance.report_run_canceled(found)
    instance.event_log_storage.free_concurrency_slots_for_run(run)


def collect(project: Project, totals: Totals, seconds: float) -> dict[str, Any]:
    """The numbers of demo.json, from the assets' files and their materialisations."""
    run = str(totals.numbers["pretrain"][RECIPE]["run"])
    events, scores = read_events(Path(project.root.run(RECIPE, run))), totals.numbers["probes"][RECIPE]
    return {
        "files": by_status(read_tables(project.root, "media", None, Media)),
        "shots": by_status(read_tables(project.root, "shots", None, Shots)),
        "clips": by_status(read_tables(project.root, "clips", None, Clips)),
        "rows": totals.numbers["trainset"][""]["dagster/row_count"],
        "made": totals.made,
        "asset_seconds": {name: round(value, 1) for name, value in totals.seconds.items()},
        "seconds": round(seconds, 1),
        "run": run,
        "first": curve_point(events, 0),
        "last": curve_point(events, -1),
        "probes": {name: read_json(scores[f"{name}_score"]) for name in sorted(project.corpus.benchmarks)},
        "report": totals.numbers["report"][RECIPE]["page"],
    }


def by_status(table: pl.DataFrame) -> dict[str, int]:
    """Rows of a table by status."""
    counted = table.group_by(pl.col("status").cast(pl.String)).len().sort("status")
    return dict(zip(counted["status"].to_list(), counted["len"].to_list(), strict=True))


def curve_point(events: Sequence[Mapping[str, Any]], index: int) -> dict[str, float]:
    """Losses and effective rank at the first or last logged step."""
    step = [event for event in events if event["kind"] == "step"][index]
    look = [event for event in events if event["kind"] == "diagnostics"][index]
    return {"step": step["step"], "align": step["align"], "flow": step["flow"], "rank": look["effective_rank"]}


def print_table(console: Console, numbers: Mapping[str, Any]) -> None:
    """Print the closing table."""
    table = Table(title="What was measured", title_justify="left", box=None, show_header=False)
    for noun in ("files", "shots", "clips"):
        table.add_row(noun, ", ".join(f"{count} {status}" for status, count in numbers[noun].items()))
    table.add_row("trainset", f"{numbers['rows']} rows")
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in numbers["asset_seconds"].items())
    table.add_row("seconds", f"{numbers['seconds']:.0f} in all: {seconds}")
    for name, meaning in (("align", "align loss"), ("flow", "flow loss"), ("rank", "effective rank")):
        table.add_row(meaning, f"{numbers['first'][name]:.3f} first, {numbers['last'][name]:.3f} last")
    for benchmark, score in numbers["probes"].items():
        table.add_row(f"probe: {benchmark}", describe_score(score))
    console.print(table)
    console.print(f"report  {numbers['report']}\nUI      make ui, then http://127.0.0.1:3000", soft_wrap=True)


def describe_score(score: Mapping[str, Any]) -> str:
    """Accuracy of the trained encoders and of random initialisation, with binomial standard errors."""
    found = score["encoders"]
    parts = [f"{name} {found[name]['accuracy']:.3f} +- {found[name]['standard_error']:.3f}" for name in found]
    return f"{', '.join(parts)} on {score['clips']['test']} test clips"
