"""Copy a trainset from another root into this one: what training on it reads and nothing else, every byte checked.

Stopped at any point, it goes on where it was: a shard's commit is written after its bytes, and the trainset's record
after everything that it cites.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from nextvid.config.project import Project
from nextvid.making.progress import OnProgress, Progress, silent
from nextvid.making.publishing import publish_latest, read_latest
from nextvid.trainset.files import RECORD
from nextvid.trainset.pixels import frozen_pixels
from nextvid.trainset.trainset import Trainset
from storage import atomic, listing
from storage.errors import ConfigError, ConflictError, DamagedError, UpstreamError
from storage.part import Part
from storage.remote import is_local, read_exactly, read_pieces, refuse_protocol
from storage.root import DataRoot
from storage.shard_files import AT_ONCE, cited_parts, shard_fault, shards_of
from storage.store import LatentStore, PixelStore, Store


@dataclass(frozen=True)
class Pulled:
    """What was copied, and what was there already."""

    trainset: str
    source: str
    root: str
    shards: int
    copied: int
    copied_bytes: int
    is_latest: bool  # whether recipes train on it unless another is named

    def text(self) -> str:
        """As text."""
        there = self.shards - self.copied
        lines = [f"trainset {self.trainset}: {self.copied} of {self.shards} shards copied, {self.copied_bytes:,} bytes"]
        lines += [f"{there} were there"] if there else []
        named = "" if self.is_latest else f" --trainset {self.trainset}"
        return "\n".join([*lines, f"next: nextvid make pretrain --recipe NAME{named}"])


def pull(project: Project, trainset: str, url: str, on_progress: OnProgress = silent) -> Pulled:
    """Copy `trainset` (a digest) from the root at `url`, a folder or URL, into the project's root.

    Raises ConfigError for a root that is this one, ConflictError where this one has another batch of the same name,
    UpstreamError where there is no such trainset, DamagedError where bytes of it are not as committed, RefusedError if
    one of its rows was withdrawn in either root.
    """
    refuse_protocol(url, "URL", project.asked.protocols)
    root = project.root
    source = DataRoot.open(url, root.runs_url, root.cache_folder, root.cache_bytes)  # which keep its tables of rows
    if source.url == root.url:
        raise ConfigError(f"{url} is this project's own root: name the root to copy from")
    opened = Trainset.open(source, trainset)
    opened.check()
    opened.refuse_withdrawn(opened.lengths)
    stores: list[tuple[Store[Any], Mapping[int, np.ndarray]]] = [
        (LatentStore(source, opened.spec), {frames: opened.rows(frames) for frames in opened.lengths})
    ]
    for pixels in frozen_pixels(source, opened):
        pixels.check()
        stores.append((PixelStore(source, pixels.spec), {frames: pixels.rows(frames) for frames in opened.lengths}))
    shards, copied, copied_bytes = 0, 0, 0
    for store, rows in stores:
        type(store)(root, store.spec).create()
        total = sum(len(numbers) for some in rows.values() for numbers in shards_of(some).values())
        for done, size_bytes in enumerate(_copy_shards(store, opened, rows, root), 1):
            copied, copied_bytes = copied + (size_bytes > 0), copied_bytes + size_bytes
            on_progress(Progress(f"{store.noun} of trainset {trainset}", done, total))
        shards += total
    files = listing.files_below(source.pointed("trainset", trainset))
    for path in sorted(files, key=lambda path: path.endswith(f"/{RECORD}")):  # without its record no folder is read
        if not atomic.is_temporary(path):
            _copy_new(path, files[path], _place(path, source, root))
    found = Trainset.open(root, trainset)
    found.check()
    found.refuse_withdrawn(found.lengths)
    if read_latest(root, "trainset") is None:
        publish_latest(root, "trainset", trainset)
    return Pulled(
        trainset, source.url, root.url, shards, copied, copied_bytes, read_latest(root, "trainset") == trainset
    )


def _copy_shards(
    store: Store[Any], trainset: Trainset, rows: Mapping[int, np.ndarray], root: DataRoot
) -> Iterator[int]:
    """Copy each shard that rows are in, several at a time; the bytes of each, 0 where it was there."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for part, numbers, files in cited_parts(store, trainset.batches, rows):
            plan, place = atomic.read_bytes(part.plan_path), _place(part.plan_path, store.root, root)
            is_planned = atomic.exists(place)
            if is_planned and atomic.read_bytes(place) != plan:
                raise ConflictError(
                    f"{place} plans other rows than {part.plan_path}: this root has a batch {part.batch} of its own. "
                    "Pull into a root that has none"
                )
            for path in part.metadata_paths:
                _copy_new(path, files.get(path), _place(path, store.root, root))
            if not is_planned:
                atomic.publish_bytes(place, plan)
            yield from pool.map(partial(_copy_shard, part, files, store.root, root), numbers)


def _copy_shard(part: Part[Any], files: Mapping[str, int], source: DataRoot, root: DataRoot, number: int) -> int:
    path, commit = part.shard_path(number), part.commit_path(number)
    size_bytes, place = files.get(path), _place(path, source, root)
    if size_bytes is None or commit not in files:
        if atomic.exists(path) and atomic.exists(commit):
            raise listing.untrue(f"{path} and its commit are there, and their folder was listed without them")
        raise DamagedError(f"{path} or its commit is not there. Remedy: {part.remedy(number)} in {source.url}")
    if listing.size_bytes(place) == size_bytes and atomic.exists(_place(commit, source, root)):
        return 0
    try:
        if is_local(path):
            data = atomic.read_bytes(path)
            if fault := shard_fault(part, number, data):
                raise DamagedError(f"{path}: {fault}")
        else:
            data = read_exactly(path, size_bytes, fault=partial(shard_fault, part, number))
    except DamagedError as error:
        raise DamagedError(f"{error}. Remedy: {part.remedy(number)} in {source.url}") from error
    atomic.publish_bytes(place, data)
    _copy_new(commit, files[commit], _place(commit, source, root))
    return size_bytes


def _copy_new(path: str, size_bytes: int | None, place: str) -> None:
    """Copy a file of any size that was listed, unless there is one."""
    if atomic.exists(place):
        return
    if size_bytes is None:
        raise UpstreamError(f"{path} does not exist: 'nextvid verify' at its root says what to do")
    with atomic.staged_file(place) as temporary, temporary.open("xb") as file:
        for piece in read_pieces(path, size_bytes):
            file.write(piece)


def _place(path: str, source: DataRoot, root: DataRoot) -> str:
    return f"{root.url}{path.removeprefix(source.url)}"
