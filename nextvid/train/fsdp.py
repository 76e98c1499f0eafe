"""A model cut over ranks by FSDP2, and its tensors written and read by torch's distributed checkpoint.

Each rank holds its share of weights, gradients, moments and average, and gathers a block when it is needed. Files are
safetensors, a file a rank, which name the place of each share in the whole: so any number of ranks reads them, one
included, and nothing is pickled (DCP's own format is). It holds no folders of checkpoints and no identities.
"""

import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # what AdamW keeps of each parameter


def cut(module: nn.Module, blocks: Iterable[nn.Module], device: torch.device, *, trained: bool) -> None:
    """Cut a module over all ranks, block by block, what stands around the blocks last. Names stay.

    What stands around the blocks of a trained module stays whole from forward to backward; where there is no backward,
    it must not.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh, reshard_after_forward=not trained)


def local(tensor: Tensor) -> Tensor:
    """This rank's share, in place; the tensor itself where it is not cut."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor; where it is cut, every rank must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(value: Tensor, tensor: Tensor) -> Tensor:
    """A whole value that every rank has, on the device of `tensor` and cut as it is."""
    moved = value.to(tensor.device)
    if not isinstance(tensor, DTensor):
        return moved
    return distribute_tensor(moved, tensor.device_mesh, tensor.placements, src_data_rank=None)


def parameters_of(optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """An optimiser's parameters by the names that build_optimizer gave them."""
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
    """Everything a checkpoint holds, as `model/<name>`, `ema/<name>` and `<moment>/<name>`; whole or cut."""
    parts = (("model", model), ("ema", reference))
    found = {f"{part}/{name}": p.detach() for part, m in parts for name, p in m.named_parameters()}
    return found if optimizer is None else found | moments_of(optimizer)


def write(folder: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup) -> "Future[object]":
    """Copy this rank's shares and write them in the background; the ranks agree over `group`, which nobody else uses.

    On the group of the step a write beside all_reduce hangs (research: training 3).
    """
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with warnings.catch_warnings():  # of its own deprecations, while it copies
        warnings.simplefilter("ignore")
        found = async_save(dict(tensors), storage_writer=writer, process_group=group)
    assert isinstance(found, Future), "the upload is what there is to wait for"
    return found


def read(
    folder: Path, model: nn.Module, reference: nn.Module, optimizer: torch.optim.Optimizer | None, names: set[str]
) -> None:
    """Fill model, reference and, if given, optimiser; each rank reads what it holds. `names` are those in the files."""
    tensors = tensors_of(model, reference)
    states: dict[nn.Parameter, dict[str, Tensor]] = {}
    for name, parameter in (parameters_of(optimizer) if optimizer is not None else {}).items():
        held = [moment for moment in MOMENTS if f"{moment}/{name}" in names]
        states[parameter] = {
            moment: torch.zeros(()) if moment == "step" else torch.zeros_like(parameter.detach()) for moment in held
        }
        tensors |= {f"{moment}/{name}": states[parameter][moment] for moment in held}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that one process alone means one process alone
        load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=not dist.is_initialized())
    if optimizer is not None:
        fused = bool(optimizer.defaults.get("fused"))
        for parameter, state in states.items():
            step = {"step": state["step"].to(parameter.device)} if fused and "step" in state else {}
            optimizer.state[parameter] = state | step
