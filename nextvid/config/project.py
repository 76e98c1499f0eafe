"""A project: corpus.yaml and the data root that it names."""

from dataclasses import dataclass
from pathlib import Path

from nextvid.config.corpus import CorpusConfig, corpus_path, load_corpus
from storage.root import DataRoot


@dataclass(frozen=True)
class Project:
    """A corpus.yaml and the data root that it names: what every maker takes first."""

    corpus: CorpusConfig
    root: DataRoot
    path: Path


def open_project(path: str | Path | None = None) -> Project:
    """The project of `--corpus`, else NEXTVID_CORPUS, else ./corpus.yaml. Raises ConfigError."""
    file = corpus_path(str(path) if path else None)
    corpus = load_corpus(file)
    cache = corpus.cache
    root = DataRoot.open(corpus.root, corpus.runs_root, cache.folder, round(cache.size_gb * 1e9))
    return Project(corpus, root, file)
