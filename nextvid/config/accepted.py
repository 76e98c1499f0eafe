"""The accepted configuration: accepted.json keeps it, and it changes only when a person accepts the change.

A changed encoding, curation or pixels in corpus.yaml would rebuild what was made under the old ones, and so would a
newer version of a maker. So with `reencode: ask` a project works by the accepted configuration, and keeps the tables of
accepted versions, until 'nextvid plan --accept'; with `reencode: auto` both are accepted at once.
nextvid/planning/acceptance.py decides when; `open_project` applies the result.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from nextvid.config.benchmarks import BenchmarkConfig
from nextvid.config.corpus import CorpusConfig, PixelConfig
from nextvid.config.datasets import ClipPolicy, CurationConfig, DatasetConfig, LabelConfig, SplitConfig
from nextvid.config.strict import Strict, parse
from storage import atomic
from storage.errors import ConfigError, CorpusError
from storage.records import publish_record, read_record
from storage.root import DataRoot

Rules = Mapping[str, Any]
_REMEDY = "remove it, then 'nextvid plan --accept' accepts what corpus.yaml asks for"


@dataclass(frozen=True)
class Accepted:
    """The content of accepted.json. `rules` and `pixels` are plain JSON values."""

    encoding: str  # digest of the encoding spec, whose fields are in its store
    curation: str  # CorpusConfig.curation_digest of the rules
    pixels: Rules | None
    rules: Rules  # `curation`, and what decides rows of each of `datasets` and `benchmarks`
    versions: Mapping[str, int]  # by asset: the oldest version of its maker whose tables are kept
    count: int  # how often something was accepted, so that accepting what was accepted before asks for new runs

    @property
    def digests(self) -> tuple[str, str, str]:
        """Of encoding, curation and pixels: what was made under other ones is rebuilt."""
        return self.encoding, self.curation, pixels_digest(self.pixels)


class _Dataset(Strict):
    """The fields of a dataset that decide its rows (CorpusConfig.curation_digest); the paths of label files do not."""

    clips: tuple[ClipPolicy, ...]
    clips_per_media: int | None
    split: SplitConfig
    labels: LabelConfig


class _Benchmark(Strict):
    """The fields of a benchmark that decide rows."""

    datasets: tuple[str, ...]
    target: str
    policy: ClipPolicy


def accepted(root: DataRoot) -> Accepted | None:
    """The accepted configuration, or None before the first one. Raises CorpusError for a damaged accepted.json."""
    path = root.accepted()
    if not atomic.exists(path):
        return None
    value = read_record(path, _REMEDY)
    try:
        encoding, curation = str(value["encoding"]), str(value["curation"])
        versions, count = value.get("versions", {}), int(value.get("count", 0))
        return Accepted(encoding, curation, value["pixels"], value["rules"], versions, count)
    except (AttributeError, KeyError, TypeError):
        raise CorpusError(
            f"{path}: expected the keys 'encoding', 'curation', 'pixels' and 'rules': the file is damaged or from an "
            f"older version; {_REMEDY}"
        ) from None


def accept(root: DataRoot, asked: CorpusConfig, encoding: str, versions: Mapping[str, int]) -> Accepted:
    """Accept the curation and pixels that corpus.yaml asks for, the encoding spec with this digest, these versions."""
    pixels = asked.encoding.pixels
    before = accepted(root)
    rules = before.rules if before else {"datasets": {}, "benchmarks": {}}
    count = before.count + 1 if before else 1
    kept = pixels.model_dump(mode="json") if pixels else None
    return _publish(root, Accepted(encoding, "", kept, rules, dict(versions), count), asked)


def keep_new(root: DataRoot, asked: CorpusConfig, known: Accepted) -> Accepted:
    """Accept the datasets that corpus.yaml names for the first time, as it describes them."""
    corpus = as_accepted(asked, known, root.accepted())
    if _rules(known.rules, corpus) == known.rules:
        return known
    return _publish(root, known, corpus)


def as_accepted(asked: CorpusConfig, known: Accepted, where: str) -> CorpusConfig:
    """corpus.yaml with the accepted curation, benchmarks, pixels and rules of each dataset in the place of its own.

    A dataset that was never accepted is taken as corpus.yaml describes it; so is a new benchmark, on such datasets
    only. Raises ConfigError, naming `where`, if an accepted value is not valid any more.
    """
    rules = known.rules
    update = {
        "curation": parse(CurationConfig, rules["curation"], where),
        "datasets": {
            name: _dataset(dataset, rules["datasets"].get(name), where) for name, dataset in asked.datasets.items()
        },
        "benchmarks": _benchmarks(asked, rules, where),
        "encoding": asked.encoding.model_copy(
            update={"pixels": parse(PixelConfig, known.pixels, where) if known.pixels else None}
        ),
    }
    return asked.model_copy(update=update)


def pixels_digest(pixels: PixelConfig | Rules | None) -> str:
    """Id of how pixels are kept; empty where none are."""
    config = PixelConfig(**pixels) if isinstance(pixels, Mapping) else pixels
    return config.digest() if config else ""


def _publish(root: DataRoot, known: Accepted, corpus: CorpusConfig) -> Accepted:
    """Accept the curation and rules of `corpus`, and what else is `known`."""
    value = replace(known, curation=corpus.curation_digest(), rules=_rules(known.rules, corpus))
    publish_record(root.accepted(), asdict(value))
    return value


def _rules(before: Rules, corpus: CorpusConfig) -> Rules:
    """The rules of `corpus`, and those accepted before for datasets that it does not name: they may come back."""
    datasets = {n: d.model_dump(mode="json", include=set(_Dataset.model_fields)) for n, d in corpus.datasets.items()}
    benchmarks = {
        n: b.model_dump(mode="json", include=set(_Benchmark.model_fields)) for n, b in corpus.benchmarks.items()
    }
    for name, rules in before["benchmarks"].items():
        if absent := [dataset for dataset in rules["datasets"] if dataset not in corpus.datasets]:
            kept = benchmarks.setdefault(name, {**rules, "datasets": []})
            kept["datasets"] += [dataset for dataset in absent if dataset not in kept["datasets"]]
    return {
        "curation": corpus.curation.model_dump(mode="json"),
        "datasets": {**before["datasets"], **datasets},
        "benchmarks": benchmarks,
    }


def _dataset(asked: DatasetConfig, rules: Rules | None, where: str) -> DatasetConfig:
    """A dataset with its accepted rules; its label files are where corpus.yaml says, if they fit these rules."""
    if rules is None:
        return asked
    known = parse(_Dataset, rules, where)
    paths = asked.labels.model_dump(mode="json", include={"file", "files", "path_base"})
    try:
        labels = parse(LabelConfig, {**rules["labels"], **paths}, where)
    except ConfigError:  # corpus.yaml asks for another layout, which is not accepted yet
        labels = known.labels
    kept = {name: getattr(known, name) for name in ("clips", "clips_per_media", "split")}
    return asked.model_copy(update={**kept, "labels": labels})


def _benchmarks(corpus: CorpusConfig, rules: Rules, where: str) -> dict[str, BenchmarkConfig]:
    """Benchmarks with their accepted rules, on the datasets that corpus.yaml names."""
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
