"""Checkpoints in the background under FSDP2: every rank writes its parts while training continues.

Training waits only while the parts are copied to host memory. A checkpoint gets its name when all ranks have written
and rank 0 has described it; an interrupted one leaves unnamed files, which the next attempt removes. The format is
checkpoint.py's.
"""

import warnings
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from torch import distributed as dist
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_saver import async_save

from nextvid.train import checkpoint
from nextvid.train.checkpoint import Identity, Progress, tensors_of
from nextvid.train.distributed import Ranks
from nextvid.train.step import Trained
from storage import atomic


@dataclass
class _Writing:
    """A checkpoint that is being written. Only rank 0 renames the folder."""

    path: Path
    staged: Path
    progress: Progress
    written: "Future[object]"
    naming: ExitStack


class AsyncCheckpoints:
    """Writes one checkpoint at a time; every rank calls the same methods in the same order."""

    def __init__(self, ranks: Ranks, identity: Identity) -> None:
        self._ranks, self._identity = ranks, identity
        # for these writes alone: on the step's group, a write beside all_reduce hung (docs/decisions/0006)
        self._group = dist.new_group(backend="gloo")
        self._writing: _Writing | None = None

    def begin(self, folder: Path, progress: Progress, trained: Trained) -> Path | None:
        """Start the checkpoint of this step, unless it exists; finishes the one before first, and returns its path."""
        ended = self.finish()
        path, naming = checkpoint.path_at(folder, progress.step), ExitStack()
        staged = None
        if self._ranks.first and checkpoint.clear(path):
            staged = str(naming.enter_context(atomic.staged_folder(str(path))))
        staged = self._ranks.from_first(staged)
        if staged is not None:
            tensors = tensors_of(trained.model, trained.reference, trained.optimizer)
            writer = HuggingFaceStorageWriter(staged, save_distributed=True)
            with warnings.catch_warnings():  # its own deprecations
                warnings.simplefilter("ignore")
                written = async_save(dict(tensors), storage_writer=writer, process_group=self._group)
            assert isinstance(written, Future), "async_save returns the future of the write"
            self._writing = _Writing(path, Path(staged), progress, written, naming)
        return ended

    def finish(self) -> Path | None:
        """Wait for the checkpoint being written, if any, and name it; returns its path."""
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
