"""Checkpoints in the background: training waits only while tensors are copied to host memory, on a GPU not even then.

With one rank or DDP a thread of rank 0 writes, reads back and names the folder. Under FSDP2 every rank writes its
parts; the folder gets its name when all have and rank 0 has described it. An interrupted checkpoint leaves unnamed
files, which the next attempt removes. The format is checkpoint.py's.
"""

import warnings
from concurrent.futures import Executor, Future
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

    def __init__(self, ranks: Ranks, identity: Identity, thread: Executor, *, cut: bool) -> None:
        """`thread` writes whole checkpoints; `cut`: FSDP2 cut the model, and all ranks write."""
        self._ranks, self._identity, self._thread = ranks, identity, thread
        # for these writes alone: on the step's group, a write beside all_reduce hung (docs/decisions/0006)
        self._group = dist.new_group(timeout=ranks.limit, backend="gloo") if cut else None
        self._writing: _Writing | None = None
        self._whole: Future[Path] | None = None  # rank 0's

    def begin(self, folder: Path, progress: Progress, trained: Trained) -> Path | None:
        """Start the checkpoint of this step, unless it exists; finishes the one before first, and returns its path."""
        ended = self.finish()
        path = checkpoint.path_at(folder, progress.step)
        if self._group is not None:
            self._begin_parts(path, progress, trained)
        elif self._ranks.first and checkpoint.clear(path):
            held = checkpoint.snapshot(trained.model, trained.reference, trained.optimizer)
            self._whole = self._thread.submit(checkpoint.write, path, self._identity, progress, held)
        return ended

    def _begin_parts(self, path: Path, progress: Progress, trained: Trained) -> None:
        naming, staged = ExitStack(), None
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

    def written(self) -> Path | None:
        """The path of a whole checkpoint that a thread has ended meanwhile; does not wait."""
        return self.finish() if self._whole is not None and self._whole.done() else None

    def finish(self) -> Path | None:
        """Wait for the checkpoint being written, if any, and name it; returns its path."""
        whole, self._whole = self._whole, None
        if whole is not None:
            return whole.result()
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
