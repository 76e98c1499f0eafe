"""A project: the data root that corpus.yaml names, and the accepted configuration, by which everything is made."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from nextvid.config.accepted import accepted, as_accepted
from nextvid.config.benchmarks import BenchmarkConfig
from nextvid.config.corpus import CorpusConfig, corpus_path, load_corpus
from nextvid.config.recipe import RecipeConfig
from nextvid.config.recipes import RECIPES, own_recipes
from nextvid.config.recipes import recipe as recipe_by_name
from storage.errors import ConfigError
from storage.root import DataRoot


@dataclass(frozen=True)
class Project:
    """What every maker takes first. Makers read `corpus`; only planning reads `asked`.

    `corpus.encoding` is the exception: beside its pixels it is as corpus.yaml says, since accepted.json names the
    encoding spec by its digest (nextvid/encode/plan.py).
    """

    corpus: CorpusConfig  # the accepted configuration
    root: DataRoot
    path: Path  # of corpus.yaml
    asked: CorpusConfig  # the content of corpus.yaml
    versions: Mapping[str, int] | None = None  # accepted versions of makers by asset; None for the current ones

    def as_asked(self) -> "Project":
        """The project as it would be with corpus.yaml and makers accepted: for plans of what that would cost."""
        return replace(self, corpus=self.asked, versions=None)

    def on_cores(self, cores: int) -> "Project":
        """The project for a process that has a share of this machine: on at most so many cores."""
        execution = self.corpus.execution
        fewer = execution.model_copy(update={"cores": min(cores, execution.cores or cores)})
        return replace(self, corpus=self.corpus.model_copy(update={"execution": fewer}))

    def recipe(self, name: str) -> RecipeConfig:
        """A recipe, built in or one of this project's own. Raises ConfigError."""
        if name in self.asked.encoders:
            raise ConfigError(
                f"'{name}' is no recipe but an encoder of {self.path}, which others trained: make 'probes' of it"
            )
        return recipe_by_name(name, self.path)

    def benchmark(self, name: str) -> BenchmarkConfig:
        """An accepted benchmark. Raises ConfigError for one that is unknown or not accepted yet."""
        if name in self.corpus.benchmarks:
            return self.corpus.benchmarks[name]
        if name in self.asked.benchmarks:
            raise ConfigError(
                f"{self.path}: benchmark '{name}' is not accepted yet, so no clips are cut for it: 'nextvid plan' "
                "says what it costs, 'nextvid plan --accept' accepts it"
            )
        known = ", ".join(sorted(self.corpus.benchmarks)) or "none"
        raise ConfigError(f"{self.path}: there is no benchmark '{name}'; known: {known}")


def open_project(path: str | Path | None = None) -> Project:
    """The project of `--corpus`, else NEXTVID_CORPUS, else ./corpus.yaml, with its accepted configuration.

    Raises ConfigError for corpus.yaml and the recipes that it names, and CorpusError for a damaged accepted.json.
    """
    file = corpus_path(str(path) if path else None)
    asked = load_corpus(file)
    if both := sorted(asked.encoders.keys() & {*RECIPES, *own_recipes(file)}):
        raise ConfigError(f"{file}: encoder '{both[0]}' has the name of a recipe, and both are probed: rename it")
    for name in asked.recipes:
        recipe_by_name(name, file)
    cache = asked.cache
    root = DataRoot.open(asked.root, asked.runs_root, cache.folder, round(cache.size_gb * 1e9))
    known = accepted(root) if asked.reencode == "ask" else None
    corpus = as_accepted(asked, known, root.accepted()) if known else asked
    return Project(corpus, root, file, asked, known.versions if known else None)
