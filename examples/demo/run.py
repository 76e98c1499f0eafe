"""`make demo`: the whole asset graph on a small labelled corpus, through Dagster, on the instance that `make ui` opens.

Writes the corpus, lets Dagster materialise every asset, prints a line for each, and ends with a table of what was measured;
the same numbers go to demo.json in the data root. Run again, it finds everything done. No accuracy is judged here.
"""

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dagster as dg
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from examples.demo.write_corpus import write_corpus  # noqa: E402
from nextvid.corpus.discover import update_sources  # noqa: E402
from nextvid.corpus.project import Project, open_project  # noqa: E402
from nextvid.corpus.unfinished import unfinished  # noqa: E402
from orchestration.definitions import build_defs  # noqa: E402
from orchestration.sensors import observation, partition_requests  # noqa: E402
from storage.atomic import publish_json  # noqa: E402

RECIPE = "demo"


@dataclass
class Ledger:
    """What each asset said of itself, summed over its partitions."""

    console: Console
    seconds: dict[str, float] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    numbers: dict[str, dict[str, Any]] = field(default_factory=dict)
    made: int = 0

    def add(self, event: dg.AssetMaterialization) -> None:
        """Print one materialisation as a line and keep its numbers."""
        values: Mapping[str, Any] = {name: value.value for name, value in event.metadata.items()}
        asset = event.asset_key.to_user_string()
        partition = str(event.partition or "").replace("|", " ")
        self.seconds[asset] = self.seconds.get(asset, 0.0) + float(values["seconds"])
        self.rows[asset] = self.rows.get(asset, 0) + int(values["dagster/row_count"])
        self.numbers.setdefault(asset, {})[partition] = {k: v for k, v in values.items() if isinstance(v, int | float | str)}
        self.made += bool(values["made"])
        state = "made" if values["made"] else "up to date"
        bad = f", {values['quarantined']} quarantined" if values["quarantined"] else ""
        self.console.print(
            f"{asset:13} {partition:22} {state:10} {values['dagster/row_count']:>7} rows  {values['seconds']:7.1f} s{bad}",
            highlight=False,
        )


def main() -> None:
    """Make the demo and print where everything is."""
    console = Console()
    began = time.monotonic()
    project = open_project()
    corpus_began = time.monotonic()
    summary = write_corpus(Path(project.root.url) / "corpus")
    console.print(f"corpus        {summary.files} files in {Path(project.root.url) / 'corpus'}  {time.monotonic() - corpus_began:.1f} s")
    instance = dg.DagsterInstance.get()
    ledger = Ledger(console)
    changed = list_sources(project, instance)
    for job, partition in runs(project):
        execute(instance, job, partition, ledger)
    seconds = time.monotonic() - began
    numbers = collect(project, ledger, seconds)
    publish_json(f"{project.root.url}/demo.json", numbers)
    print_table(console, numbers)
    if not changed and ledger.made == 0:
        console.print("Nothing was new, so nothing was made.")
    console.print(f"report  {numbers['report']}")
    console.print("UI      make ui, then http://127.0.0.1:3000")


def list_sources(project: Project, instance: dg.DagsterInstance) -> Sequence[str]:
    """List the datasets, make Dagster's partitions equal to the batches, observe what changed."""
    update = update_sources(project)
    for request in partition_requests(instance, project):
        match request:
            case dg.AddDynamicPartitionsRequest():
                instance.add_dynamic_partitions(request.partitions_def_name, list(request.partition_keys))
            case dg.DeleteDynamicPartitionsRequest():
                for key in request.partition_keys:
                    instance.delete_dynamic_partition(request.partitions_def_name, key)
    for batch in update.changed:
        instance.report_runless_asset_event(observation(project, batch))
    return update.changed


def runs(project: Project) -> Iterator[tuple[str, str | None]]:
    """Jobs and single assets in order; a batch that lacks nothing is not run again."""
    for batch in project.root.batches():
        if unfinished(project, batch):
            yield "ingest", batch
    yield "freeze", None
    yield "mask_plan", RECIPE
    yield "pretrain", RECIPE
    for benchmark in sorted(project.corpus.benchmarks):
        yield "probes", f"{benchmark}|{RECIPE}"
    yield "samples", RECIPE
    yield "report", RECIPE


def execute(instance: dg.DagsterInstance, name: str, partition: str | None, ledger: Ledger) -> None:
    """Run a job, or the implicit job of one asset, in this process, and print what it materialised."""
    defs = build_defs()
    if name in ("ingest", "freeze"):
        result = defs.resolve_job_def(name).execute_in_process(instance=instance, partition_key=partition, raise_on_error=False)
    else:
        job = defs.resolve_implicit_global_asset_job_def()
        result = job.execute_in_process(
            instance=instance, partition_key=partition, asset_selection=[dg.AssetKey(name)], raise_on_error=False
        )
    for event in result.get_asset_materialization_events():
        ledger.add(event.materialization)
    if not result.success:
        for failure in result.filter_events(lambda event: event.is_step_failure):
            data = failure.step_failure_data
            ledger.console.print(f"{failure.step_key}: {data.user_failure_data or data.error}", style="red")
        if name != "ingest":
            sys.exit(1)


def collect(project: Project, ledger: Ledger, seconds: float) -> dict[str, Any]:
    """The numbers of the closing table, as demo.json holds them; scores come from the files that probes wrote."""
    raise NotImplementedError


def print_table(console: Console, numbers: Mapping[str, Any]) -> None:
    """The short table at the end."""
    table = Table(show_header=False, box=None)
    console.print(table)


if __name__ == "__main__":
    main()
