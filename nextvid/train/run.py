"""A run: its id, its folder, its lock, and config.json, which records what it is.

The id is a digest of recipe (with its seed), trainset, its pixels if they are read, mask plan, repeat and the weights
that it starts from where these are no run's of the project. How the run is carried out (ExecutionConfig) is in no
digest and may change between attempts.
"""

import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nextvid.config.project import Project
from nextvid.config.recipe import ExecutionConfig, RecipeConfig
from nextvid.config.strict import parse
from nextvid.train import checkpoint
from nextvid.train.checkpoint import Identity
from storage import atomic
from storage.digest import digest
from storage.errors import ConfigError, ConflictError, RefusedError, UpstreamError
from storage.locks import locked_or_holder
from storage.records import publish_record, read_record
from storage.root import RUN_CONFIG, DataRoot

ID_DIGITS = 12  # our choice: 48 bits, short enough for a path and a command line


@dataclass(frozen=True)
class Source:
    """What a run starts from (`init`): a checkpoint, of a run and step, or an exported encoder.

    `digest` tells weights apart whose path does not: None for a run of the project, whose id does.
    """

    folder: str
    run: str | None
    step: int | None
    digest: str | None

    def text(self) -> str:
        """In a few words."""
        return self.folder if self.run is None else f"run {self.run}, step {self.step}"


@dataclass(frozen=True)
class Run:
    """One training execution and what it reads."""

    id: str
    folder: Path
    recipe: RecipeConfig
    how: ExecutionConfig
    trainset: str
    mask_plan: str
    repeat: int
    overrides: tuple[str, ...]
    pixels: str | None = None  # digest of the trainset's pixels, for recipes that read them
    source: Source | None = None  # what the weights start from

    @property
    def identity(self) -> Identity:
        """What every checkpoint of this run records, and is compared with on resume."""
        return Identity(self.id, self.recipe.digest(), self.trainset, self.mask_plan)

    @property
    def checkpoints(self) -> Path:
        """Folder of all checkpoints."""
        return self.folder / "checkpoints"

    @property
    def complete(self) -> bool:
        """Whether the last step's checkpoint and both exported encoders are there."""
        exported = all((self.folder / name / "config.json").is_file() for name in ("encoder", "encoder_online"))
        return exported and self.newest_step() == self.recipe.steps

    def newest_step(self) -> int | None:
        """Step of the newest complete checkpoint."""
        found = checkpoint.complete(self.checkpoints)
        return checkpoint.step_of(found[-1]) if found else None


def run_id(
    recipe: RecipeConfig,
    trainset: str,
    mask_plan: str,
    repeat: int = 0,
    pixels: str | None = None,
    source: Source | None = None,
) -> str:
    """First 12 hex digits of the digest of what is trained, on what, with which masks, and which repeat of it."""
    inputs = {"what": recipe.digest(), "trainset": trainset, "mask_plan": mask_plan, "repeat": repeat}
    inputs |= {} if pixels is None else {"pixels": pixels}
    inputs |= {} if source is None or source.digest is None else {"init": source.digest}
    return digest(inputs)[:ID_DIGITS]


def plan_run(
    root: DataRoot,
    recipe: RecipeConfig,
    how: ExecutionConfig,
    trainset: str,
    mask_plan: str,
    repeat: int,
    overrides: Sequence[str],
    pixels: str | None = None,
    source: Source | None = None,
) -> Run:
    """The run of these inputs, whether or not it has begun."""
    name = run_id(recipe, trainset, mask_plan, repeat, pixels, source)
    folder = Path(root.run(recipe.name, name))
    return Run(name, folder, recipe, how, trainset, mask_plan, repeat, tuple(overrides), pixels, source)


def write_run(run: Run) -> None:
    """Publish config.json; `how` may differ from an earlier attempt's. Raises RefusedError if its identity differs."""
    if (run.folder / RUN_CONFIG).is_file():
        there = open_run(run.folder)
        if there.identity != run.identity:
            raise RefusedError(
                f"{run.folder / RUN_CONFIG} describes another run: {there.identity} instead of {run.identity}; "
                "the file was edited: restore it, or remove the folder"
            )
    publish_record(
        str(run.folder / RUN_CONFIG),
        {
            "run": run.id,
            "recipe_digest": run.recipe.digest(),
            "recipe": run.recipe.model_dump(mode="json"),
            "overrides": list(run.overrides),
            "trainset": run.trainset,
            "pixels": run.pixels,
            "mask_plan": run.mask_plan,
            "repeat": run.repeat,
            "init": None if run.source is None else asdict(run.source),
            "how": run.how.model_dump(mode="json"),
            "versions": {
                "nextvid": version("nextvid"),
                "torch": version("torch"),
                "python": platform.python_version(),
            },
        },
    )


def open_run(folder: Path) -> Run:
    """Read config.json. Raises UpstreamError if it is missing, ConfigError if it is not valid."""
    path = folder / RUN_CONFIG
    if not path.is_file():
        raise UpstreamError(f"{path} does not exist: there is no such run; `nextvid make pretrain` makes one")
    values: dict[str, Any] = read_record(str(path))
    recipe = parse(RecipeConfig, values["recipe"], f"{path}, recipe")
    how = parse(ExecutionConfig, values["how"], f"{path}, how")
    inputs = {name: values[name] for name in ("trainset", "mask_plan", "repeat", "pixels")}
    source = Source(**values["init"]) if values.get("init") else None
    return Run(values["run"], folder, recipe, how, overrides=tuple(values["overrides"]), source=source, **inputs)


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold `<folder>/lock` exclusively; raises ConflictError, naming the holder, if another process has it."""
    with locked_or_holder(folder / "lock") as holder:
        if holder is not None:
            raise ConflictError(
                f"{folder}: another process (id {holder}) is at work here; wait for it, or end it and ask again"
            )
        yield


def find_run(project: Project, recipe: str, run: str | None = None, *, ended: bool = True) -> Run:
    """The run named, else the recipe's newest complete one without overrides.

    Raises UpstreamError where there is none or, with `ended`, it is not complete, ConfigError for a run of another
    recipe.
    """
    latest = project.root.latest_run(recipe)
    if run is None and not atomic.exists(latest):
        raise UpstreamError(
            f"recipe {recipe} has no complete run without overrides: make 'pretrain' first, or name a run of it"
        )
    name = run or str(read_record(latest)["run"])
    folder = Path(project.root.run(recipe, name))
    others = [path.parent.name for path in folder.parent.parent.glob(f"*/{name}")]
    if others and recipe not in others:
        raise ConfigError(f"run {name} is of recipe {others[0]}, not of {recipe}: choose that recipe, or another run")
    found = open_run(folder)
    if ended and found.newest_step() != found.recipe.steps:
        raise UpstreamError(
            f"run {name} has {found.newest_step() or 0} of {found.recipe.steps} steps: finish it first with "
            f"'nextvid make pretrain --recipe {recipe}'"
        )
    return found


def find_checkpoint(run: Run, step: int | None = None) -> Path:
    """A run's checkpoint of a step, else its newest. Raises UpstreamError that lists those there are."""
    found = {checkpoint.step_of(path): path for path in checkpoint.complete(run.checkpoints)}
    if not found:
        raise UpstreamError(f"run {run.id} has no checkpoint yet: wait for its first, or resume it")
    if step is None:
        return found[max(found)]
    if step not in found:
        listed = ", ".join(map(str, found))
        raise UpstreamError(f"run {run.id} has no checkpoint of step {step}; there are those of {listed}")
    return found[step]
