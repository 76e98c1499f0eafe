"""Clips of one backward on this rank, stage by stage: those asked for, or under `auto` as many as its device holds.

The formulas of nextvid/model/memory.py choose; the first step of each stage checks them, and halves what runs out of
memory. What is trained does not change: a step's gradients are the same mean over the same clips.
"""

import os
from collections.abc import Callable
from typing import TypeVar

import torch

from nextvid.config.recipe import ExecutionConfig, RecipeConfig
from nextvid.machine import memory_bytes
from nextvid.model.memory import GIB, divisors, rank_memory, remedy
from nextvid.train.distributed import Ranks
from storage.errors import RefusedError

CPU_SHARE = 0.5  # our choice, of the machine's memory: a CPU's process is killed without a warning when memory ends
T = TypeVar("T")


class MicroBatches:
    """The micro-batch of each stage."""

    def __init__(self, recipe: RecipeConfig, how: ExecutionConfig, ranks: Ranks) -> None:
        """Raises RefusedError, before anything is allocated, if a clip of some stage does not fit the device."""
        self._recipe, self._ranks, self._auto = recipe, ranks, how.micro_batch == "auto"
        self._how = how.model_copy(update={"ranks": ranks.count, "device": ranks.device.type})
        self._device = device_bytes(ranks)
        self._checked: set[int] = set()
        self._clips: list[int] = []
        for stage in recipe.stages:
            found = rank_memory(recipe, stage, self._how)
            fits = found.micro_batch(self._device)
            if not fits:
                raise RefusedError(
                    f"stage {stage.name}: one clip of {stage.frames} frames needs {found.total(1) / GIB:.1f} GiB on "
                    f"{ranks.device}, which has {self._device / GIB:.1f} GiB; "
                    f"{remedy(recipe, stage, self._how, self._device)}"
                )
            self._clips.append(fits if how.micro_batch == "auto" else how.micro_batch or found.share)

    def __getitem__(self, stage: int) -> int:
        return self._clips[stage]

    def take(self, stage: int, step: Callable[[int], T]) -> tuple[T, int]:
        """`step(clips)`, and from how many clips a first step of the stage was reduced to fit (else 0).

        A step that runs out of memory has changed nothing and is taken again with half the clips. Under DDP a rank does
        so alone: ranks average once, in a step's last backward. Under FSDP2 a rank that runs out alone ends the run by
        the others' timeout. Every rank must call this for the same steps.
        Raises RefusedError if not one clip fits, or if the micro-batch was asked for by number.
        """
        if stage in self._checked:
            return step(self._clips[stage]), 0
        planned = self._clips[stage]
        while True:
            try:
                stepped = step(self._clips[stage])
            except torch.OutOfMemoryError as error:
                self._halve(stage, str(error))
            else:
                break
            if self._ranks.device.type == "cuda":
                torch.cuda.empty_cache()
        self._clips[stage] = self._ranks.least(self._clips[stage])
        self._checked.add(stage)
        return stepped, 0 if self._clips[stage] == planned else planned

    def _halve(self, stage: int, error: str) -> None:
        clips, config = self._clips[stage], self._recipe.stages[stage]
        if not self._auto or clips == 1:
            by = remedy(self._recipe, config, self._how, self._device) if clips == 1 else "add --how micro_batch=auto"
            raise RefusedError(
                f"stage {config.name}: a micro-batch of {clips} ({config.frames} frames a clip) ran out of memory on "
                f"{self._ranks.device} ({error.splitlines()[0]}); {by}"
            ) from None
        share = config.batch // self._ranks.count
        self._clips[stage] = max(few for few in divisors(share) if few <= clips // 2)


def device_bytes(ranks: Ranks) -> int:
    """Memory that a rank may fill: its GPU's, or its part of CPU_SHARE of the machine's."""
    if ranks.device.type == "cuda":
        return torch.cuda.get_device_properties(ranks.device).total_memory
    return int(CPU_SHARE * memory_bytes()) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
