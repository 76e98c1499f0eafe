"""The asset `report`: the model card of a run, as one HTML file with its pictures beside it.

It shows what earlier assets wrote; only curves, t-SNE and pictures of places are drawn here. Every block names the file
that its numbers come from. The digest in the path is of those files, so a report is rebuilt only when something that it
shows changed.
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nextvid.config.project import Project
from nextvid.config.stages import draws_before
from nextvid.graph import GRAPH
from nextvid.lineage.trace import score_record
from nextvid.making.outcome import Outcome
from nextvid.making.progress import OnProgress, Progress, silent
from nextvid.report import scores
from nextvid.report.curves import Scored
from nextvid.report.data import DataFacts, data_section, lineage_section, previews_section, read_facts
from nextvid.report.page import Card, Picture, Section, render_html
from nextvid.report.places import places_section
from nextvid.report.scores import Score, read_score
from nextvid.report.training import samples_section, training_section
from nextvid.train.checkpoint import step_of
from nextvid.train.events import Event, mean_speeds, read_events
from nextvid.train.run import Run, find_run
from nextvid.trainset.mask_plan import grid_of
from storage import atomic
from storage.digest import digest, digest_bytes
from storage.errors import UpstreamError
from storage.records import read_record
from storage.root import RUN_CONFIG

SUBTITLE = (
    "A video encoder trained by masked next-frame prediction (NExT-Vid). What was measured, on which data, and where "
    "each number was read."
)
DEMO = " The demo tests the pipeline, not the method: docs/demo.md says what its scores are and are not evidence for."


@dataclass(frozen=True)
class Gathered:
    """Everything a report shows, read."""

    project: Project
    run: Run
    config: dict[str, Any]
    events: list[Event]
    scores: list[Score]
    history: dict[str, list[Scored]]  # by benchmark, scores of several checkpoints on the rows of the newest
    others: dict[str, list[Score]]  # by benchmark, of encoders that corpus.yaml names
    samples: dict[str, Any] | None  # None where the recipe generates nothing
    data: DataFacts


def make_report(project: Project, recipe: str, run: str | None = None, on_progress: OnProgress = silent) -> Outcome:
    """Write report.html of a run, unless there is one of the same inputs.

    Raises UpstreamError where scores or samples are missing.
    """
    started = time.perf_counter()
    found = find_run(project, recipe, run)
    gathered = gather(project, found)
    name = _digest(gathered)
    folder = project.root.report(recipe, found.id, name)
    page = f"{folder}/report.html"
    made = not atomic.exists(page)
    if made:
        card = build_card(gathered, on_progress)
        for picture in (block for section in card.sections for block in section.blocks if isinstance(block, Picture)):
            atomic.publish_bytes(f"{folder}/figures/{picture.name}.png", picture.png)
        atomic.publish_bytes(page, render_html(card).encode())  # last: where the page exists, its pictures do
    numbers: dict[str, int | float | str] = {"page": page}
    for score in gathered.scores:
        numbers[f"{score.benchmark}_points_over_random"] = (
            100 * scores.difference(score.record, score.record["encoders"]["ema"])[0]
        )
    return Outcome(
        asset="report",
        partition=recipe,
        made=made,
        rows=len(gathered.scores),
        size_bytes=len(atomic.read_bytes(page)),
        seconds=time.perf_counter() - started,
        digest=name,
        run=found.id,
        numbers=numbers,
        pictures={"training curves": f"{folder}/figures/curves.png"},
    )


def scores_of_run(project: Project, run: Run) -> dict[str, list[tuple[int, Path, dict[str, Any]]]]:
    """By configured benchmark, the scores of a run as (step, path, record): of the last checkpoint, the newest last."""
    found: dict[str, list[tuple[int, int, Path, dict[str, Any]]]] = {}
    for path in Path(project.root.probes(run.recipe.name, run.id)).rglob("score.json"):
        record = score_record(path)
        if record["benchmark"] in project.corpus.benchmarks:
            one = (step_of(Path(record["checkpoint"])), path.stat().st_mtime_ns, path, record)
            found.setdefault(record["benchmark"], []).append(one)
    return {
        name: [(step, path, record) for step, _, path, record in sorted(ones, key=lambda one: one[:2])]
        for name, ones in sorted(found.items())
    }


def gather(project: Project, run: Run) -> Gathered:
    """Read what the report shows. Raises UpstreamError with what to make first."""
    root, recipe = project.root, run.recipe
    newest: dict[str, Path] = {}
    history: dict[str, list[Scored]] = {}
    for name, ordered in scores_of_run(project, run).items():
        _, newest[name], last = ordered[-1]
        alike = {
            step: (draws_before(recipe.stages, step), record)
            for step, _, record in ordered
            if all(record[key] == last[key] for key in ("rows", "settings"))
        }
        if len(alike) > 1:
            history[name] = list(alike.values())
    if missing := sorted(set(project.corpus.benchmarks) - newest.keys()):
        raise UpstreamError(f"run {run.id} has no scores on {', '.join(missing)}: make 'probes' first")
    others: dict[str, list[Score]] = {name: [] for name in newest}
    for name, encoder in itertools.product(newest, project.corpus.encoders):  # the newest score of each
        paths = Path(root.encoder_probes(encoder)).glob(f"*/{name}/*/score.json")
        if path := max(paths, key=lambda path: path.stat().st_mtime_ns, default=None):
            others[name].append(read_score(str(path)))
    samples = None
    if recipe.losses.flow > 0:
        samples = read_record(f"{root.samples(recipe.name, run.id)}/samples.json")
    return Gathered(
        project,
        run,
        read_record(str(run.folder / RUN_CONFIG)),
        read_events(run.folder),
        [read_score(str(path)) for path in newest.values()],
        history,
        others,
        samples,
        read_facts(project, run),
    )


def build_card(gathered: Gathered, on_progress: OnProgress = silent) -> Card:
    """The report's sections, in order."""
    root, run, data, samples = gathered.project.root, gathered.run, gathered.data, gathered.samples
    side, grid = data.trainset.spec.resolution, grid_of(run.recipe.model)
    makers: list[Callable[[], Section | None]] = [
        lambda: scores.section(gathered.scores, gathered.history, gathered.others) if gathered.scores else None,
        lambda: places_section(gathered.project, gathered.scores, side, grid),
        lambda: training_section(run, gathered.events),
        lambda: samples_section(root.samples(run.recipe.name, run.id), samples) if samples is not None else None,
        lambda: data_section(data),
        lambda: previews_section(data),
        lambda: lineage_section(data, gathered.config),
    ]
    sections = []
    for number, make in enumerate(makers, 1):
        if (section := make()) is not None:
            sections.append(section)
        on_progress(Progress(f"report {run.recipe.name}", number, len(makers)))
    subtitle = SUBTITLE + DEMO if run.recipe.name == "demo" else SUBTITLE
    return Card(f"Model card: {run.recipe.name}", subtitle, _facts(gathered), tuple(sections))


def _facts(gathered: Gathered) -> tuple[tuple[str, str], ...]:
    run, model, masks = gathered.run, gathered.run.recipe.model, gathered.run.recipe.masks
    visible = " and ".join(str(strategy.budget) for strategy in masks.strategies)
    steps = [event for event in gathered.events if event["kind"] == "step"]
    ended = max((event["time_s"] for event in gathered.events), default=0.0)
    facts = [
        ("run", run.id),
        ("finished", datetime.fromtimestamp(ended, UTC).strftime("%d %B %Y, %H:%M UTC")),
        ("steps", f"{run.recipe.steps:,}"),
        ("clips drawn", f"{steps[-1]['draws']:,}" if steps else "unknown"),
        ("encoder", f"{model.encoder.depth} blocks, width {model.encoder.width}, reads {model.encoder.input}"),
        ("tokens per clip", f"{run.recipe.clip_lengths[0] // model.tubelet} × {model.cells}"),
        ("masks", {"all": "none", "fixed": f"{visible} of {model.cells} cells visible"}.get(masks.keep, masks.keep)),
        ("seed", str(run.recipe.seed)),
    ]
    speeds = mean_speeds(gathered.events)
    if speeds:
        facts.append(("time per step", f"{1000 * speeds['step_s']:.0f} ms"))
        facts.append(("waiting for data", f"{100 * speeds['wait_share']:.1f} %"))
    if "mfu" in speeds:
        facts.append(("MFU", f"{100 * speeds['mfu']:.0f} %"))
    return tuple(facts)


def _digest(gathered: Gathered) -> str:
    """Id of what is shown: scores, samples, events, configuration and data."""
    root, run = gathered.project.root, gathered.run
    shown = {
        "version": GRAPH["report"].version,
        "scores": {score.benchmark: digest_bytes(atomic.read_bytes(score.path)) for score in gathered.scores},
        "history": gathered.history,
        "others": {name: [other.record for other in found] for name, found in gathered.others.items()},
        "events": digest_bytes((run.folder / "events.jsonl").read_bytes()),
        "config": digest_bytes((run.folder / RUN_CONFIG).read_bytes()),
        "duplicates": gathered.data.record["duplicates"],
    }
    if gathered.samples is not None:
        path = f"{root.samples(run.recipe.name, run.id)}/samples.json"
        shown["samples"] = digest_bytes(atomic.read_bytes(path))
    return digest(shown)
