"""Make an asset and what it lacks upstream, without Dagster: the same makers write the same files."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace

from nextvid.config.benchmarks import Family
from nextvid.config.overrides import apply_how, apply_overrides
from nextvid.config.project import Project
from nextvid.config.recipe import ExecutionConfig, On
from nextvid.graph import BY_BATCH, GRAPH, Asset, chain, maker
from nextvid.machine import available_cores
from nextvid.making.batches import dataset_of
from nextvid.making.outcome import Outcome, detail
from nextvid.making.progress import OnProgress, Progress, silent
from nextvid.train.sinks import refuse_missing
from storage.errors import ConfigError, CorpusError, LabelError, UpstreamError

# Assets of which several batches are made at once. Encoding is not one: a batch's autoencoder fills CPU or GPUs.
SIDE_BY_SIDE = ("media", "shots", "clips")


@dataclass(frozen=True)
class Request:
    """What to make. Without a batch or benchmark: all of them. A named trainset or run is taken as it is."""

    asset: Asset
    batch: str | None = None
    recipe: str | None = None
    benchmark: str | None = None
    overrides: tuple[str, ...] = ()
    how: tuple[str, ...] = ()
    ranks: int | None = None
    repeat: int = 0
    trainset: str | None = None
    run: str | None = None
    checkpoint: int | None = None
    on: On = "here"
    on_progress: OnProgress = field(default=silent, compare=False)


def make(project: Project, request: Request) -> Iterator[Outcome]:
    """Make the asset and whatever it lacks upstream; yields outcomes as they are known, of batches in any order.

    A batch that fails does not stop the other batches, nor does a dataset whose folder or label files cannot be read:
    it stays as it is. What reads all batches decides which of them it can use, and needs no media files: it takes those
    of such a dataset as the root holds them, so a machine with tables and stores alone can train and probe. Raises
    UpstreamError where a blocking check of anything else failed; at the end, where a batch did not get as far as the
    asset, UpstreamError, or CorpusError where only label files and folders are to blame; CorpusError where no dataset
    holds a file, or one that the root holds nothing of cannot be read; ConfigError for an unknown batch, recipe or
    benchmark.
    """
    from nextvid.video.probe import decord_installed  # here, since the command line needs no FFmpeg for its help

    _refuse_names(project, request)
    if "media" in steps(request) and not decord_installed():
        note = "decord is not installed, as on platforms that it has no wheel for: PyAV reads all videos"
        request.on_progress(Progress("media", 0, 0, note=note))
    stopped: dict[str, UpstreamError | LabelError] = {}  # batch -> why
    unreadable: Mapping[str, str] = {}  # dataset -> why
    for name in steps(request, _others(project, request)):
        left = [
            key
            for key in partitions(project, name, request)
            if key not in stopped and not (name in BY_BATCH and dataset_of(str(key)) in unreadable)
        ]
        for key, found in _made(project, name, left, request):
            why: UpstreamError | LabelError | None
            match found:
                case Outcome():
                    yield found
                    failed = [check for check in found.checks if check.blocking and not check.passed]
                    listed = ", ".join(f"{check.name} ({detail(check)})" for check in failed)
                    why = UpstreamError(f"{found.asset}: blocking checks failed: {listed}") if failed else None
                    if name == "pretrain":  # what follows looks at this run
                        request = replace(request, run=found.run)
                    if name == "sources":
                        unreadable = found.unreadable
                case LabelError():
                    left_as_it_was = {dataset_of(str(key)): str(found)}
                    yield Outcome(name, key, made=False, rows=0, size_bytes=0, seconds=0.0, unreadable=left_as_it_was)
                    why = found
                case _:
                    why = found
            if why is not None:
                if name not in BY_BATCH:
                    raise why
                stopped[str(key)] = why
        if name == "sources" and request.asset != "sources":
            _refuse_to_go_on(project, request, unreadable)
        if GRAPH[name].partition == "batch" and (name == request.asset or (stopped and request.batch is not None)):
            _refuse_left_out(request, stopped, unreadable)


def steps(request: Request, others: Family | None = None) -> list[Asset]:
    """The assets to make, in the order of the graph: nothing that leads to a trainset or run that is named.

    `others`: the recipe is an encoder of this family, so there is no run to make, and, where it reads pixels, no
    trainset.
    """
    given = chain("pretrain") if request.run else chain("trainset") if request.trainset else []
    if others is not None:
        given = (
            ["mask_plan", "pretrain"] if others == "latents" else ["latent_stats", "mask_plan", "trainset", "pretrain"]
        )
    return [asset for asset in chain(request.asset) if asset not in given]


def _made(
    project: Project, asset: Asset, keys: Sequence[str | None], request: Request
) -> Iterator[tuple[str | None, Outcome | UpstreamError | LabelError]]:
    """Make these partitions: each with its outcome, or with the error of its data, as they end.

    Batches of SIDE_BY_SIDE are made by threads, as many as there are cores; their workers share the cores
    (nextvid/machine.py). Where the caller stops, they stop at the next file.
    """
    at_once = min(len(keys), available_cores(project.corpus.execution.cores)) if asset in SIDE_BY_SIDE else 1
    stopping = threading.Event()

    def told(progress: Progress) -> None:
        if stopping.is_set():
            raise CancelledError
        request.on_progress(progress)

    def attempt(key: str | None) -> tuple[str | None, Outcome | UpstreamError | LabelError]:
        try:
            return key, make_one(project, asset, key, replace(request, on_progress=told))
        except (UpstreamError, LabelError) as error:
            return key, error

    if at_once <= 1:  # in this thread, which has torch's threads and gets the signals
        yield from map(attempt, keys)
        return
    with ThreadPoolExecutor(at_once, "batch") as threads:
        try:
            for made in as_completed([threads.submit(attempt, key) for key in keys]):
                yield made.result()
        finally:
            stopping.set()
            threads.shutdown(cancel_futures=True)


def _refuse_names(project: Project, request: Request) -> None:
    """Refuse names and options that would otherwise fail only after hours of encoding."""
    others = _others(project, request) if request.asset == "probes" else None
    if "mask_plan" in chain(request.asset) and others is None:
        apply_overrides(project.recipe(_recipe(request)), request.overrides)
    if others is not None and request.run:
        raise ConfigError(f"--run: '{request.recipe}' is an encoder of {project.path}, which has no run: leave it out")
    if request.run and "pretrain" not in chain(request.asset)[:-1]:
        raise ConfigError(f"--run is for probes, samples and report, and {request.asset} looks at no run: leave it out")
    made = steps(request, others)
    training = request.overrides or request.repeat or request.trainset or request.on != "here"
    if training and "pretrain" not in made:
        raise ConfigError(
            "--set, --repeat, --trainset and --on are for training, and nothing is trained here: leave them out"
        )
    if (request.how or request.ranks is not None) and not {"pretrain", "probes"} & set(made):
        raise ConfigError("--how and --ranks are for training and probes, and neither is made here: leave them out")
    alone = [how for how in request.how if not how.startswith(("nodes=", "ranks=", "rendezvous="))]  # of each other
    refuse_missing(apply_how(ExecutionConfig(), alone).sinks)
    if request.checkpoint is not None and not (request.run and request.asset == "probes"):
        raise ConfigError("--checkpoint names a step of the run that probes score: name the run with --run")
    if request.benchmark is not None:
        project.benchmark(request.benchmark)


def _refuse_to_go_on(project: Project, request: Request, unreadable: Mapping[str, str]) -> None:
    """Refuse a corpus without files, and an unknown batch: with nothing to do, all would seem well.

    And unreadable datasets, where nothing else is requested, or where what is requested would lack them.
    """
    from nextvid.corpus.sources import refuse_unknown

    held = {dataset_of(batch) for batch in project.root.batches()}
    if request.batch is not None and (why := unreadable.get(dataset_of(request.batch))):
        raise CorpusError(why)
    if GRAPH[request.asset].partition != "batch" and unreadable:
        if not held.issuperset(unreadable):
            raise CorpusError("; ".join(unreadable.values()))
        going_on = f"Going on with what {project.corpus.root} holds of {', '.join(unreadable)}"
        note = f"{'; '.join(unreadable.values())}. {going_on}"
        request.on_progress(Progress("sources", 0, 0, note=note))
    if not held and not unreadable:
        places = ", ".join(f"{name}: {dataset.uri}" for name, dataset in sorted(project.corpus.datasets.items()))
        raise CorpusError(f"no dataset holds a video or image ({places}): correct their 'uri', or put files there")
    if request.batch is not None:
        refuse_unknown(project, request.batch)


def _refuse_left_out(
    request: Request, stopped: Mapping[str, UpstreamError | LabelError], unreadable: Mapping[str, str]
) -> None:
    """Raise where batches did not get as far as the asset, or datasets are unreadable."""
    by_reason: dict[str, list[str]] = {}
    for batch, why in sorted(stopped.items()):
        by_reason.setdefault(str(why), []).append(batch)
    told = [f"{', '.join(batches)}: {why}" for why, batches in by_reason.items()]
    if told:
        told[0] = f"{request.asset} was not made for {len(stopped)} batches: {told[0]}"
    if request.batch is None:
        told += unreadable.values()
    if told:
        kind = UpstreamError if any(isinstance(why, UpstreamError) for why in stopped.values()) else CorpusError
        raise kind("; ".join(told))


def partitions(project: Project, asset: Asset, request: Request) -> Sequence[str | None]:
    """Keys of the asset's partitions to make; None stands for the whole asset."""
    match GRAPH[asset].partition:
        case "batch" if asset != "sources":
            held = [batch for batch in project.root.batches() if dataset_of(batch) in project.corpus.datasets]
            return [request.batch] if request.batch else held
        case "recipe":
            return [_recipe(request)]
        case _:
            return [None]


def make_one(project: Project, asset: Asset, partition: str | None, request: Request) -> Outcome:
    """Call the maker of one asset, once, for one partition."""
    make_it: Callable[..., Outcome] = maker(asset)
    how = (*request.how, *(() if request.ranks is None else (f"ranks={request.ranks}",)))
    match asset:
        case "sources":
            return make_it(project)
        case "latent_stats" | "duplicates" | "trainset":
            return make_it(project, request.on_progress)
        case "media" | "shots" | "clips" | "mask_plan":
            return make_it(project, partition, request.on_progress)
        case "latents":
            from nextvid.planning.acceptance import ensure_accepted

            ensure_accepted(project)  # accepts the first encoding, or a changed one under `reencode: auto`
            return make_it(project, partition, request.on_progress)
        case "pretrain":
            from nextvid.train.pretrain import default_ranks

            default = ExecutionConfig()
            if request.on == "here":
                default = ExecutionConfig(ranks=default_ranks(project, str(partition), request.overrides))
            return make_it(
                project,
                partition,
                request.overrides,
                apply_how(default, how),
                repeat=request.repeat,
                trainset=request.trainset,
                on=request.on,
                on_progress=request.on_progress,
            )
        case "probes":
            names = [request.benchmark] if request.benchmark else []
            return make_it(project, partition, request.run, names, request.on_progress, request.checkpoint, how)
        case "samples" | "report":
            return make_it(project, partition, request.run, request.on_progress)


def _others(project: Project, request: Request) -> Family | None:
    """Family of the encoder of corpus.yaml that the request names in the place of a recipe."""
    found = project.corpus.encoders.get(request.recipe or "")
    return None if found is None else found.family


def _recipe(request: Request) -> str:
    if not request.recipe:
        raise ConfigError(f"{request.asset} needs a recipe: name one with --recipe")
    return request.recipe
