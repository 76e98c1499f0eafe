"""Runs side by side: fields of config.json and of scores in which they differ, and accuracy by the encoder's size.

Records are read as flat fields with dotted names, whose values are compared. Scores are comparable only over the same
rows, so a score is named by benchmark and rows digest; where a run has no such score, its place is empty. Where a run
has several, as with frozen and fine-tuned encoders, the digest of how heads learned is part of the name.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nextvid.config.overrides import flat
from nextvid.config.project import Project
from nextvid.config.stages import draws_before
from nextvid.lineage.trace import RunFacts, runs_of, score_record, scores_of
from nextvid.plain_text import printable
from nextvid.train.run import open_run
from storage.digest import digest_config
from storage.errors import ConfigError
from storage.records import read_record
from storage.root import RUN_CONFIG, DataRoot

# Fields of scores that are in config.json too, or are no result.
NOT_COMPARED = ("run", "recipe_digest", "checkpoint", "seconds", "trainset", "mask_plan", "recipe")
# Fields that say how a score was made: scores of one run that differ in them are all kept.
HOW = ("settings", "seeds", "neighbours", "finetune", "levels", "judged", "train_views", "limit")
ROWS_DIGITS = 12  # as many as a run id has: enough to tell rows apart on a line


@dataclass(frozen=True)
class Difference:
    """One field and its value in each run; None where a run has no such field."""

    field: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Reached:
    """What a run's averaged encoder reaches, by benchmark and rows, for how many parameters and clips."""

    run: str
    recipe: str
    parameters: int  # of the encoder
    clips: int  # that training draws
    accuracy: Mapping[str, float]

    def line(self) -> str:
        """One line for people."""
        scores = "  ".join(f"{name} {value:.3f}" for name, value in self.accuracy.items()) or "no scores"
        return f"{self.parameters / 1e6:8.1f} M  {self.clips:>13,} clips  {self.recipe} {self.run}  {scores}"


@dataclass(frozen=True)
class Comparison:
    """Where runs differ, how many fields they share, and what each reaches, the smallest encoder first."""

    runs: tuple[str, ...]
    config: tuple[Difference, ...]
    scores: tuple[Difference, ...]
    same: int
    reached: tuple[Reached, ...]

    def text(self) -> str:
        """As text: one line for each difference, then one for each run."""
        lines = [f"{'':44} " + " ".join(f"{run:>24}" for run in self.runs)]
        for title, found in (("config", self.config), ("scores", self.scores)):
            for difference in found:
                values = " ".join(f"{_shown(value):>24}" for value in difference.values)
                lines.append(f"{title} {difference.field:{43 - len(title)}} {values}")
        lines.append(f"{len(self.config) + len(self.scores)} fields differ, {self.same} are the same")
        return "\n".join([*lines, "encoder, training, accuracy of the EMA encoder:", *(r.line() for r in self.reached)])


def compare(project: Project, runs: Sequence[str]) -> Comparison:
    """Compare two runs or more, by id or folder. Raises ConfigError where one is unknown, or there is but one."""
    from nextvid.model.cost import count_parameters  # imports torch

    if len(runs) < 2:
        raise ConfigError("name two runs or more to compare")
    found = [find(project, run) for run in runs]
    configs = [_fields(read_record(str(Path(run.folder, RUN_CONFIG))), ("run", "recipe_digest")) for run in found]
    scores = _named([_scores(project.root, run) for run in found])
    config, config_same = _differences(configs)
    score, score_same = _differences(scores)
    names, reached, last = tuple(run.run for run in found), list[Reached](), ".encoders.ema.accuracy"
    for run, own in zip(found, scores, strict=True):
        recipe = open_run(Path(run.folder)).recipe
        accuracy = {name.removesuffix(last): value for name, value in own.items() if name.endswith(last)}
        clips = draws_before(recipe.stages, recipe.steps)
        reached.append(Reached(run.run, run.recipe, count_parameters(recipe)["encoder"], clips, accuracy))
    reached.sort(key=lambda one: one.parameters)
    return Comparison(names, config, score, config_same + score_same, tuple(reached))


def find(project: Project, what: str) -> RunFacts:
    """A run by its id or folder. Raises ConfigError that lists the known runs."""
    runs = list(runs_of(project.root))
    for facts in runs:
        if what == facts.run or Path(what).absolute() == Path(facts.folder):
            return facts
    known = ", ".join(f"{facts.run} ({facts.recipe})" for facts in runs) or "none"
    raise ConfigError(f"'{what}' is no run of {project.path}; there are: {known}")


def _scores(root: DataRoot, run: RunFacts) -> dict[tuple[str, str], dict[str, Any]]:
    """Fields of every score of a run, by benchmark with rows, and by the digest of how heads learned."""
    found = {}
    records = [record for path in scores_of(root) if (record := score_record(path))["run"] == run.run]
    for record in sorted(records, key=lambda record: str(record.get("checkpoint"))):  # the last one's stay
        how = digest_config({name: record.get(name) for name in HOW})[:ROWS_DIGITS]
        place = f"{record['benchmark']}[{record['rows'][:ROWS_DIGITS]}]", how
        found[place] = _fields(record, NOT_COMPARED)
    return found


def _named(found: Sequence[Mapping[tuple[str, str], Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The fields of each run's scores, their names prefixed alike in all of them."""
    most = Counter[str]()
    for scores in found:
        most |= Counter(benchmark for benchmark, _ in scores)
    return [
        {
            f"{benchmark if most[benchmark] == 1 else f'{benchmark[:-1]}, {how}]'}.{name}": value
            for (benchmark, how), fields in scores.items()
            for name, value in fields.items()
        }
        for scores in found
    ]


def _differences(found: Sequence[Mapping[str, Any]]) -> tuple[tuple[Difference, ...], int]:
    """(fields that differ, in order of name; how many are the same)."""
    names = sorted({name for fields in found for name in fields})
    values = {name: tuple(fields.get(name) for fields in found) for name in names}
    differing = tuple(Difference(name, each) for name, each in values.items() if any(v != each[0] for v in each))
    return differing, len(names) - len(differing)


def _fields(record: Mapping[str, Any], left_out: tuple[str, ...]) -> dict[str, Any]:
    """A JSON record as flat fields with dotted names."""
    return {name: value for name, value in flat(record) if name not in left_out}


def _shown(value: object) -> str:
    match value:
        case None:
            return "-"
        case float():
            return f"{value:.6g}"
        case _:
            return printable(str(value))
