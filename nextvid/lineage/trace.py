"""Lineage: from a run, checkpoint or score down to files, and from a file up to the runs and scores that used it.

The record of lineage is config.json, trainset.json, lineage.parquet and score.json; there is no other. A run used
a file if its trainset has rows of it, a score if it was computed on them; single draws follow from (seed, draw number)
and are printed by `nextvid draws`.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import polars as pl

from nextvid.config.project import Project
from nextvid.plain_text import in_markdown, printable
from nextvid.trainset.pixels import frozen_pixels
from nextvid.trainset.trainset import Trainset
from storage import atomic, listing
from storage.errors import ConfigError, DamagedError, NExTVidError
from storage.records import read_record
from storage.root import RUN_CONFIG, DataRoot
from storage.schemas import Clips, Media, ProbeRows
from storage.tables import read_table, read_tables

Kind = Literal["run", "checkpoint", "score", "trainset", "file"]


@dataclass(frozen=True)
class RunFacts:
    """A run, from its config.json."""

    recipe: str
    run: str
    recipe_digest: str
    trainset: str
    mask_plan: str
    overrides: tuple[str, ...]
    folder: str
    init: str | None = None  # the run, or the folder, that its weights start from


@dataclass(frozen=True)
class DatasetShare:
    """What one dataset, or one batch of it, contributes to a trainset."""

    name: str
    weight: float | None
    files: int
    clips: int
    rows: int


@dataclass(frozen=True)
class ScoreFacts:
    """A score and, where a file is traced, the file's clips by split."""

    path: str
    recipe: str
    run: str
    benchmark: str
    rows: str
    clips: dict[str, int]


@dataclass(frozen=True)
class MediaFacts:
    """One revision of a file, and how many clips and rows were made of it."""

    uri: str
    media_id: str | None
    status: str
    reason: str | None
    clips: int
    rows: int
    split: str | None


@dataclass(frozen=True)
class TrainsetFacts:
    """A trainset and how much of what is traced it holds."""

    digest: str
    encoding_spec: str
    rows: int


@dataclass(frozen=True)
class Trace:
    """What was found, downwards (runs to files) or upwards (a file to runs).

    `sources` are runs that `runs` started from, and those that these did; `started` are runs that started from them.
    """

    what: str
    kind: Kind
    runs: tuple[RunFacts, ...] = ()
    sources: tuple[RunFacts, ...] = ()
    started: tuple[RunFacts, ...] = ()
    scores: tuple[ScoreFacts, ...] = ()
    trainsets: tuple[TrainsetFacts, ...] = ()
    datasets: tuple[DatasetShare, ...] = ()
    batches: tuple[DatasetShare, ...] = ()
    media: tuple[MediaFacts, ...] = ()
    every_file: str | None = None  # the table of all files

    def text(self) -> str:
        """As text: one line for each fact, indented under its kind."""
        lines = [printable(f"{self.kind} {self.what}")]
        for title, facts in (
            ("media", self.media),
            ("run", self.runs),
            ("source", self.sources),
            ("started", self.started),
            ("score", self.scores),
            ("trainset", self.trainsets),
            ("dataset", self.datasets),
            ("batch", self.batches),
        ):
            for fact in facts:
                fields = "  ".join(f"{key}={_short(value)}" for key, value in asdict(fact).items() if value is not None)
                lines.append(printable(f"  {title:8} {fields}"))
        if self.every_file:
            lines.append(f"  every file: {self.every_file}")
        return "\n".join(lines)

    def markdown(self) -> str:
        """As Markdown for the UI, without single batches: they are many, and the command line lists them."""
        lines = [f"{self.kind} {in_markdown(self.what)}", ""]
        for facts in self.runs:
            overrides = f", overrides {in_markdown(_short(facts.overrides))}" if facts.overrides else ""
            lines.append(f"- run `{facts.run}` of recipe {facts.recipe}{overrides}, mask plan `{facts.mask_plan}`")
        lines += [
            f"- it started from run `{f.run}` of recipe {f.recipe}, trainset `{f.trainset}`" for f in self.sources
        ]
        lines += [f"- run `{f.run}` of recipe {f.recipe} started from it" for f in self.started]
        lines += [f"- trainset `{t.digest}`: {t.rows} rows, encoding `{t.encoding_spec}`" for t in self.trainsets]
        lines += [f"- score on {s.benchmark}, clips {_short(s.clips)}: {in_markdown(s.path)}" for s in self.scores]
        if self.datasets:
            lines += ["", "| dataset | weight | files | clips | rows |", "|---|---|---|---|---|"]
            lines += [f"| {d.name} | {d.weight or 0:.3g} | {d.files} | {d.clips} | {d.rows} |" for d in self.datasets]
        if self.every_file:
            command = f"on the command line: nextvid lineage {in_markdown(self.what)}"
            lines += ["", f"Every file: {in_markdown(self.every_file)}; {command}"]
        return "\n".join(lines)


def trace(project: Project, what: str) -> Trace:
    """Trace a run id, run or checkpoint folder, score.json, trainset digest, media id or file.

    Downwards: to trainset, datasets, batches and the table of files. Upwards: from a trainset to its runs, from a run
    to its scores, from a file to all of them.

    Raises ConfigError for an unknown name.
    """
    root = project.root
    path = Path(what)
    if path.name == "score.json" and path.is_file():
        score = _score_facts(path)
        if score.recipe in project.corpus.encoders:  # trained elsewhere
            return Trace(str(path), "score", scores=(score,))
        run = _run_facts(Path(root.run(score.recipe, score.run)))
        return _down(root, str(path), "score", (run,), (score,))
    for folder in (path, *path.parents[:2]):  # checkpoints/step_n and encoder/ are inside the run's folder
        if (folder / RUN_CONFIG).is_file() and folder.parent.parent.name == "pretrain":
            kind: Kind = "run" if folder == path else "checkpoint"
            facts = _run_facts(folder)
            return _down(root, what, kind, (facts,), _scores_of_runs(root, {facts.run}))
    for facts in runs_of(root):
        if facts.run == what:
            return _down(root, what, "run", (facts,), _scores_of_runs(root, {what}))
    if what in trainsets_of(root):
        runs = tuple(facts for facts in runs_of(root) if facts.trainset == what)
        return _down(root, what, "trainset", runs, _scores_of_runs(root, {facts.run for facts in runs}), what)
    return _of_file(project, what)


def runs_of(root: DataRoot) -> Iterator[RunFacts]:
    """Every run that has begun, by recipe and id."""
    for config in sorted(Path(root.runs_url, "pretrain").glob(f"*/*/{RUN_CONFIG}")):
        yield _run_facts(config.parent)


def scores_of(root: DataRoot) -> Iterator[Path]:
    """Every score.json, with those that have no step in their path (storage/root.py)."""
    folder = Path(root.runs_url, "probes")
    yield from sorted([*folder.glob("*/*/*/*/score.json"), *folder.glob("*/*/*/*/*/score.json")])


def score_record(path: Path) -> dict[str, Any]:
    """What a score.json says. DamagedError where it was changed, or is that of another run, encoder or benchmark."""
    remedy = f"remove the folder {path.parent} and make 'probes' again"
    record = read_record(str(path), remedy)
    run, benchmark = record.get("run"), record.get("benchmark")
    if not {"encoders", "rows"} <= record.keys() or not {str(run), str(benchmark)} <= {*path.absolute().parts}:
        raise DamagedError(f"{path} is the score of {run} on {benchmark}; {remedy}")
    return record


def trainsets_of(root: DataRoot) -> list[str]:
    """Digests of every trainset."""
    folder = f"{root.url}/trainset"
    names = listing.folders(folder, r"[0-9a-f]{32}")
    return [name for name in names if atomic.exists(f"{folder}/{name}/trainset.json")]


def damaged_trainsets(root: DataRoot, *, quick: bool = False) -> list[str]:
    """What is wrong with each trainset whose files were changed or whose shards are missing, one message each.

    With `quick`, bytes of addresses and lineage are not read.
    """
    found = []
    for digest in listing.folders(f"{root.url}/trainset", r"[0-9a-f]{32}"):
        try:
            trainset = Trainset.open(root, digest)
            if not quick:
                trainset.check()
                trainset.lineage()
            found += trainset.gone()
            for pixels in frozen_pixels(root, trainset):
                if not quick:
                    pixels.check()
                found += pixels.gone()
        except NExTVidError as error:
            found.append(str(error))
    return found


def shares(lineage: pl.DataFrame, by: str, weights: dict[str, float]) -> tuple[DatasetShare, ...]:
    """Files, clips and rows of a trainset by dataset or by batch."""
    counted = lineage.group_by(by).agg(
        pl.col("uri").n_unique().alias("files"), pl.col("clip_id").n_unique().alias("clips"), pl.len().alias("rows")
    )
    return tuple(
        DatasetShare(name, weights.get(name), files, clips, rows)
        for name, files, clips, rows in counted.sort(by).iter_rows()
    )


def licences_of(project: Project, lineage: pl.DataFrame) -> dict[str, str]:
    """Licences of a trainset's files by dataset, as tables and corpus.yaml have them, with files of each."""
    found, here = dict[str, str](), set(project.root.batches("media"))
    for dataset in lineage["dataset"].unique().sort():
        if (config := project.corpus.datasets.get(dataset)) is None:
            found[dataset] = "no longer configured"
            continue
        rows = lineage.filter(pl.col("dataset") == dataset)
        batches = [batch for batch in rows["batch"].unique().sort() if batch in here]
        if config.labels.licence_column is None or not batches:
            found[dataset] = config.licence
            continue
        media = read_tables(project.root, "media", batches, Media).unique("media_id")
        used = media.join(rows, on="media_id", how="semi").group_by("licence").len()
        ordered = used.sort("len", "licence", descending=[True, False]).iter_rows()
        found[dataset] = ", ".join(f"{licence} ({count:,} file{'s' * (count != 1)})" for licence, count in ordered)
    return found


def _down(
    root: DataRoot,
    what: str,
    kind: Kind,
    runs: tuple[RunFacts, ...],
    scores: tuple[ScoreFacts, ...],
    digest: str | None = None,
) -> Trace:
    trainset = Trainset.open(root, digest or runs[0].trainset)
    lineage = trainset.lineage()
    known, found = {facts.run: facts for facts in runs_of(root)}, list(runs)
    for facts in found:  # what these runs started from, and what those did, the nearest first: the list grows meanwhile
        source = known.get(facts.init or "")
        if source is not None and source not in found:
            found.append(source)
    return Trace(
        what,
        kind,
        runs=runs,
        sources=tuple(found[len(runs) :]),
        started=_started(root, runs),
        scores=scores,
        trainsets=(TrainsetFacts(trainset.digest, trainset.spec.digest(), lineage.height),),
        datasets=shares(lineage, "dataset", trainset.weights),
        batches=shares(lineage, "batch", {}),
        every_file=f"{root.pointed('trainset', trainset.digest)}/lineage.parquet",
    )


def _of_file(project: Project, what: str) -> Trace:
    root = project.root
    media = read_tables(root, "media", None, Media)
    named = pl.col("uri").is_in([what, str(Path(what).absolute())])
    found = media.filter(named | (pl.col("media_id").bin.encode("hex") == what))
    if found.is_empty():
        raise ConfigError(
            f"'{what}' is no run, checkpoint, score.json, trainset, media id or file that {project.path} knows; "
            "a file is known once 'media' has been made for its batch"
        )
    ids = found["media_id"].drop_nulls().unique()
    clips = read_tables(root, "clips", None, Clips).filter(pl.col("media_id").is_in(ids.implode()))
    holding, scores = {}, []
    for digest in trainsets_of(root):
        trainset = Trainset.open(root, digest)
        if rows := trainset.lineage().filter(pl.col("media_id").is_in(ids.implode())).height:
            holding[digest] = TrainsetFacts(digest, trainset.spec.digest(), rows)
    for path in scores_of(root):
        scored = read_table(str(path.with_name("rows.parquet")), ProbeRows)
        own = scored.filter(pl.col("media_id").is_in(ids.implode())).unique("sample")
        if own.height:
            scores.append(_score_facts(path, dict(own.group_by("split").len().sort("split").rows())))
    runs = tuple(run for run in runs_of(root) if run.trainset in holding)
    return Trace(
        what,
        "file",
        runs=runs,
        started=_started(root, runs),
        scores=tuple(scores),
        trainsets=tuple(holding.values()),
        media=tuple(_media_facts(row, clips) for row in found.iter_rows(named=True)),
    )


def _started(root: DataRoot, runs: tuple[RunFacts, ...]) -> tuple[RunFacts, ...]:
    """Runs that started from these, and those that started from them: they have seen what these have seen."""
    every, names, found = list(runs_of(root)), {facts.run for facts in runs}, []
    while new := [facts for facts in every if facts.init in names and facts.run not in names]:
        found += new
        names |= {facts.run for facts in new}
    return tuple(found)


def _scores_of_runs(root: DataRoot, runs: set[str]) -> tuple[ScoreFacts, ...]:
    found = (_score_facts(path) for path in scores_of(root))
    return tuple(facts for facts in found if facts.run in runs)


def _media_facts(row: dict[str, Any], clips: pl.DataFrame) -> MediaFacts:
    own = clips.filter(pl.col("media_id").eq_missing(pl.lit(row["media_id"], pl.Binary)) & (pl.col("status") == "ok"))
    return MediaFacts(
        uri=row["uri"],
        media_id=row["media_id"].hex() if row["media_id"] else None,
        status=row["status"],
        reason=row["reason"],
        clips=own["clip_id"].n_unique(),
        rows=own["row_id"].n_unique(),
        split=own["split"][0] if own.height else None,
    )


def _run_facts(folder: Path) -> RunFacts:
    record = read_record(str(folder / RUN_CONFIG))
    return RunFacts(
        recipe=record["recipe"]["name"],
        run=record["run"],
        recipe_digest=record["recipe_digest"],
        trainset=record["trainset"],
        mask_plan=record["mask_plan"],
        overrides=tuple(record["overrides"]),
        folder=str(folder),
        init=None if not (source := record.get("init")) else source["run"] or source["folder"],
    )


def _score_facts(path: Path, clips: dict[str, int] | None = None) -> ScoreFacts:
    record = score_record(path)
    return ScoreFacts(
        path=str(path),
        recipe=record["recipe"],
        run=record["run"],
        benchmark=record["benchmark"],
        rows=record["rows"],
        clips=record["clips"] if clips is None else clips,
    )


def _short(value: object) -> str:
    match value:
        case dict():
            return ",".join(f"{key}:{item}" for key, item in value.items())
        case tuple():
            return ",".join(str(item) for item in value) or "none"
        case _:
            return str(value)
