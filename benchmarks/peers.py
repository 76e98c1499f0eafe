"""Formats with packages of their own (extra `bench`): each written uncompressed and read as its documentation says.

A package that cannot be imported is named as absent. Lance, HF datasets, MDS and litdata give clips by number; batches
of Lance without workers come in stored order, those of MDS, litdata and WebDataset in a shuffled order of their own, as
users have it.

Axes: F frames, C channels, h w cells.
"""

import importlib
import importlib.util
import sys
import types
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.clips import BATCH, CLIP_BYTES, SHAPE, Clips
from benchmarks.sources import ByNumber, Read, Source, by_number, loaded, stacked

SHARD_BYTES = 1 << 26  # 64 MiB, as our shards (67 MB) and the formats' own defaults
SHUFFLE_BUFFER = 256  # clips, WebDataset: as many as one of our shards


def found_peers() -> tuple[tuple[Source, ...], list[dict[str, str]]]:
    """Those that can be imported, and the name and reason of each that cannot."""
    peers = {
        "lance": Source("Lance", _write_lance, _open_lance, _lance_batches),
        "datasets": Source("HF datasets (arrow)", _write_arrow, _open_arrow, _arrow_batches),
        "streaming": Source("mosaicml-streaming MDS", _write_mds, _open_mds, _mds_batches),
        "litdata": Source("litdata, batch_decode off", _write_litdata, _open_litdata, _litdata_batches),
        "webdataset": Source("WebDataset", _write_tar, None, _tar_batches),
    }
    found, absent = [], []
    for package, source in peers.items():
        try:
            with _torchvision() if package == "streaming" else nullcontext():
                importlib.import_module(package)
        except ImportError as error:
            absent.append({"name": source.name, "reason": str(error)})
        else:
            found.append(source)
    return tuple(found), absent


@contextmanager
def _torchvision() -> Iterator[None]:
    """Where it is missing, empty modules for MDS, which imports it for classes that nobody here uses."""
    if importlib.util.find_spec("torchvision") is not None:
        yield
        return
    names = ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional")
    modules = {name: types.ModuleType(name) for name in names}
    for module in modules.values():
        module.__spec__ = ModuleSpec(module.__name__, None)
        vars(module).update(VisionDataset=object, to_tensor=None)
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def _clip(data: bytes | memoryview) -> np.ndarray:
    """A clip from bytes or a buffer, without a copy."""
    return np.frombuffer(data, np.float16).reshape(SHAPE)


def _write_lance(clips: Clips, folder: Path) -> None:
    import lance
    import pyarrow

    column = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(clips.reshape(-1)), CLIP_BYTES // 2)
    lance.write_dataset(pyarrow.table({"clip": column}), str(folder / "clips.lance"))


def _open_lance(folder: Path) -> Read:
    import lance

    data = lance.dataset(str(folder / "clips.lance"))

    def read(clip: int) -> np.ndarray:
        values = data.take([clip]).column("clip").chunk(0).flatten()
        return np.asarray(values.to_numpy(zero_copy_only=True)).reshape(SHAPE)

    return read


def _lance_tensor(batch: Any, **_: object) -> Tensor:  # noqa: ANN401 - pyarrow is not always there
    # Lance passes options that do not apply to one column; a view, as its own conversion gives one
    values = batch.column("clip").flatten().to_numpy(zero_copy_only=True)
    return torch.from_numpy(values.reshape(-1, *SHAPE))


def _lance_batches(folder: Path, order: Sequence[int], workers: int) -> Iterable[Tensor]:
    """A scan in stored order, which threads of Lance's own read ahead; with workers rows by number.

    Lance must not be forked (its documentation), so workers are spawned, as its `get_safe_loader` does.
    """
    from lance.torch.data import LanceDataset

    if workers:
        return loaded(ByNumber(_open_lance, folder), workers, stacked, sampler=order, multiprocessing_context="spawn")
    warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
    found: Iterable[Tensor] = LanceDataset(
        str(folder / "clips.lance"), BATCH, columns=["clip"], to_tensor_fn=_lance_tensor
    )
    return found


def _write_arrow(clips: Clips, folder: Path) -> None:
    import datasets

    def rows() -> Iterator[dict[str, bytes]]:
        for clip in clips:
            yield {"clip": clip.tobytes()}

    features = datasets.Features({"clip": datasets.Value("large_binary")})
    written = datasets.Dataset.from_generator(rows, features=features, cache_dir=str(folder / "cache"))
    written.save_to_disk(str(folder / "clips"))


def _open_arrow(folder: Path) -> Read:
    import datasets

    data = datasets.load_from_disk(str(folder / "clips")).with_format("arrow")

    def read(clip: int) -> np.ndarray:
        return _clip(memoryview(data[clip].column("clip")[0].as_buffer()))

    return read


def _arrow_batches(folder: Path, order: Sequence[int], workers: int) -> Iterable[Tensor]:
    return by_number(_open_arrow, folder, order, workers)


def _write_mds(clips: Clips, folder: Path) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=str(folder), columns={"clip": "bytes"}, size_limit=SHARD_BYTES) as writer:
        for clip in clips:
            writer.write({"clip": clip.tobytes()})


def _open_mds(folder: Path) -> Read:
    from streaming import StreamingDataset

    data = StreamingDataset(local=str(folder), batch_size=BATCH)

    def read(clip: int) -> np.ndarray:
        return _clip(data[clip]["clip"])

    return read


def _mds_batches(folder: Path, _order: Sequence[int], workers: int) -> Iterable[Tensor]:
    from streaming import StreamingDataset

    return loaded(StreamingDataset(local=str(folder), batch_size=BATCH, shuffle=True), workers, stacked_bytes)


def _write_litdata(clips: Clips, folder: Path) -> None:
    from litdata.streaming.cache import Cache

    cache = Cache(str(folder), chunk_bytes=SHARD_BYTES)
    for number, clip in enumerate(clips):
        cache[number] = {"clip": clip}  # as bytes it would become an Arrow table, decoded chunk by chunk
    cache.done()
    cache.merge()


def _open_litdata(folder: Path) -> Read:
    from litdata import StreamingDataset

    data = StreamingDataset(str(folder), batch_decode=False)

    def read(clip: int) -> np.ndarray:
        found: np.ndarray = data[clip]["clip"]
        return found

    return read


def _litdata_batches(folder: Path, _order: Sequence[int], workers: int) -> Iterable[Tensor]:
    from litdata import StreamingDataLoader, StreamingDataset

    data = StreamingDataset(str(folder), shuffle=True, batch_decode=False)
    found: Iterable[Tensor] = StreamingDataLoader(
        data, batch_size=BATCH, num_workers=workers, persistent_workers=workers > 0, collate_fn=stacked_arrays
    )
    return found


def stacked_bytes(samples: Sequence[dict[str, bytes]]) -> Tensor:
    return stacked([_clip(sample["clip"]) for sample in samples])


def stacked_arrays(samples: Sequence[dict[str, np.ndarray]]) -> Tensor:
    return stacked([sample["clip"] for sample in samples])


def _write_tar(clips: Clips, folder: Path) -> None:
    import webdataset

    with webdataset.ShardWriter(f"{folder}/%04d.tar", maxsize=SHARD_BYTES, verbose=0) as writer:
        for number, clip in enumerate(clips):
            writer.write({"__key__": f"{number:06d}", "clip": clip.tobytes()})


def _tar_batches(folder: Path, _order: Sequence[int], workers: int) -> Iterable[Tensor]:
    import webdataset

    shards = [str(path) for path in sorted(folder.glob("*.tar"))]
    data = webdataset.WebDataset(shards, shardshuffle=len(shards), empty_check=False).shuffle(SHUFFLE_BUFFER)
    batches = data.map(_tar_clip).batched(BATCH, collation_fn=stacked)
    found: Iterable[Tensor] = webdataset.WebLoader(
        batches, batch_size=None, num_workers=workers, persistent_workers=workers > 0
    )
    return found


def _tar_clip(sample: dict[str, bytes]) -> np.ndarray:
    return _clip(sample["clip"])
