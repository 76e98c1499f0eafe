"""Ranks, devices and gradient averaging: one code path for one CPU and for many GPUs under torchrun.

Holds the process group's life and DDP; a model that is cut over ranks instead comes from fsdp.py. A run with one rank
has no process group at all. It shares out no data (loader.py) and draws nothing: what a clip meets follows from its
draw number, so ranks change speed alone.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from nextvid.config.recipe import ExecutionConfig
from nextvid.machine import device_of
from storage.errors import ConfigError


@dataclass(frozen=True)
class Ranks:
    """This process among all of the run."""

    rank: int
    count: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes and reports."""
        return self.rank == 0

    def wrap(self, model: nn.Module, partial: bool) -> nn.Module:
        """The model with averaged gradients, or the model itself where there is one rank.

        `partial`: some parameters get no gradient, and DDP must look for them.
        """
        if self.count == 1:
            return model
        devices = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices, find_unused_parameters=partial)

    def without_averaging(self, wrapped: nn.Module) -> AbstractContextManager[None]:
        """For every backward of a step but the last: gradients add up and are sent once."""
        match wrapped:
            case DistributedDataParallel():
                return wrapped.no_sync()
            case FSDPModule():
                return _unsent(wrapped)
            case _:
                return nullcontext()

    def mean(self, values: Tensor) -> Tensor:
        """Mean over ranks of a small tensor, the same on all of them."""
        if self.count > 1:
            dist.all_reduce(values)
            values /= self.count
        return values

    def wait(self) -> None:
        """Until every rank is here."""
        if self.count > 1:
            dist.barrier()

    def from_first(self, value: str | None) -> str | None:
        """A text that rank 0 knows, on every rank."""
        box = [value]
        if self.count > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]


@contextmanager
def _unsent(model: FSDPModule) -> Iterator[None]:
    """Whole gradients stay on every rank meanwhile."""
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


@contextmanager
def join(how: ExecutionConfig) -> Iterator[Ranks]:
    """Join the process group that torchrun's variables describe; without them this process is the whole run."""
    count, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    device = _device(how, int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if count > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", device_id=_bound(device))
    try:
        yield Ranks(rank, count, device)
    finally:
        if count > 1:
            dist.destroy_process_group()


def _device(how: ExecutionConfig, local_rank: int) -> torch.device:
    wanted = device_of(how.device)
    if wanted == "cpu":
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"rank {local_rank} of this machine finds {torch.cuda.device_count()} GPUs; "
            "start fewer ranks, or choose device 'cpu'"
        )
    return torch.device("cuda", local_rank)


def _bound(device: torch.device) -> torch.device | None:
    """NCCL wants to know its device early; gloo wants none."""
    return device if device.type == "cuda" else None
