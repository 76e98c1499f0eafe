"""What is in force: `accepted.json` with the encoding spec's digest, and with curation and pixels in words.

Holds how a project goes on with these while corpus.yaml asks for others (design 4, `reencode: ask`). What is accepted
when is decided in nextvid/planning/acceptance.py; the encoding spec in words stands in its store. Imports no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from nextvid.config.corpus import CorpusConfig, PixelConfig
from nextvid.config.curation import CurationConfig
from nextvid.config.datasets import BenchmarkConfig, ClipPolicy, DatasetConfig, LabelConfig, SplitConfig
from nextvid.config.project import Project
from nextvid.config.strict import Strict, parse
from storage import atomic
from storage.errors import ConfigError, CorpusError, RefusedError

Rules = Mapping[str, Any]


@dataclass(frozen=True)
class Accepted:
    """What is in force. `rules` and `pixels` are as JSON says them."""

    encoding: str  # digest of the spec
    curation: str  # digest of `rules`, as corpus.yaml's own digest is reckoned
    pixels: Rules | None = None
    rules: Rules | None = None  # curation, and by dataset and benchmark what decides rows; None: written without words

    @property
    def digests(self) -> tuple[str, str, str]:
        """Encoding, curation and pixels: what is made under others is made anew."""
        return self.encoding, self.curation, pixels_digest(self.pixels)


class _Dataset(Strict):
    """What of a dataset decides its rows (CorpusConfig.curation_digest); the paths of label files do not."""

    clips: tuple[ClipPolicy, ...]
    clips_per_media: int | None
    split: SplitConfig
    labels: LabelConfig


class _Benchmark(Strict):
    """What of a benchmark decides rows."""

    datasets: tuple[str, ...]
    target: str
    policy: ClipPolicy


def accepted(project: Project) -> Accepted | None:
    """What is in force, or None where nothing was accepted yet. Raises CorpusError for a damaged accepted.json."""
    path = project.root.accepted()
    if not atomic.exists(path):
        return None
    value = atomic.read_json(path)
    try:
        return Accepted(str(value["encoding"]), str(value["curation"]), value.get("pixels"), value.get("rules"))
    except (AttributeError, KeyError, TypeError):
        raise CorpusError(f"{path}: keys 'encoding' and 'curation' were expected; accept the plan again") from None


def accept(project: Project, encoding: str) -> Accepted:
    """Put corpus.yaml's curation and pixels, and the encoding spec of this digest, into force."""
    pixels = project.corpus.encoding.pixels
    return _publish(project, encoding, project.corpus, pixels.model_dump(mode="json") if pixels else None)


def keep_new(project: Project, stands: Accepted) -> Accepted:
    """Take datasets that corpus.yaml names for the first time into what is in force, as they are."""
    if stands.rules is None:  # the words follow, if they are still those
        return accept(project, stands.encoding) if stands.curation == project.corpus.curation_digest() else stands
    corpus = going_on(project, stands).corpus
    if _together(stands.rules, corpus) == stands.rules:
        return stands
    return _publish(project, stands.encoding, corpus, stands.pixels)


def standing(project: Project) -> Project:
    """The project as it goes on: what is in force in the place of what corpus.yaml asks for.

    The same as given where nothing was accepted yet, and with `reencode: auto`, where corpus.yaml is in force.
    """
    stands = accepted(project)
    return project if stands is None or project.corpus.reencode == "auto" else going_on(project, stands)


def going_on(project: Project, stands: Accepted) -> Project:
    """The project with what `stands` says. A dataset that it does not know is taken as corpus.yaml says.

    So is a benchmark, for such datasets; for the others it waits. Raises RefusedError where `stands` has no words.
    """
    corpus, rules = project.corpus, stands.rules
    if rules is None:
        if stands.curation == corpus.curation_digest():
            return project
        raise RefusedError(
            f"{project.root.accepted()} names curation {stands.curation} by its digest alone, and corpus.yaml asks for "
            "another: put the old one back, or accept the new one with 'nextvid plan --accept'"
        )
    where = project.root.accepted()
    update = {
        "curation": parse(CurationConfig, rules["curation"], where),
        "datasets": {
            name: _dataset(dataset, rules["datasets"].get(name), where) for name, dataset in corpus.datasets.items()
        },
        "benchmarks": _benchmarks(corpus, rules, where),
        "encoding": corpus.encoding.model_copy(
            update={"pixels": parse(PixelConfig, stands.pixels, where) if stands.pixels else None}
        ),
    }
    return replace(project, corpus=corpus.model_copy(update=update))


def pixels_digest(pixels: PixelConfig | Rules | None) -> str:
    """Id of how pixels are kept; empty where none are."""
    config = PixelConfig(**pixels) if isinstance(pixels, Mapping) else pixels
    return config.digest() if config else ""


def _publish(project: Project, encoding: str, corpus: CorpusConfig, pixels: Rules | None) -> Accepted:
    before = accepted(project)
    rules = _together(before.rules if before and before.rules else {"datasets": {}, "benchmarks": {}}, corpus)
    value = Accepted(encoding, corpus.curation_digest(), pixels, rules)
    said = {"encoding": encoding, "curation": value.curation, "pixels": pixels, "rules": rules}
    atomic.publish_json(project.root.accepted(), said)
    return value


def _together(before: Rules, corpus: CorpusConfig) -> Rules:
    """The rules of corpus.yaml, and those of datasets that it does not name: they may come back."""
    datasets = {n: d.model_dump(mode="json", include=set(_Dataset.model_fields)) for n, d in corpus.datasets.items()}
    benchmarks = {
        n: b.model_dump(mode="json", include=set(_Benchmark.model_fields)) for n, b in corpus.benchmarks.items()
    }
    for name, rules in before["benchmarks"].items():
        if absent := [dataset for dataset in rules["datasets"] if dataset not in corpus.datasets]:
            said = benchmarks.setdefault(name, {**rules, "datasets": []})
            said["datasets"] += [dataset for dataset in absent if dataset not in said["datasets"]]
    return {
        "curation": corpus.curation.model_dump(mode="json"),
        "datasets": {**before["datasets"], **datasets},
        "benchmarks": benchmarks,
    }


def _dataset(asked: DatasetConfig, rules: Rules | None, where: str) -> DatasetConfig:
    """A dataset with the rules in force; its label files are where corpus.yaml says, if they fit these rules."""
    if rules is None:
        return asked
    known = parse(_Dataset, rules, where)
    paths = asked.labels.model_dump(mode="json", include={"file", "files", "path_base"})
    try:
        labels = parse(LabelConfig, {**rules["labels"], **paths}, where)
    except ConfigError:  # of another layout, which waits
        labels = known.labels
    kept = {name: getattr(known, name) for name in ("clips", "clips_per_media", "split")}
    return asked.model_copy(update={**kept, "labels": labels})


def _benchmarks(corpus: CorpusConfig, rules: Rules, where: str) -> dict[str, BenchmarkConfig]:
    """Benchmarks with the rules in force, of the datasets that corpus.yaml names."""
    found = {}
    for name in [*corpus.benchmarks, *(name for name in rules["benchmarks"] if name not in corpus.benchmarks)]:
        asked = corpus.benchmarks.get(name)
        known = parse(_Benchmark, rules["benchmarks"][name], where) if name in rules["benchmarks"] else None
        named = asked.datasets if asked else ()
        kept = [dataset for dataset in (known.datasets if known else ()) if dataset in corpus.datasets]
        members = {*kept, *(dataset for dataset in named if dataset not in rules["datasets"])}
        datasets = [d for d in named if d in members] + [d for d in kept if d not in named]
        if datasets:
            decided = known or asked
            assert decided is not None
            update = {"datasets": tuple(datasets), "target": decided.target, "policy": decided.policy}
            found[name] = (asked or BenchmarkConfig(**update)).model_copy(update=update)
    return found
