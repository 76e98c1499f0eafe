"""Ranks and devices: one code path for one CPU and for many GPUs under torchrun, with DDP or FSDP2.

A run with one rank has no process group. With more, DDP averages gradients, or FSDP2 cuts weights, gradients, moments
and average over the ranks (`how.shard`; in this project the word shard means a file of 256 rows). What a clip meets
follows from its draw number, so ranks change speed alone.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from nextvid.config.recipe import ExecutionConfig
from nextvid.machine import device_of
from storage.errors import ConfigError, LostError


@dataclass(frozen=True)
class Ranks:
    """This process's rank, how many there are, its device, and for how long ranks wait (None: as torch does)."""

    rank: int
    count: int
    device: torch.device
    limit: timedelta | None = field(default=None, kw_only=True)

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which alone writes and reports."""
        return self.rank == 0

    def wrap(self, model: nn.Module, partial: bool) -> nn.Module:
        """The model under DDP, or the model itself for one rank.

        `partial`: some parameters get no gradient, and DDP must search for them.
        """
        if self.count == 1:
            return model
        devices = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(
            model, device_ids=devices, find_unused_parameters=partial, gradient_as_bucket_view=True
        )

    def without_averaging(self, wrapped: nn.Module) -> AbstractContextManager[object]:
        """A block for all backward passes of a step but the last: gradients add up locally and are averaged once."""
        match wrapped:
            case DistributedDataParallel():
                return wrapped.no_sync()
            case FSDPModule():  # until the block ends every rank keeps whole gradients
                averaging = ExitStack()
                wrapped.set_requires_gradient_sync(False)
                averaging.callback(wrapped.set_requires_gradient_sync, True)
                return averaging
            case _:
                return nullcontext()

    def mean(self, values: Tensor) -> Tensor:
        """Mean over ranks of a small tensor, the same on all of them."""
        return self.sum(values).div_(self.count)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks, in place, the same on all of them."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def least(self, value: int) -> int:
        """The smallest of the ranks' values, on every rank."""
        if self.count == 1:
            return value
        values = torch.tensor(value, device=self.device)
        dist.all_reduce(values, dist.ReduceOp.MIN)
        return int(values)

    def wait(self) -> None:
        """Wait until every rank has called this."""
        if self.count > 1:
            dist.barrier()

    def from_first(self, value: str | None) -> str | None:
        """Rank 0's value, on every rank."""
        box = [value]
        if self.count > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]


@contextmanager
def join(how: ExecutionConfig) -> Iterator[Ranks]:
    """Join the process group that torchrun's variables describe; without them this process is the whole run.

    Raises LostError where several nodes train, and another one is gone or has not answered for `how.timeout_s`.
    """
    count, rank, local_rank = (
        int(os.environ.get(name, default))
        for name, default in (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0"))
    )
    device = torch.device("cpu")
    if device_of(how.device) != "cpu":
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"rank {local_rank} of this machine finds {torch.cuda.device_count()} GPUs; "
                "start fewer ranks, or choose device 'cpu'"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    limit = timedelta(seconds=how.timeout_s) if how.nodes > 1 else None
    try:
        if count > 1:
            backend, bound = (
                ("nccl", device) if device.type == "cuda" else ("gloo", None)
            )  # NCCL binds its device early
            dist.init_process_group(backend, device_id=bound, timeout=limit)
        yield Ranks(rank, count, device, limit=limit)
    except RuntimeError as error:  # on one machine torchrun knows which rank failed first
        if how.nodes > 1 and (isinstance(error, dist.DistError) or "gloo/transport" in str(error)):
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise LostError(f"rank {rank} misses another node: {lines[0]}") from error
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def apply_fsdp(
    module: nn.Module, blocks: Iterable[nn.Module], device: torch.device, *, trained: bool, bf16: bool
) -> None:
    """Cut a module's parameters over all ranks by FSDP2: each block, then the rest. Names do not change.

    In a trained module the rest stays gathered from forward to backward; without a backward it must not. `bf16`:
    blocks gather weights in bf16 and average gradients in fp32; the rest, with the embedding of times, stays fp32.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    # inputs are left alone: rotary tables and targets are fp32
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, reshard_after_forward=not trained)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, in place; the tensor itself if it is not cut."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor; if it is cut, every rank must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def from_first(value: Tensor | None, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Rank 0's fp32 value, on every rank's device; the others give None. Every rank must call this."""
    found = torch.empty(shape, device=device) if value is None else value.to(device)
    if dist.is_initialized():
        dist.broadcast(found, src=0)
    return found


def like(value: Tensor, tensor: Tensor) -> Tensor:
    """A whole value that every rank has, moved to the device of `tensor` and cut as it is."""
    moved = value.to(tensor.device)
    if not isinstance(tensor, DTensor):
        return moved
    return distribute_tensor(moved, tensor.device_mesh, tensor.placements, src_data_rank=None)
