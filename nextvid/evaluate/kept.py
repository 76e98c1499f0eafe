"""What a score keeps on disk while heads learn: features of its training clips if they fit, and the vectors of k-NN.

One pass over the clips writes both into a folder below `cache.folder` of corpus.yaml. Features take at most
`cache.size_gb`; folders of scores that nobody computes any more are removed for them, the oldest first. Vectors of k-NN
are always written: they take as much as a token a clip. The record is written last; where it is, a score that was
killed goes on without the pass. Files are read memory-mapped, so they take no memory that the system cannot have back.

Axes: N samples of a split, n of a group, G segments, V levels, T times, S cells, L = G V T S tokens of a sample, D
width, P numbers of a vector.
"""

import itertools
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor

from nextvid.evaluate.features import FrozenEncoder
from nextvid.evaluate.stream import CLIPS_AT_ONCE, Streamed
from nextvid.train.distributed import Ranks
from storage import atomic
from storage.errors import ConflictError
from storage.locks import locked_or_holder
from storage.root import DataRoot

RECORD = "kept.json"
FEATURES = "features"
LOCK = "lock"


@dataclass(frozen=True)
class Kept:
    """What a pass left: how many tokens a sample has, its features if they fit, and vectors by name."""

    tokens: int
    features: Float[np.ndarray, "N L D"] | None
    vectors: Mapping[str, Float[np.ndarray, "N P"]]


def vectors_of(
    features: Float[Tensor, "n L D"], encoder: FrozenEncoder, segments: int
) -> dict[str, Float[Tensor, "n P"]]:
    """What k-NN compares: the mean of all tokens; that of each time of a clip, one after the other; and their changes.

    Changes are differences from each time to the next: what stays the same in a clip is most of its means, and hides
    what moves (docs/log.md, 30 November 2026). An encoder of single images has none.
    """
    axes = {"g": segments, "v": encoder.levels, "t": encoder.times}
    by_time = reduce(features.float(), "n (g v t s) d -> n t d", "mean", **axes)
    found = {"mean": features.float().mean(1), "by_time": rearrange(by_time, "n t d -> n (t d)")}
    if encoder.times > 1:
        found["change"] = rearrange(by_time.diff(dim=1), "n t d -> n (t d)")
    return {name: vectors.to(features.dtype) for name, vectors in found.items()}


def scratch_folder(root: DataRoot, name: str) -> Path:
    """Where the files of this name are while heads learn."""
    return Path(root.cache_folder, FEATURES, name)


@contextmanager
def scratch(root: DataRoot, name: str, ranks: Ranks) -> Iterator[Path]:
    """The folder for the files of one score of an encoder; while it is open, others do not remove it."""
    folder = scratch_folder(root, name)
    with ExitStack() as stack:
        if ranks.first:
            folder.mkdir(parents=True, exist_ok=True)
            holder = stack.enter_context(locked_or_holder(folder / LOCK))
            if holder is not None:
                raise ConflictError(f"{folder}: process {holder} computes this score; wait for it, or end it")
        ranks.wait()
        yield folder


def keep(
    streamed: Streamed, samples: int, segments: int, encoder: FrozenEncoder, folder: Path, bound_bytes: int,
    ranks: Ranks,
) -> Kept:  # fmt: skip
    """What a pass over all samples left in `folder`, which is made now if no whole one did. Every rank has a share.

    Features are kept if they fit `bound_bytes`, beside other scores that are being computed.
    """
    if not (folder / RECORD).is_file():
        at_once = max(1, CLIPS_AT_ONCE // segments)
        chunks = [range(first, min(first + at_once, samples)) for first in range(0, samples, at_once)]
        own = chunks[ranks.rank :: ranks.count]
        found = zip(own, streamed.of(np.asarray(chunk) for chunk in own), strict=True)
        first = next(found, None)
        record = None
        if ranks.first:
            assert first is not None, "a benchmark without a sample was planned"
            tokens, width = first[1].shape[1:]
            widths = {name: v.shape[1] for name, v in vectors_of(first[1], encoder, segments).items()}
            size_bytes = samples * first[1][0].nbytes
            fits = bound_bytes > 0 and _room(folder, size_bytes, bound_bytes)
            facts = {"tokens": tokens, "width": width, "dtype": str(first[1].cpu().numpy().dtype)}
            record = json.dumps({**facts, "features": fits, "vectors": widths})
        record = ranks.from_first(record)
        assert record is not None, "rank 0 sends the record"
        with ExitStack() as stack:
            names = [*json.loads(record)["vectors"], *([FEATURES] if json.loads(record)["features"] else [])]
            files = {name: stack.enter_context(_opened(folder / f"{name}.bin")) for name in names}
            for chunk, features in itertools.chain([] if first is None else [first], found):
                contents = {**vectors_of(features, encoder, segments), FEATURES: features}
                for name, file in files.items():
                    data = contents[name].cpu().numpy()
                    os.pwrite(file, data.tobytes(), chunk.start * data[0].nbytes)
            for file in files.values():
                os.fsync(file)
        ranks.wait()
        if ranks.first:
            atomic.publish_bytes(str(folder / RECORD), record.encode())
        ranks.wait()
    known = atomic.read_json(str(folder / RECORD))

    def mapped(name: str, *shape: int) -> np.ndarray:
        return np.memmap(folder / f"{name}.bin", known["dtype"], "r", shape=(samples, *shape))

    whole = mapped(FEATURES, known["tokens"], known["width"]) if known["features"] else None
    return Kept(known["tokens"], whole, {name: mapped(name, width) for name, width in known["vectors"].items()})


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        yield file
    finally:
        os.close(file)


def _room(folder: Path, needed: int, bound_bytes: int) -> bool:
    """Whether features of that size fit, once folders of scores that nobody computes now are removed."""
    folders = [other for other in folder.parent.iterdir() if other.is_dir() and other != folder]
    others = {other: sum(path.stat().st_size for path in other.iterdir()) for other in folders}
    for other in sorted(others, key=lambda path: path.stat().st_mtime):
        if needed + sum(others.values()) > bound_bytes >= needed:
            with locked_or_holder(other / LOCK) as holder:
                if holder is None:
                    atomic.remove_tree(str(other))
                    del others[other]
    return needed + sum(others.values()) <= bound_bytes and needed < shutil.disk_usage(folder).free
