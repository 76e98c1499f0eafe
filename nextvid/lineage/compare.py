"""Two runs side by side: the fields of config.json and of scores in which they differ.

Reads both as flat fields and compares values, nothing else: no judgement which is better. Scores are comparable only
where both runs were asked about the same rows, so a score is named by benchmark and rows digest, and one that the other
run has not been given stands against nothing.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nextvid.config.project import Project
from nextvid.lineage.trace import RunFacts, runs_of, scores_of
from nextvid.train.run import CONFIG
from storage.atomic import read_json
from storage.errors import ConfigError
from storage.root import DataRoot

SAME_BY_DESIGN = ("run", "recipe_digest", "checkpoint", "seconds", "trainset", "mask_plan", "recipe")  # in scores
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
        """For people: one line a difference."""
        lines = [f"{'':44} {self.runs[0]:>24} {self.runs[1]:>24}"]
        for title, found in (("config", self.config), ("scores", self.scores)):
            lines += [f"{title} {d.field:{43 - len(title)}} {_said(d.first):>24} {_said(d.second):>24}" for d in found]
        lines.append(f"{len(self.config) + len(self.scores)} fields differ, {self.same} are the same")
        return "\n".join(lines)


def compare(project: Project, first: str, second: str) -> Comparison:
    """Compare two runs, by id or folder. Raises ConfigError where one is unknown."""
    runs = find(project, first), find(project, second)
    configs = [_without(_flat(read_json(str(Path(run.folder, CONFIG)))), ("run", "recipe_digest")) for run in runs]
    scores = [_scores(project.root, run) for run in runs]
    config, config_same = _differences(*configs)
    score, score_same = _differences(*scores)
    return Comparison((runs[0].run, runs[1].run), config, score, config_same + score_same)


def find(project: Project, what: str) -> RunFacts:
    """A run by its id or folder. Raises ConfigError with the runs that there are."""
    runs = list(runs_of(project.root))
    for facts in runs:
        if what == facts.run or Path(what).absolute() == Path(facts.folder):
            return facts
    known = ", ".join(f"{facts.run} ({facts.recipe})" for facts in runs) or "none"
    raise ConfigError(f"'{what}' is no run of {project.path}; there are: {known}")


def _scores(root: DataRoot, run: RunFacts) -> dict[str, Any]:
    """Fields of every score of a run, each behind benchmark and rows."""
    found: dict[str, Any] = {}
    for path in scores_of(root):
        said = read_json(str(path))
        if said["run"] == run.run:
            prefix = f"{said['benchmark']}[{said['rows'][:ROWS_DIGITS]}]"
            fields = _without(_flat(said), SAME_BY_DESIGN)
            found |= {f"{prefix}.{name}": value for name, value in fields.items()}
    return found


def _differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[tuple[Difference, ...], int]:
    """(fields that differ, in order of name; how many are the same)."""
    names = sorted({*first, *second})
    differing = [name for name in names if first.get(name) != second.get(name)]
    found = tuple(Difference(name, first.get(name), second.get(name)) for name in differing)
    return found, len(names) - len(found)


def _flat(value: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings, and lists of them, as fields with dotted names; other lists are values."""
    return dict(_leaves("", value))


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:  # noqa: ANN401 - JSON is Any
    match value:
        case Mapping():
            pairs = [(str(key), item) for key, item in value.items()]
        case list() if any(isinstance(item, Mapping) for item in value):
            named = [
                item.get("name", number) if isinstance(item, Mapping) else number for number, item in enumerate(value)
            ]
            pairs = [(str(key), item) for key, item in zip(named, value, strict=True)]
        case _:
            yield name, value
            return
    for key, item in pairs:
        yield from _leaves(f"{name}.{key}" if name else key, item)


def _without(fields: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}


def _said(value: object) -> str:
    match value:
        case None:
            return "-"
        case float():
            return f"{value:.6g}"
        case _:
            return str(value)
