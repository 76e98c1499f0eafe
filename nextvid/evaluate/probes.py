"""The asset `probes`: accuracies of frozen encoders on each benchmark: a run's, or one that corpus.yaml names.

A run's are its averaged and its online encoder, beside its own random initialisation. They are scored in child
processes under torchrun, as runs are trained (nextvid/train/node.py): `make_probes` does all of it, Dagster's asset
calls `prepare_probes` and `finish_probes` and starts the children itself. What they write:
nextvid/evaluate/compute.py.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from nextvid.config.benchmarks import FLOORS, BenchmarkConfig
from nextvid.config.overrides import apply_how
from nextvid.config.project import Project
from nextvid.config.recipe import ExecutionConfig
from nextvid.encode.plan import accepted_spec, pixel_spec
from nextvid.evaluate.attentive import ProbeSettings, probe_settings
from nextvid.evaluate.benchmark_rows import BenchmarkRows, benchmark_rows, refuse_unlearnable
from nextvid.evaluate.encoders import encoder_digest, encoder_width, frames_of
from nextvid.evaluate.features import level_blocks
from nextvid.evaluate.scoring import KNN, Task
from nextvid.machine import available_cores, device_of, workers
from nextvid.making.batches import dataset_of
from nextvid.making.outcome import Number, Outcome
from nextvid.making.progress import OnProgress, noting, silent
from nextvid.making.publishing import read_latest
from nextvid.train.checkpoint import step_of
from nextvid.train.node import PreparedRun, carry_out, torchrun
from nextvid.train.run import Run, find_checkpoint, find_run
from nextvid.trainset.pixels import open_pixels
from nextvid.trainset.trainset import Trainset
from storage import atomic, tables
from storage.digest import digest_config
from storage.errors import DamagedError, RefusedError, UpstreamError
from storage.records import read_record
from storage.schemas import Clips, Duplicates, Labels
from storage.spec import EncodingSpec, PixelSpec
from storage.store import LatentStore, PixelStore

RANK_CORES = 2  # our measurement on the demo, two cores: 108 s by a rank of two threads, 181 s by two of one


@dataclass(frozen=True)
class Planned:
    """What is scored, before anything is computed: a run's checkpoint, or an encoder of corpus.yaml."""

    name: str  # recipe, or encoder
    identity: str  # id of the run, or digest of the encoder
    run: Run | None
    checkpoint: Path | None
    tasks: Mapping[str, Task]  # by benchmark
    folder: str  # of all scores of the run or encoder
    folders: Mapping[str, str]  # of each score

    @property
    def missing(self) -> list[str]:
        """Benchmarks that have no score yet."""
        return [name for name, folder in self.folders.items() if not atomic.exists(f"{folder}/score.json")]


def make_probes(
    project: Project,
    recipe: str,
    run: str | None = None,
    benchmarks: Sequence[str] = (),
    on_progress: OnProgress = silent,
    step: int | None = None,
    how: Sequence[str] = (),
) -> Outcome:
    """Score the encoders of a run, or the encoder of corpus.yaml called `recipe`, on these benchmarks, else on all.

    `plan_probes` says of which checkpoint; `how` changes `default_how`. Where score.json exists, nothing is computed.
    The data version is of the run or encoder and of all that the scores depend on.
    """
    started = time.perf_counter()
    planned = plan_probes(project, recipe, run, benchmarks, step)
    made = bool(planned.missing)
    if made:
        prepared = prepare_probes(project, planned, apply_how(default_how(project, planned), how))
        carry_out(prepared, noting(on_progress, f"probes {recipe}"))
    return finish_probes(planned, made=made, seconds=time.perf_counter() - started)


def plan_probes(
    project: Project, recipe: str, run: str | None = None, benchmarks: Sequence[str] = (), step: int | None = None
) -> Planned:
    """Decide from tables what is scored, and of which checkpoint: that of `step`, else the newest.

    A run that is named need not have ended. Raises ConfigError for an unknown benchmark, UpstreamError where run,
    checkpoint, rows or labels are missing.
    """
    root, names = project.root, sorted(benchmarks or project.corpus.benchmarks)
    if recipe in project.corpus.encoders:
        if not benchmarks and project.corpus.encoders[recipe].family in FLOORS:
            names = [name for name in names if project.benchmark(name).finetune is None]
        identity = encoder_digest(project.corpus.encoders[recipe])
        tasks = {name: plan_encoder(project, name, recipe) for name in names}
        folders = {name: root.encoder_probe(recipe, identity, name, task.digest()) for name, task in tasks.items()}
        folder = f"{root.encoder_probes(recipe)}/{identity}"
        return Planned(recipe, identity, None, None, tasks, folder, folders)
    found = find_run(project, recipe, run, ended=run is None)
    checkpoint = find_checkpoint(found, step)
    tasks = {name: plan_task(project, name, found) for name in names}
    at = step_of(checkpoint)
    folders = {name: root.probe(recipe, found.id, at, name, task.digest()) for name, task in tasks.items()}
    return Planned(recipe, found.id, found, checkpoint, tasks, root.probes(recipe, found.id), folders)


def default_how(project: Project, planned: Planned) -> ExecutionConfig:
    """How scores are computed where nobody says it: on a CPU by a rank for every RANK_CORES cores, else by one."""
    device = project.corpus.execution.device
    if device_of(device) != "cpu":
        return ExecutionConfig(device=device)
    batch = min(task.settings.batch for task in planned.tasks.values())  # which ranks share
    return ExecutionConfig(
        device=device, ranks=workers(batch, available_cores(project.corpus.execution.cores) // RANK_CORES)
    )


def prepare_probes(project: Project, planned: Planned, how: ExecutionConfig) -> PreparedRun:
    """The command that computes the scores that are missing, in a folder that is there."""
    atomic.make_folder(Path(planned.folder))
    arguments = ["--recipe", planned.name, "--device", how.device, "--threads", str(how.threads)]
    if planned.run is not None and planned.checkpoint is not None:
        arguments += ["--run", planned.identity, "--checkpoint", str(step_of(planned.checkpoint))]
    arguments += ["--benchmarks", *planned.tasks]
    return PreparedRun(
        planned.identity,
        planned.run.trainset if planned.run is not None else "",
        planned.folder,
        torchrun("nextvid.evaluate", how, project, arguments),
        not planned.missing,
        how,
        "probes",
        project.corpus.execution.cores,
    )


def finish_probes(planned: Planned, *, made: bool, seconds: float) -> Outcome:
    """What the scores say. Raises UpstreamError where one is missing."""
    rows, size_bytes = 0, 0
    numbers: dict[str, Number] = {"encoder": planned.identity}
    if planned.run is not None and planned.checkpoint is not None:
        numbers = {"trainset": planned.run.trainset, "step": step_of(planned.checkpoint)}
    left_out: Counter[str] = Counter()
    for benchmark, folder in planned.folders.items():
        path = f"{folder}/score.json"
        written = atomic.read_bytes(path)
        remedy = f"remove the folder {folder} and make 'probes' again"
        score = read_record(path, remedy)
        if (score.get("run"), score.get("benchmark")) != (planned.identity, benchmark):
            raise DamagedError(f"{path} is not the score of {planned.identity} on {benchmark}: {remedy}")
        rows += score["clips"]["test"]
        size_bytes += len(written)
        numbers[f"{benchmark}_score"] = path
        left_out.update(score["left_out"])
        for name, values in score["encoders"].items():
            told = [what for what in ("accuracy", *KNN.values()) if what in values]
            numbers |= {f"{benchmark}_{name}_{what}": values[what] for what in told}
    numbers |= {"dropped": left_out.total()} | {f"dropped_{why}": count for why, count in left_out.items() if count}
    scores = {name: task.digest() for name, task in planned.tasks.items()}
    return Outcome(
        asset="probes",
        partition=planned.name,
        made=made,
        rows=rows,
        size_bytes=size_bytes,
        seconds=seconds,
        digest=digest_config({"run": planned.identity, "scores": scores}),
        run=None if planned.run is None else planned.identity,
        numbers=numbers,
    )


def plan_task(project: Project, benchmark: str, found: Run) -> Task:
    """Rows, labels, settings and seeds of one score of a run, from tables alone.

    Raises RefusedError where clips, levels or heads do not fit the encoder.
    """
    trainset, encoder, config = (
        Trainset.open(project.root, found.trainset), found.recipe.model.encoder, project.benchmark(benchmark)
    )  # fmt: skip
    level_blocks(encoder.depth, config.levels)
    if config.policy.frames > 1 and config.policy.frames % found.recipe.model.tubelet:
        raise RefusedError(
            f"benchmark '{benchmark}' has clips of {config.policy.frames} frames, which are no whole tubelets of the "
            f"{found.recipe.model.tubelet} frames of recipe {found.recipe.name}: change 'frames' in its policy"
        )
    pixels = None
    if encoder.input == "pixels":
        assert found.pixels is not None, f"run {found.id} reads pixels and names none"
        pixels = open_pixels(project.root, trainset, found.pixels).spec
    return _task(project, benchmark, trainset.spec, pixels, encoder.width, trainset)


def plan_encoder(project: Project, benchmark: str, name: str) -> Task:
    """The same of an encoder of corpus.yaml, which reads accepted pixels, or the newest trainset's latents.

    Raises RefusedError where the rows have no pixels, or clips, levels or heads do not fit the encoder.
    """
    config, encoder = project.benchmark(benchmark), project.corpus.encoders[name]
    if config.finetune is not None and encoder.family in FLOORS:
        raise RefusedError(
            f"benchmark '{benchmark}' trains the encoder, and '{name}' is computed without weights: probe it on others"
        )
    trainset = Trainset.open(project.root) if encoder.family == "latents" else None
    spec = accepted_spec(project) if trainset is None else trainset.spec
    frames_of(encoder, config.policy.frames, config.levels)
    pixels = None
    if trainset is None:
        pixels = pixel_spec(project, spec)
        if pixels is None:
            raise RefusedError(
                f"encoder '{name}' reads pixels, and the rows of benchmark '{benchmark}' have none: put 'pixels: "
                f"{{quality: 90}}' under 'encoding' in {project.path}, make 'latents' again, then ask again"
            )
    return _task(project, benchmark, spec, pixels, encoder_width(encoder, spec.channels), trainset)


def _task(
    project: Project, benchmark: str, spec: EncodingSpec, pixels: PixelSpec | None, width: int,
    trainset: Trainset | None,
) -> Task:  # fmt: skip
    config = project.benchmark(benchmark)
    settings = probe_settings(width, "latents" if pixels is None else "pixels", config)
    if width % settings.heads:
        raise RefusedError(
            f"{settings.heads} heads of attention cannot share an encoder's width of {width}: set 'attention_heads' of "
            f"benchmark '{benchmark}'"
        )
    store = LatentStore(project.root, spec) if pixels is None else PixelStore(project.root, pixels)
    rows = _rows(store, benchmark, config, settings)
    refuse_unlearnable(rows, config)
    return Task(spec, config, settings, rows, pixels, trainset)


def _rows(
    store: LatentStore | PixelStore, name: str, config: BenchmarkConfig, settings: ProbeSettings
) -> BenchmarkRows:
    """The benchmark's rows from the tables of its datasets and the commits of what the encoder reads."""
    root = store.root
    batches = [batch for batch in root.batches("clips") if dataset_of(batch) in config.datasets]
    if not batches:
        raise UpstreamError(f"benchmark '{name}': no clips of {', '.join(config.datasets)} yet; make 'latents' first")
    commits = pl.concat([store.commits(batch) for batch in batches])
    clips = tables.read_tables(root, "clips", batches, Clips)
    labels = tables.read_tables(root, "labels", batches, Labels)
    digest = read_latest(root, "duplicates")
    if digest is None:
        raise UpstreamError(f"benchmark '{name}': near-duplicates are unknown; make 'duplicates' first")
    duplicates = tables.read_table(f"{root.pointed('duplicates', digest)}/duplicates.parquet", Duplicates)
    every_view = settings.augment != "none"  # else features are kept, and do not change from epoch to epoch
    return benchmark_rows(name, config, clips, labels, duplicates, commits, settings.held_out, every_view)
