"""Checkpoints of a run that is cut over ranks: every rank writes its shares while training goes on.

Training stops only while the shares are copied. A checkpoint gets its name when all ranks have written and rank 0 has
said what it holds; one that is interrupted leaves litter, like any other. What a checkpoint is stands in checkpoint.py.
"""

from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from torch import distributed as dist

from nextvid.train import checkpoint
from nextvid.train.checkpoint import Identity, Progress
from nextvid.train.distributed import Ranks
from nextvid.train.fsdp import tensors_of, write
from nextvid.train.step import Trained
from storage import atomic


@dataclass
class _Writing:
    """A checkpoint on its way. Rank 0 alone has a folder to name."""

    path: Path
    staged: Path
    progress: Progress
    written: "Future[object]"
    naming: ExitStack


class Background:
    """One checkpoint at a time; every rank calls the same methods in the same order."""

    def __init__(self, ranks: Ranks, identity: Identity) -> None:
        self._ranks, self._identity = ranks, identity
        self._group = dist.new_group(backend="gloo")
        self._writing: _Writing | None = None

    def begin(self, folder: Path, progress: Progress, trained: Trained) -> Path | None:
        """Start the checkpoint of this step, unless it is there; ends the one before it first, and returns that."""
        ended = self.finish()
        path, naming = checkpoint.path_at(folder, progress.step), ExitStack()
        staged = None
        if self._ranks.first and checkpoint.clear(path):
            staged = str(naming.enter_context(atomic.staged_folder(str(path))))
        staged = self._ranks.from_first(staged)
        if staged is not None:
            tensors = tensors_of(trained.model, trained.reference, trained.optimizer)
            written = write(Path(staged), tensors, self._group)
            self._writing = _Writing(path, Path(staged), progress, written, naming)
        return ended

    def finish(self) -> Path | None:
        """Wait for the checkpoint on its way, if any, and give it its name; returns its path."""
        writing, self._writing = self._writing, None
        if writing is None:
            return None
        with writing.naming:
            writing.written.result()
            dist.barrier(self._group)
            if self._ranks.first:
                checkpoint.describe(writing.staged, self._identity, writing.progress)
        dist.barrier(self._group)
        return writing.path

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writing is not None and kind is not None:
            self._writing.naming.__exit__(kind, error, trace)
        elif kind is None:
            self.finish()
