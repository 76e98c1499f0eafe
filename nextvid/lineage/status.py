"""The state of a project on one screen: datasets, trainset, runs, scores, what is broken, and what to do next.

Everything is read from tables, checks and runs; nothing is made and no media file is opened.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nextvid.config.project import Project
from nextvid.corpus.labels import readable_labels
from nextvid.lineage.trace import runs_of, score_record, scores_of
from nextvid.making.batches import BatchAsset, batch_state, dataset_of
from nextvid.making.progress import OnProgress, Progress, silent
from nextvid.making.publishing import read_latest
from nextvid.plain_text import printable
from nextvid.planning.acceptance import difference, outdated
from nextvid.planning.waiting import Standard, left_behind, standard, waiting
from nextvid.train.run import open_run
from nextvid.trainset.trainset import Trainset
from storage import atomic
from storage.errors import NExTVidError
from storage.locks import is_locked, lock_fault
from storage.schemas import Clips, Media
from storage.tables import read_table

NAMED = 5  # our choice: lines of one kind, of those that are broken
MADE: tuple[BatchAsset, ...] = ("media", "shots", "clips", "latents")


@dataclass(frozen=True)
class DatasetStatus:
    """One dataset's batches; `files` and `clips` by status, `waiting` batches by reason."""

    dataset: str
    batches: int
    complete: int  # batches that need nothing
    files: Mapping[str, int]
    clips: Mapping[str, int]
    waiting: Mapping[str, int]

    def line(self) -> str:
        """One line for people."""
        line = f"{self.dataset}: {self.complete} of {self.batches} batches complete"
        for what, counts in (("files", self.files), ("clips", self.clips)):
            if counts:
                bad = ", ".join(f"{count:,} {status}" for status, count in sorted(counts.items()) if status != "ok")
                line += f"; {counts.get('ok', 0):,} {what}" + (f" ({bad})" if bad else "")
        return line + "".join(f"\n      {count} waiting: {printable(why)}" for why, count in self.waiting.items())


@dataclass(frozen=True)
class RunStatus:
    """One run: its last checkpoint, and the accuracy of its EMA encoder by benchmark."""

    recipe: str
    run: str
    trainset: str
    step: int
    steps: int
    state: str  # complete, training or stopped
    scores: Mapping[str, float]

    def line(self) -> str:
        """One line for people."""
        scores = ", ".join(f"{name} {accuracy:.3f}" for name, accuracy in self.scores.items())
        return f"{self.recipe} {self.run}: {self.state}, {self.step:,} of {self.steps:,} steps" + (
            f"; {scores}" if scores else ""
        )


@dataclass(frozen=True)
class Status:
    """What exists, what is broken, and the next command."""

    corpus: str
    root: str
    datasets: tuple[DatasetStatus, ...]
    trainset: str | None  # digest of the newest
    rows: int  # of that one
    not_in_trainset: int  # complete batches that it lacks
    runs: tuple[RunStatus, ...]
    broken: tuple[str, ...]
    next: str

    def text(self) -> str:
        """The screen, for people."""
        lines = [f"project {self.corpus}, data in {self.root}", "datasets"]
        lines += [f"  {dataset.line()}" for dataset in self.datasets]
        lines.append("trainset")
        newer = f"; {self.not_in_trainset} complete batches are not in it" if self.not_in_trainset else ""
        lines.append(f"  {self.trainset}: {self.rows:,} rows{newer}" if self.trainset else "  none yet")
        lines += ["runs", *([f"  {run.line()}" for run in self.runs] or ["  none yet"])]
        if self.broken:
            shown = self.broken[:NAMED]
            more = [f"  and {len(self.broken) - NAMED} more"] if len(self.broken) > NAMED else []
            lines += ["broken", *(f"  {printable(line)}" for line in shown), *more]
        return "\n".join([*lines, f"next: {self.next}"])


def read_status(project: Project, on_progress: OnProgress = silent) -> Status:
    """The state of a project, from its files. Raises CorpusError or TableError for a damaged pointer or trainset."""
    labels, unreadable = readable_labels(project.corpus.datasets)
    batches, reasons = project.root.batches(), dict[str, str]()
    broken, found = list(unreadable.values()), list[DatasetStatus]()
    broken += [fault] if (fault := lock_fault(project.root.accepted())) else []
    against: Standard | None = None
    try:
        against = standard(project, labels)
    except NExTVidError as error:  # such as an autoencoder that is not there: the rest can be shown
        broken.append(str(error))
    if against is not None:
        judged = waiting(against)
        away = {batch: "its label files cannot be read" for batch in batches if dataset_of(batch) in unreadable}
        reasons = {**judged.reasons, **away}
        broken += judged.errors
    for dataset in sorted(project.corpus.datasets):
        of_dataset = [batch for batch in batches if dataset_of(batch) == dataset]
        on_progress(Progress(f"status {dataset}", len(found), len(project.corpus.datasets)))
        found.append(_dataset(project, dataset, of_dataset, reasons))
        if against is not None:
            broken += [line for batch in of_dataset for line in _failed(against, batch)]
    digest = read_latest(project.root, "trainset")
    trainset = Trainset.open(project.root, digest) if digest else None
    complete = {batch for batch in batches if batch not in reasons and dataset_of(batch) in labels}
    runs = tuple(_runs(project))
    lacking = len(complete - set(trainset.batches)) if trainset else 0
    return Status(
        corpus=str(project.path),
        root=project.root.url,
        datasets=tuple(found),
        trainset=digest,
        rows=sum(len(trainset.rows(frames)) for frames in trainset.lengths) if trainset else 0,
        not_in_trainset=lacking,
        runs=runs,
        broken=(*broken, *left_behind(project)),
        next="correct what is broken first"
        if against is None
        else _next(project, bool(reasons) or not batches, trainset is not None and not lacking, runs),
    )


def _dataset(project: Project, dataset: str, batches: Sequence[str], reasons: Mapping[str, str]) -> DatasetStatus:
    counts: dict[str, Counter[str]] = {"media": Counter(), "clips": Counter()}
    for batch in batches:
        for noun, schema in (("media", Media), ("clips", Clips)):
            path = project.root.table(noun, batch)  # type: ignore[arg-type]
            if atomic.exists(path):
                by_status = read_table(path, schema).group_by("status").len()
                counts[noun].update(dict(by_status.iter_rows()))
    waits = [reasons[batch] for batch in batches if batch in reasons]
    why = dict(Counter(waits).most_common(NAMED))
    return DatasetStatus(
        dataset, len(batches), len(batches) - len(waits), dict(counts["media"]), dict(counts["clips"]), why
    )


def _failed(against: Standard, batch: str) -> list[str]:
    """A line for each blocking check that failed."""
    state = batch_state(against.project.root, batch, *MADE, encoding=against.spec.digest())
    return [
        f"{asset} {batch}: check {check['name']} failed" + (f": {why}" if (why := check["description"]) else "")
        for asset in state.failed
        for check in (state.checks[asset] or {})["checks"]
        if check["blocking"] and not check["passed"]
    ]


def _runs(project: Project) -> list[RunStatus]:
    """Every run that has begun, the newest checkpoint last."""
    scores: dict[str, dict[str, float]] = {}
    for path in scores_of(project.root):
        record = score_record(path)
        if "ema" in record["encoders"]:  # a run's: not of an encoder that others trained
            scores.setdefault(record["run"], {})[record["benchmark"]] = record["encoders"]["ema"]["accuracy"]
    found = []
    for facts in runs_of(project.root):
        run = open_run(Path(facts.folder))
        training = is_locked(f"{facts.folder}/lock")
        state = "complete" if run.complete else "training" if training else "stopped"
        step = run.newest_step() or 0
        of_run = dict(sorted(scores.get(run.id, {}).items()))
        found.append(RunStatus(run.recipe.name, run.id, run.trainset, step, run.recipe.steps, state, of_run))
    return found


def _next(project: Project, waits: bool, current: bool, runs: Sequence[RunStatus]) -> str:
    """The command that brings the project on."""
    if names := outdated(project):
        return f"nextvid plan    ({difference(names)}; 'nextvid plan --accept' accepts it)"
    if waits:
        return "nextvid make latents"
    if not current:
        return "nextvid make trainset"
    if not runs:
        return "nextvid make report --recipe demo    (or another recipe: docs/recipes.md)"
    if stopped := [run for run in runs if run.state == "stopped"]:
        return f"nextvid make pretrain --recipe {stopped[0].recipe}    (run {stopped[0].run} goes on)"
    ended = [run for run in runs if run.state == "complete"]
    lacks = [run for run in ended if project.corpus.benchmarks.keys() - run.scores.keys()]
    if lacks:
        return f"nextvid make report --recipe {lacks[-1].recipe} --run {lacks[-1].run}"
    return "nothing: all is made" if ended else "wait for the training"
