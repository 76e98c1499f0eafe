"""Checkpoints: safetensors and JSON in a folder that appears whole or not at all.

A checkpoint holds the model, the reference encoder, AdamW's moments and where the run stands. No random state: masks,
times and noise follow from draw numbers (design, 5 "Order"), so an exact resume needs integers only. `state.json` names
the run it belongs to and size and crc32c of each file. A folder that lacks a file, or has a short one, is torn and is
passed over; one whose bytes changed is an error, since somebody should know. Nothing here is pickled.
"""

import dataclasses
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nextvid.train.fsdp import MOMENTS, like, local, moments_of, parameters_of, read
from storage import atomic
from storage.digest import crc32c
from storage.errors import DamagedError, RefusedError, UpstreamError

STATE = "state.json"
WHOLE = ("model.safetensors", "ema.safetensors")  # where rank 0 wrote alone; otherwise a file a rank (fsdp.py)

_NAME = re.compile(r"step_([0-9]{9})")


@dataclass(frozen=True)
class Identity:
    """What a checkpoint belongs to; a run accepts no other's."""

    run: str
    recipe: str  # digest of the configuration
    trainset: str
    mask_plan: str


@dataclass(frozen=True)
class Progress:
    """Where a run stands: steps taken, clips drawn, steps skipped in a row, effective rank at step 0."""

    step: int
    draws: int
    skipped: int = 0
    first_rank: float | None = None


def path_at(folder: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` steps."""
    return folder / f"step_{step:09d}"


def save(
    folder: Path,
    identity: Identity,
    progress: Progress,
    model: nn.Module,
    reference: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> Path:
    """Write the checkpoint of this step, or leave the one that stands there: both hold the same bytes."""
    path = path_at(folder, progress.step)
    if not clear(path):
        return path
    contents = {
        "model.safetensors": model.state_dict(),
        "ema.safetensors": reference.state_dict(),
        "optimizer.safetensors": moments_of(optimizer),
    }
    with atomic.staged_folder(str(path)) as staged:
        for name, tensors in contents.items():
            save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, staged / name)
        describe(staged, identity, progress)
    return path


def clear(path: Path) -> bool:
    """Whether there is a checkpoint to write; a torn one, a copy that was cut short say, is removed."""
    if _state(path) is not None:
        return False
    if path.exists():
        atomic.remove_tree(str(path))
    return True


def describe(staged: Path, identity: Identity, progress: Progress) -> None:
    """Write the state of a checkpoint whose other files stand in the folder."""
    state = {
        "identity": dataclasses.asdict(identity),
        "progress": dataclasses.asdict(progress),
        "files": {path.name: _facts(path) for path in sorted(staged.iterdir())},
    }
    atomic.publish_json(str(staged / STATE), state)


def complete(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [path for path in folder.glob("step_*") if _NAME.fullmatch(path.name) and _state(path) is not None]
    return sorted(found)


def step_of(path: Path) -> int:
    """Steps taken when this checkpoint was written."""
    match = _NAME.fullmatch(path.name)
    assert match, f"{path} is not a checkpoint"
    return int(match[1])


def read_progress(path: Path) -> Progress:
    """Where the run stood. Raises UpstreamError where `path` is no complete checkpoint."""
    return Progress(**_require(path)["progress"])


def read_identity(path: Path) -> Identity:
    """What the checkpoint belongs to. Raises UpstreamError where `path` is no complete checkpoint."""
    return Identity(**_require(path)["identity"])


def verify(path: Path) -> None:
    """Compare every file with its checksum; raises DamagedError."""
    for name, facts in _require(path)["files"].items():
        if _facts(path / name) != facts:
            raise DamagedError(
                f"{path / name}: bytes differ from their checksum; delete the folder {path} and ask again: "
                "the run resumes from the checkpoint before it"
            )


def load(
    path: Path,
    identity: Identity,
    model: nn.Module,
    reference: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
) -> Progress:
    """Bring model, reference encoder and, if given, optimiser to the state of `path`.

    Raises RefusedError, with what differs, if the checkpoint belongs to another run, recipe, trainset or mask plan or
    has tensors of other shapes, and DamagedError if its bytes changed.
    """
    refuse_other(path, identity)
    verify(path)
    if not (path / WHOLE[0]).is_file():
        files = [path / name for name in _require(path)["files"]]
        read(path, model, reference, optimizer, {name for file in files for name in shapes(file)})
        return read_progress(path)
    for name, module in zip(WHOLE, (model, reference), strict=True):
        fill(module, path / name)
    if optimizer is not None:
        _restore_moments(optimizer, load_tensors(path / "optimizer.safetensors"))
    return read_progress(path)


def fill(module: nn.Module, path: Path) -> None:
    """Give a module the tensors of a file. Raises RefusedError where names or shapes are others, before any is read."""
    there, here = shapes(path), {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    for name in sorted(there.keys() | here.keys()):
        if there.get(name) != here.get(name):
            sizes = [str(list(found[name])) if name in found else "absent" for found in (there, here)]
            raise RefusedError(
                f"{path}: {name} is {sizes[0]} there and {sizes[1]} in the model: another configuration wrote it"
            )
    read_whole = load_tensors(path)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            local(tensor).copy_(local(like(read_whole[name], tensor)))


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of a safetensors file by name, from its header alone. Raises DamagedError."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise DamagedError(f"{path}: not readable as safetensors: {error}") from None


def refuse_other(path: Path, wanted: Identity) -> None:
    """Raise RefusedError if the checkpoint is not of this run."""
    there = read_identity(path)
    differing = [
        f"{field.name} is {getattr(there, field.name)} there and {getattr(wanted, field.name)} here"
        for field in dataclasses.fields(Identity)
        if getattr(there, field.name) != getattr(wanted, field.name)
    ]
    if differing:
        raise RefusedError(
            f"checkpoint {path} does not belong to this run: {'; '.join(differing)}. "
            "A run never changes what it is trained on: start a new one"
        )


def prune(folder: Path, keep_last: int, keep_steps: Collection[int]) -> list[Path]:
    """Remove all but the last `keep_last` checkpoints and those of `keep_steps` (ends of stages)."""
    found = complete(folder)
    old = [path for path in found[: max(0, len(found) - keep_last)] if step_of(path) not in keep_steps]
    for path in old:
        atomic.remove_tree(str(path))
    return old


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file by name, on the CPU. Raises DamagedError."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise DamagedError(f"{path}: not readable as safetensors: {error}") from None


def _require(path: Path) -> dict[str, Any]:
    state = _state(path)
    if state is None:
        raise UpstreamError(f"{path} is no complete checkpoint: {STATE} or one of its files is missing or short")
    return state


def _state(path: Path) -> dict[str, Any] | None:
    """The state of a complete checkpoint, else None; so is one that its run removes meanwhile."""
    try:
        state: dict[str, Any] = atomic.read_json(str(path / STATE))
        sizes = {name: (path / name).stat().st_size for name in state["files"]}
    except (UpstreamError, FileNotFoundError):
        return None
    return state if all(sizes[name] == facts["size_bytes"] for name, facts in state["files"].items()) else None


def _facts(path: Path) -> dict[str, int]:
    data = path.read_bytes()
    return {"size_bytes": len(data), "crc32c": crc32c(data)}


def _restore_moments(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    parameters = parameters_of(optimizer)
    unknown = {name.split("/", 1)[1] for name in tensors} - set(parameters)
    assert not unknown, f"moments of parameters that the model has not: {sorted(unknown)}"
    for name, parameter in parameters.items():
        state = {moment: tensors[f"{moment}/{name}"] for moment in MOMENTS if f"{moment}/{name}" in tensors}
        # the step counter stays where AdamW keeps it: on the host, unless the kernel is fused
        fused = bool(optimizer.defaults.get("fused"))
        for moment, value in state.items():
            if moment != "step":
                value = like(value, parameter.detach())
            optimizer.state[parameter][moment] = value.to(parameter.device) if fused else value
