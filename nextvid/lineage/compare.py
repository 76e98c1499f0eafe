"""Two runs side by side: the fields of config.json and of scores in which they differ.

Both are read as flat fields with dotted names, whose values are compared. Scores are comparable only over the same
rows, so a score is named by benchmark and rows digest; where the other run has no such score, its side is empty.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nextvid.config.overrides import flat
from nextvid.config.project import Project
from nextvid.lineage.trace import RunFacts, runs_of, scores_of
from nextvid.train.run import CONFIG
from storage.atomic import read_json
from storage.errors import ConfigError
from storage.root import DataRoot

# Fields of scores that are in config.json too, or are no result.
NOT_COMPARED = ("run", "recipe_digest", "checkpoint", "seconds", "trainset", "mask_plan", "recipe")
ROWS_DIGITS = 12  # as many as a run id has: enough to tell rows apart on a line


@dataclass(frozen=True)
class Difference:
    """One field; None where a run has no such field."""

    field: str
    first: Any
    second: Any


@dataclass(frozen=True)
class Comparison:
    """Where two runs differ, and how many fields they share."""

    runs: tuple[str, str]
    config: tuple[Difference, ...]
    scores: tuple[Difference, ...]
    same: int

    def text(self) -> str:
        """As text: one line for each difference."""
        lines = [f"{'':44} {self.runs[0]:>24} {self.runs[1]:>24}"]
        for title, found in (("config", self.config), ("scores", self.scores)):
            lines += [
                f"{title} {d.field:{43 - len(title)}} {_shown(d.first):>24} {_shown(d.second):>24}" for d in found
            ]
        lines.append(f"{len(self.config) + len(self.scores)} fields differ, {self.same} are the same")
        return "\n".join(lines)


def compare(project: Project, first: str, second: str) -> Comparison:
    """Compare two runs, by id or folder. Raises ConfigError where one is unknown."""
    runs = find(project, first), find(project, second)
    configs = [_fields(read_json(str(Path(run.folder, CONFIG))), ("run", "recipe_digest")) for run in runs]
    scores = [_scores(project.root, run) for run in runs]
    config, config_same = _differences(*configs)
    score, score_same = _differences(*scores)
    return Comparison((runs[0].run, runs[1].run), config, score, config_same + score_same)


def find(project: Project, what: str) -> RunFacts:
    """A run by its id or folder. Raises ConfigError that lists the known runs."""
    runs = list(runs_of(project.root))
    for facts in runs:
        if what == facts.run or Path(what).absolute() == Path(facts.folder):
            return facts
    known = ", ".join(f"{facts.run} ({facts.recipe})" for facts in runs) or "none"
    raise ConfigError(f"'{what}' is no run of {project.path}; there are: {known}")


def _scores(root: DataRoot, run: RunFacts) -> dict[str, Any]:
    """Fields of every score of a run, their names prefixed by benchmark and rows."""
    found: dict[str, Any] = {}
    for path in scores_of(root):
        record = read_json(str(path))
        if record["run"] == run.run:
            prefix = f"{record['benchmark']}[{record['rows'][:ROWS_DIGITS]}]"
            fields = _fields(record, NOT_COMPARED)
            found |= {f"{prefix}.{name}": value for name, value in fields.items()}
    return found


def _differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[tuple[Difference, ...], int]:
    """(fields that differ, in order of name; how many are the same)."""
    names = sorted({*first, *second})
    differing = [name for name in names if first.get(name) != second.get(name)]
    found = tuple(Difference(name, first.get(name), second.get(name)) for name in differing)
    return found, len(names) - len(found)


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
            return str(value)
