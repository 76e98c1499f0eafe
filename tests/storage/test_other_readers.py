"""A store of ours is an ordinary Zarr v3 array: zarr-python, zarrs and tensorstore read the same values from it.

The partial last shard is the case that differs between readers: its index marks the slots beyond the rows as absent.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import zarr

from storage.root import DataRoot
from storage.shard import ROWS_PER_SHARD
from tests.storage.stores import BATCH, FRAMES, commit_of, full_store, ids, new_store, spec, values

Read = Callable[[str, slice], np.ndarray]
ROWS = 2 * ROWS_PER_SHARD + 44
FAILED = 7


def _zarr_python(path: str, rows: slice) -> np.ndarray:
    return np.asarray(zarr.open_array(path, mode="r")[rows])


def _zarrs(path: str, rows: slice) -> np.ndarray:
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        array = zarr.open_array(path, mode="r")
        assert type(array.async_array.codec_pipeline).__name__ == "ZarrsCodecPipeline"
        return np.asarray(array[rows])


def _tensorstore(path: str, rows: slice) -> np.ndarray:
    opened = tensorstore.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}, read=True)
    return np.asarray(opened.result()[rows].read().result())


readers = pytest.mark.parametrize("read", [_zarr_python, _zarrs, _tensorstore])


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, np.ndarray]:
    """Path of an array of two full shards and a partial one, and what it holds; one row failed."""
    row_ids = ids(ROWS)
    root = DataRoot.open(str(tmp_path_factory.mktemp("readers")))
    _, part = full_store(root, ROWS, [row_ids[FAILED]])
    held = values(row_ids).astype("f2")
    held[FAILED] = np.nan
    return f"{part.path}/latent", held


@readers
@pytest.mark.parametrize(
    "rows",
    [
        slice(0, ROWS),
        slice(FAILED, FAILED + 1),
        slice(ROWS_PER_SHARD - 3, ROWS_PER_SHARD + 3),
        slice(2 * ROWS_PER_SHARD, ROWS),
        slice(ROWS - 1, ROWS),
    ],
    ids=["all", "failed row", "shard border", "partial shard", "last row"],
)
def test_equal_values(filled: tuple[str, np.ndarray], read: Read, rows: slice) -> None:
    path, held = filled
    found = read(path, rows)
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, held[rows])


@readers
def test_a_shard_nobody_wrote_is_nan(data_root: DataRoot, read: Read) -> None:
    part = new_store(data_root).plan_part(BATCH, FRAMES, ids(ROWS_PER_SHARD + 2))
    part.write_shard(1, values(ids(2, first=ROWS_PER_SHARD)), commit_of(part, 1))
    found = read(f"{part.path}/latent", slice(0, ROWS_PER_SHARD + 2))
    assert np.isnan(found[:ROWS_PER_SHARD]).all()
    np.testing.assert_array_equal(found[ROWS_PER_SHARD:], values(ids(2, first=ROWS_PER_SHARD)).astype("f2"))


@readers
def test_a_changed_index_is_refused(data_root: DataRoot, read: Read) -> None:
    """The index carries its checksum, so no reader takes values from a wrong place."""
    _, part = full_store(data_root, 5)
    path = Path(part.shard_path(0))
    data = bytearray(path.read_bytes())
    data[5 * spec().row_bytes(FRAMES) + 1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises((RuntimeError, ValueError)):
        read(f"{part.path}/latent", slice(0, 5))
