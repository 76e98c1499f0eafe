"""Making an asset and what it lacks upstream, without Dagster: the same makers, the same nouns, the same files.

Holds the order of the graph as plain calls. Holds no work of its own and prints nothing: the command line does.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, get_args

from nextvid.config.project import Project
from nextvid.config.recipes import recipe as recipe_by_name
from nextvid.making.outcome import OnCount, Outcome
from nextvid.making.progress import OnPace
from storage.errors import ConfigError, CorpusError, UpstreamError

Asset = Literal[
    "sources", "media", "shots", "clips", "latents", "latent_stats", "duplicates", "mask_plan",
    "trainset", "pretrain", "probes", "samples", "report",
]  # fmt: skip
ASSETS: tuple[Asset, ...] = get_args(Asset)
BY_BATCH: tuple[Asset, ...] = ("media", "shots", "clips", "latents")

# What an asset reads, nearest first; `sources` is listed before any of it.
UPSTREAM: dict[Asset, tuple[Asset, ...]] = {
    "sources": (),
    "media": ("sources",),
    "shots": ("media",),
    "clips": ("shots",),
    "latents": ("clips",),
    "latent_stats": ("latents",),
    "duplicates": ("clips",),
    "mask_plan": (),
    "trainset": ("latents", "latent_stats", "duplicates"),
    "pretrain": ("trainset", "mask_plan"),
    "probes": ("pretrain", "latents"),
    "samples": ("pretrain",),
    "report": ("probes", "samples"),
}


@dataclass(frozen=True)
class Wish:
    """What is asked for. Without a batch or benchmark: all of them; without a run: the recipe's latest."""

    asset: Asset
    batch: str | None = None
    recipe: str | None = None
    benchmark: str | None = None
    overrides: tuple[str, ...] = ()
    ranks: int = 1
    on_pace: OnPace = field(default=lambda pace: None, compare=False)  # told how encoding is getting on
    run: str | None = None
    on_count: OnCount = field(default=lambda name, done, total: None, compare=False)  # how curation is


def chain(asset: Asset) -> list[Asset]:
    """The asset and everything upstream of it, in the order of the graph."""
    wanted: set[Asset] = set()
    todo: list[Asset] = [asset]
    while todo:
        name = todo.pop()
        wanted.add(name)
        todo.extend(UPSTREAM[name])
    return [name for name in ASSETS if name in wanted]


def make(project: Project, wish: Wish) -> Iterator[Outcome]:
    """Make what is wished for and what it lacks; yields each outcome as it is there.

    One stopped batch does not stop the others; what reads all batches decides itself which it does without. Raises
    UpstreamError where a blocking check of anything else failed, or, at the end, where a batch never came to the asset
    asked for; CorpusError where no dataset holds a file, ConfigError for an unknown batch.
    """
    _refuse_names(project, wish)
    stopped: dict[str, str] = {}  # batch -> why
    for name in chain(wish.asset):
        for partition in partitions(project, name, wish):
            if name in BY_BATCH and partition in stopped:
                continue
            try:
                outcome = make_one(project, name, partition, wish)
            except UpstreamError as error:
                if name not in BY_BATCH:
                    raise
                stopped[_key(partition)] = str(error)
                continue
            yield outcome
            if name == "pretrain":
                wish = replace(wish, run=str(outcome.numbers["run"]))  # with overrides it is not the recipe's latest
            if not outcome.passed:
                if name not in BY_BATCH:
                    raise UpstreamError(f"{name}: blocking checks failed: {_failed(outcome)}")
                stopped[_key(partition)] = f"{name}: blocking checks failed: {_failed(outcome)}"
        if name == "sources" and wish.asset != "sources":
            _refuse_nothing(project, wish)
        if stopped and name in BY_BATCH and (name == wish.asset or wish.batch is not None):
            listed = "; ".join(f"{batch}: {why}" for batch, why in sorted(stopped.items()))
            raise UpstreamError(f"{wish.asset} was not made for {len(stopped)} batches: {listed}")


def _refuse_names(project: Project, wish: Wish) -> None:
    """What would only be missed after hours of encoding."""
    if "mask_plan" in chain(wish.asset):
        recipe_by_name(_recipe(wish))
    if "pretrain" not in chain(wish.asset) and (wish.overrides or wish.ranks != 1):
        raise ConfigError(f"--set and --ranks are for training, and {wish.asset} does not wait for any: leave them out")
    if wish.benchmark is not None and wish.benchmark not in project.corpus.benchmarks:
        known = ", ".join(sorted(project.corpus.benchmarks)) or "none"
        raise ConfigError(f"{project.path}: there is no benchmark '{wish.benchmark}'; there are: {known}")


def _refuse_nothing(project: Project, wish: Wish) -> None:
    """No file at all, or no such batch: a loop over nothing would say that all is well."""
    from nextvid.corpus.sources import refuse_unknown

    if not project.root.batches():
        places = ", ".join(f"{name}: {dataset.uri}" for name, dataset in sorted(project.corpus.datasets.items()))
        raise CorpusError(f"no dataset holds a video or image ({places}): correct their 'uri', or put files there")
    if wish.batch is not None:
        refuse_unknown(project, wish.batch)


def partitions(project: Project, asset: Asset, wish: Wish) -> Sequence[str | None]:
    """Partition keys of one asset that the wish covers."""
    match asset:
        case "media" | "shots" | "clips" | "latents":
            return [wish.batch] if wish.batch else project.root.batches()
        case "mask_plan" | "pretrain" | "samples" | "report":
            return [_recipe(wish)]
        case "probes":
            return [wish.benchmark] if wish.benchmark else sorted(project.corpus.benchmarks)
        case _:
            return [None]


def make_one(project: Project, asset: Asset, partition: str | None, wish: Wish) -> Outcome:
    """Make one asset, once: the table of makers."""
    counted = partial(wish.on_count, f"{asset} {partition}" if partition else asset)
    match asset:
        case "sources":
            from nextvid.corpus.sources import make_sources

            return make_sources(project)
        case "media":
            from nextvid.corpus.media import make_media

            return make_media(project, _key(partition), counted)
        case "shots":
            from nextvid.corpus.shots import make_shots

            return make_shots(project, _key(partition), counted)
        case "clips":
            from nextvid.corpus.clips import make_clips

            return make_clips(project, _key(partition), counted)
        case "latents":
            from nextvid.encode.latents import make_latents
            from nextvid.planning.acceptance import in_force

            in_force(project)  # first use, or `reencode: auto`; else what stands goes on, as in the graph
            return make_latents(project, _key(partition), wish.on_pace)
        case "latent_stats":
            from nextvid.encode.latent_stats import make_latent_stats

            return make_latent_stats(project)
        case "duplicates":
            from nextvid.trainset.duplicates import make_duplicates

            return make_duplicates(project, counted)
        case "trainset":
            from nextvid.trainset.trainset import make_trainset

            return make_trainset(project)
        case "mask_plan":
            from nextvid.trainset.mask_plan import make_mask_plan

            return make_mask_plan(project, _key(partition))
        case "pretrain":
            from nextvid.train.pretrain import pretrain

            return pretrain(project, _key(partition), wish.overrides, ranks=wish.ranks)
        case "probes":
            from nextvid.evaluate.probes import make_probes

            return make_probes(project, _recipe(wish), _key(partition), wish.run)
        case "samples":
            from nextvid.evaluate.samples import make_samples

            return make_samples(project, _key(partition), wish.run)
        case "report":
            from nextvid.report.model_card import make_report

            return make_report(project, _key(partition), wish.run)


def _recipe(wish: Wish) -> str:
    if not wish.recipe:
        raise ConfigError(f"{wish.asset} is made by recipe: name one with --recipe")
    return wish.recipe


def _key(partition: str | None) -> str:
    assert partition is not None
    return partition


def _failed(outcome: Outcome) -> str:
    return ", ".join(
        f"{check.name} ({', '.join(f'{k}={v}' for k, v in check.numbers.items())})"
        for check in outcome.checks
        if check.blocking and not check.passed
    )
