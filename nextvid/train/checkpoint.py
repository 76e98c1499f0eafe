"""Checkpoints: a folder of safetensors and JSON that appears whole or not at all.

A checkpoint holds the model, the reference encoder, AdamW's moments and the progress of the run. No random state:
masks, times and noise follow from draw numbers, so an exact resume needs integers only. One rank, or DDP's rank 0,
writes three files; under FSDP2 torch's distributed checkpoint writes a file per rank (async_checkpoint.py), which names
each part's place in the whole, so that any number of ranks can read it (docs/decisions/0006). `state.json` names the
run and the size and crc32c of each file. A folder without a file, or with a short one, is incomplete and skipped; one
whose bytes changed is an error.
"""

import dataclasses
import itertools
import re
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed

from nextvid.train.distributed import from_first, like, local
from storage import atomic
from storage.digest import file_sums
from storage.errors import DamagedError, RefusedError, UpstreamError
from storage.records import publish_record, read_record

STATE = "state.json"
WHOLE = ("model.safetensors", "ema.safetensors")  # if rank 0 wrote alone; otherwise a file per rank
FILES = (*WHOLE, "optimizer.safetensors")
MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # what AdamW keeps for each parameter

_NAME = re.compile(r"step_([0-9]{9})")


@dataclass(frozen=True)
class Identity:
    """The run that a checkpoint belongs to, and what it reads; a run refuses any other's checkpoint."""

    run: str
    recipe: str  # digest of the configuration
    trainset: str
    mask_plan: str


@dataclass(frozen=True)
class Progress:
    """Progress of a run: steps taken, clips drawn, steps skipped in a row, effective rank at step 0.

    `spikes` is the state of the guard against leaping losses, where the recipe has one (optim.py).
    """

    step: int
    draws: int
    skipped: int = 0
    first_rank: float | None = None
    spikes: tuple[float, ...] | None = None


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
    """Write the checkpoint of this step and wait for it, unless it is complete already: its bytes would be the same."""
    path = path_at(folder, progress.step)
    return write(path, identity, progress, snapshot(model, reference, optimizer)) if clear(path) else path


@dataclass(frozen=True)
class Snapshot:
    """Copies of all tensors in host memory by file; complete when `copied`, if any, has passed on the device."""

    files: dict[str, dict[str, Tensor]]
    copied: torch.cuda.Event | None


def snapshot(model: nn.Module, reference: nn.Module, optimizer: torch.optim.Optimizer) -> Snapshot:
    """Copy what a checkpoint holds; on a GPU the copies are queued, and the next step waits for them there alone."""
    tensors = (model.state_dict(), reference.state_dict(), moments_of(optimizer))
    on_gpu = next(model.parameters()).is_cuda

    def copied(tensor: Tensor) -> Tensor:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_gpu)
        return host.copy_(tensor.detach(), non_blocking=True)

    files = {name: {key: copied(v) for key, v in some.items()} for name, some in zip(FILES, tensors, strict=True)}
    event = torch.cuda.Event() if on_gpu else None
    if event is not None:
        event.record()
    return Snapshot(files, event)


def write(path: Path, identity: Identity, progress: Progress, held: Snapshot) -> Path:
    """Write a checkpoint and read it back. Raises DamagedError if the disk returns other numbers than were written."""
    if held.copied is not None:
        held.copied.synchronize()
    with atomic.staged_folder(str(path)) as staged:
        for name, tensors in held.files.items():
            save_file(tensors, staged / name)
            found = load_tensors(staged / name)
            pairs = (
                (found[key].flatten().view(torch.uint8), v.flatten().view(torch.uint8)) for key, v in tensors.items()
            )
            if not all(torch.equal(*pair) for pair in pairs):
                raise DamagedError(f"{staged / name} was not read back as it was written: check the disk, ask again")
        describe(staged, identity, progress)
    return path


def clear(path: Path) -> bool:
    """Whether the checkpoint must be written; an incomplete one, such as a copy that was cut short, is removed."""
    if _state(path) is not None:
        return False
    if path.exists():
        atomic.remove_tree(str(path))
    return True


def describe(staged: Path, identity: Identity, progress: Progress) -> None:
    """Write `state.json` of a checkpoint whose other files are in the folder."""
    state = {
        "identity": dataclasses.asdict(identity),
        "progress": dataclasses.asdict(progress),
        "files": {path.name: file_sums(path) for path in sorted(staged.iterdir())},
    }
    publish_record(str(staged / STATE), state)


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
    """Progress of the run at the checkpoint. Raises UpstreamError if `path` is no complete checkpoint."""
    values = _require(path)["progress"]
    return Progress(**values | {"spikes": tuple(values["spikes"]) if values.get("spikes") else None})


def verify(path: Path, part: int = 0, parts: int = 1) -> None:
    """Compare every file, or every `parts`-th from `part` on, with its checksum; raises DamagedError."""
    for name, facts in itertools.islice(_require(path)["files"].items(), part, None, parts):
        if file_sums(path / name) != facts:
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
    """Load model, reference encoder and, if given, optimiser from the checkpoint at `path`.

    Every rank must call this. Whole files are read by rank 0, which sends the tensors to the others; files of several
    ranks are checked by a rank each, and read where they are needed.
    Raises RefusedError, which names the difference, if the checkpoint belongs to another run, recipe, trainset or mask
    plan or has tensors of other shapes, and DamagedError if its bytes changed.
    """
    refuse_other(path, identity)
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if not (path / WHOLE[0]).is_file():
        verify(path, rank, ranks)
        files = [path / name for name in _require(path)["files"]]
        _load_parts(path, model, reference, optimizer, {name for file in files for name in shapes(file)})
        return read_progress(path)
    if rank == 0:
        verify(path)
    for name, module in zip(WHOLE, (model, reference), strict=True):
        fill(module, path / name)
    if optimizer is not None:
        file = path / FILES[-1]
        names, tensors, parameters = shapes(file), _read_by_first(file), parameters_of(optimizer)
        unknown = {name.split("/", 1)[1] for name in names} - set(parameters)
        assert not unknown, f"moments of parameters that the model does not have: {sorted(unknown)}"
        for name, parameter in parameters.items():
            held = {m: f"{m}/{name}" for m in MOMENTS if f"{m}/{name}" in names}
            values = {m: from_first(tensors.get(key), names[key], parameter.device) for m, key in held.items()}
            state = {m: v if m == "step" else like(v, parameter.detach()) for m, v in values.items()}
            _set_moments(optimizer, parameter, state)
    return read_progress(path)


def _load_parts(
    folder: Path, model: nn.Module, reference: nn.Module, optimizer: torch.optim.Optimizer | None, names: set[str]
) -> None:
    """Load from files of several ranks; each rank reads its own parts. `names` are the tensors in the files."""
    tensors = tensors_of(model, reference)
    states: dict[nn.Parameter, dict[str, Tensor]] = {}
    for name, parameter in (parameters_of(optimizer) if optimizer is not None else {}).items():
        held = [moment for moment in MOMENTS if f"{moment}/{name}" in names]
        states[parameter] = {
            moment: torch.zeros(()) if moment == "step" else torch.zeros_like(parameter.detach()) for moment in held
        }
        tensors |= {f"{moment}/{name}": states[parameter][moment] for moment in held}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about no_dist, for one rank
        load_distributed(
            tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=not dist.is_initialized()
        )
    if optimizer is not None:
        for parameter, state in states.items():
            _set_moments(optimizer, parameter, state)


def weights(path: Path, part: Literal["model", "ema"]) -> dict[str, Tensor]:
    """All weights of a checkpoint's model or reference encoder by name, on the CPU, whoever wrote it.

    Raises UpstreamError for an incomplete checkpoint, DamagedError if its bytes changed.
    """
    verify(path)
    if (path / WHOLE[0]).is_file():
        return load_tensors(path / f"{part}.safetensors")
    there = weight_shapes(path, part)
    tensors = {f"{part}/{name}": torch.empty(shape) for name, shape in there.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about no_dist
        load_distributed(dict(tensors), storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)
    return {name.removeprefix(f"{part}/"): tensor for name, tensor in tensors.items()}


def weight_shapes(path: Path, part: Literal["model", "ema"]) -> dict[str, tuple[int, ...]]:
    """Shapes of `weights`, from the headers of the files alone."""
    if (path / WHOLE[0]).is_file():
        return shapes(path / f"{part}.safetensors")
    found = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    tensors = {name: each for name, each in found.items() if isinstance(each, TensorStorageMetadata)}
    return {name.removeprefix(f"{part}/"): tuple(each.size) for name, each in tensors.items() if name.startswith(part)}


def fill(module: nn.Module, path: Path) -> None:
    """Load a file's tensors into a module. Raises RefusedError, before it reads any, if names or shapes differ."""
    there, here = shapes(path), {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    for name in sorted(there.keys() | here.keys()):
        if there.get(name) != here.get(name):
            sizes = [str(list(found[name])) if name in found else "absent" for found in (there, here)]
            raise RefusedError(
                f"{path}: {name} is {sizes[0]} there and {sizes[1]} in the model: another configuration wrote it"
            )
    read_whole = _read_by_first(path)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            value = from_first(read_whole.get(name), there[name], tensor.device)
            local(tensor).copy_(local(like(value, tensor)))


def _read_by_first(path: Path) -> dict[str, Tensor]:
    """Tensors of a file on rank 0; nothing on the others."""
    return load_tensors(path) if not dist.is_initialized() or dist.get_rank() == 0 else {}


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of a safetensors file by name, from its header alone. Raises DamagedError."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise DamagedError(f"{path}: not readable as safetensors: {error}") from None


def refuse_other(path: Path, identity: Identity) -> None:
    """Raise RefusedError if the checkpoint is another run's, UpstreamError if it is not complete."""
    there = Identity(**_require(path)["identity"])
    differing = [
        f"{field.name} is {getattr(there, field.name)} there and {getattr(identity, field.name)} here"
        for field in dataclasses.fields(Identity)
        if getattr(there, field.name) != getattr(identity, field.name)
    ]
    if differing:
        raise RefusedError(
            f"checkpoint {path} does not belong to this run: {'; '.join(differing)}. "
            "A run never changes what it is trained on: start a new one"
        )


def parameters_of(optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """An optimiser's parameters by name, as build_optimizer named them."""
    return {
        name: parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group["parameter_names"], group["params"], strict=True)
    }


def moments_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state as `<moment>/<parameter name>`; empty before the first step."""
    return {
        f"{moment}/{name}": optimizer.state[parameter][moment]
        for name, parameter in parameters_of(optimizer).items()
        for moment in MOMENTS
        if moment in optimizer.state[parameter]
    }


def tensors_of(
    model: nn.Module, reference: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> dict[str, Tensor]:
    """All tensors of a checkpoint: `model/<name>`, `ema/<name>` and `<moment>/<name>`, whole or cut."""
    parts = (("model", model), ("ema", reference))
    found = {f"{part}/{name}": p.detach() for part, m in parts for name, p in m.named_parameters()}
    return found if optimizer is None else found | moments_of(optimizer)


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
    """`state.json` of a complete checkpoint, else None, also if its run removes it meanwhile."""
    try:
        state: dict[str, Any] = read_record(str(path / STATE))
        if absent := {"identity", "progress", "files"} - state.keys():
            raise KeyError(*absent)
        if outside := [name for name in state["files"] if Path(name).name != name]:
            raise DamagedError(f"{path / STATE} names {outside[0]!r}, which is no file of its folder: restore it")
        sizes = {name: (path / name).stat().st_size for name in state["files"]}
        whole = all(sizes[name] == facts["size_bytes"] for name, facts in state["files"].items())
    except (UpstreamError, FileNotFoundError):
        return None
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{path / STATE} describes no checkpoint ({error}): restore it, or remove {path}") from None
    return state if whole else None


def _set_moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, state: dict[str, Tensor]) -> None:
    """AdamW keeps the step counter on the host, unless its kernel is fused."""
    if "step" in state and optimizer.defaults.get("fused"):
        state["step"] = state["step"].to(parameter.device)
    optimizer.state[parameter] = state
