"""Exports hold the store's latents exactly, in three formats, and are written once."""

import io
import json
import struct
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import nextvid
from nextvid.trainset.dataset import LatentDataset
from nextvid.trainset.exported import Format, export_latents
from storage.errors import ConflictError
from tests.nextvid.train.corpus import make_project

FORMATS: tuple[Format, ...] = ("parquet", "webdataset", "mds")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> LatentDataset:
    """Nine clips of four frames."""
    return nextvid.open_latents(make_project(tmp_path_factory.mktemp("exported")).path, 4)


def read(folder: Path, format_: Format) -> dict[str, tuple[dict[str, Any], np.ndarray]]:
    """Facts and latents by row id, as the formats' specifications say."""
    shape = json.loads((folder / "info.json").read_text())["shape"]
    rows: list[dict[str, Any]] = []
    match format_:
        case "parquet":
            rows = pl.read_parquet(folder / "*.parquet").to_dicts()
        case "webdataset":
            for path in sorted(folder.glob("*.tar")):
                with tarfile.open(path) as tar:
                    members = {one.name: data.read() for one in tar if (data := tar.extractfile(one))}
                for name in (name for name in members if name.endswith(".json")):
                    latents = np.load(io.BytesIO(members[name.replace(".json", ".latents.npy")]))
                    rows.append(json.loads(members[name]) | {"latents": latents.tobytes()})
        case "mds":
            for shard in json.loads((folder / "index.json").read_text())["shards"]:
                rows += read_mds((folder / shard["raw_data"]["basename"]).read_bytes(), shard)
    return {row["row_id"]: (row, np.frombuffer(row.pop("latents"), "<f2").reshape(shape)) for row in rows}


def read_mds(data: bytes, shard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Samples of a shard as mosaicml-streaming 0.13 reads them (MDSReader.get_sample_data, MDSReader.decode_sample)."""
    assert len(data) == shard["raw_data"]["bytes"]
    (count,) = struct.unpack_from("<I", data)
    assert count == shard["samples"]
    for number in range(count):
        begin, end = struct.unpack_from("<2I", data, 4 * (1 + number))
        sizes, at = [], begin
        for size in shard["column_sizes"]:
            if size is None:
                (size,) = struct.unpack_from("<I", data, at)
                at += 4
            sizes.append(size)
        row: dict[str, Any] = {}
        for name, encoding, size in zip(shard["column_names"], shard["column_encodings"], sizes, strict=True):
            row[name] = data[at : at + size] if encoding.startswith("ndarray") else data[at : at + size].decode()
            at += size
        assert at == end
        yield row


@pytest.mark.parametrize("format_", FORMATS)
def test_rows_are_exported_as_they_are_stored(data: LatentDataset, tmp_path: Path, format_: Format) -> None:
    found = export_latents(data, tmp_path / "out", format_, file_bytes=4 * data[0].nbytes)
    assert (found.rows, found.files, found.written) == (9, 3, 3)
    rows = read(tmp_path / "out", format_)
    assert len(rows) == 9
    for index in range(9):
        facts, latents = rows[data.row(index).row_id]
        assert np.array_equal(latents, data[index])
        assert (facts["uri"], facts["dataset"], facts["labels"]) == ("/nowhere", "films", "null")


@pytest.mark.parametrize("format_", FORMATS)
def test_an_export_that_was_stopped_writes_what_is_missing(
    data: LatentDataset, tmp_path: Path, format_: Format
) -> None:
    out, size = tmp_path / "out", 4 * data[0].nbytes
    export_latents(data, out, format_, file_bytes=size)
    whole = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / sorted(name for name in whole if name[0] == "0")[1]).unlink()
    assert export_latents(data, out, format_, file_bytes=size).written == 1
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole


def test_an_export_does_not_mix_with_other_files(data: LatentDataset, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConflictError, match="holds other files"):
        export_latents(data, tmp_path, "parquet")
    export_latents(data, tmp_path / "out", "parquet")
    with pytest.raises(ConflictError, match="holds another export"):
        export_latents(data, tmp_path / "out", "mds")
