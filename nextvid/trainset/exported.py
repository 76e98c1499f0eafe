"""Rows of a trainset as files that other training code reads: parquet, WebDataset or MDS.

A file holds some hundred rows in the store's order; the same files come out each time, so that an export that was
stopped writes what is missing. `info.json` says shape, type and the statistics to normalise by. A row's latents are
float16, little-endian, in C order [F, C, h, w].
"""

import io
import json
import math
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from nextvid.making.progress import OnProgress, Progress, silent
from nextvid.trainset.dataset import LatentDataset, RowFacts
from storage.atomic import publish_json, staged_file
from storage.errors import ConflictError

Format = Literal["parquet", "webdataset", "mds"]
FILE_BYTES = 1 << 27  # our choice: 134 MB, between WebDataset's usual 100 MB to 1 GB and MDS' 67 MB
INFO = "info.json"
Row = tuple[RowFacts, np.ndarray]


@dataclass(frozen=True)
class Exported:
    """What an export holds."""

    folder: str
    format: Format
    trainset: str
    frames: int
    rows: int
    files: int
    written: int  # by this call; the others were there

    def text(self) -> str:
        """As text."""
        there = f", {self.files - self.written} were there" if self.written < self.files else ""
        what = f"{self.rows} rows of {self.frames} frames of trainset {self.trainset}"
        return f"{what} in {self.folder}: {self.files} files of {self.format}{there}"


def export_latents(
    data: LatentDataset, out: Path, format_: Format, on_progress: OnProgress = silent, file_bytes: int = FILE_BYTES
) -> Exported:
    """Write all rows into the folder `out`, which has files of about `file_bytes` each.

    Raises ConflictError for a folder that holds another export, DamagedError where bytes are not as committed.
    """
    shape = data.spec.row_shape(data.frames)
    rows_per_file = max(1, file_bytes // (2 * math.prod(shape)))
    order = data.in_store_order()
    info = {
        "trainset": data.digest, "format": format_, "shape": list(shape), "dtype": "float16", "rows": len(order),
        "rows_per_file": rows_per_file, "mean": data.mean.tolist(), "std": data.std.tolist(),
    }  # fmt: skip
    place = out / INFO
    if not place.exists():
        if out.exists() and any(out.iterdir()):
            raise ConflictError(f"{out} holds other files: name a folder that is empty or does not exist yet")
        publish_json(str(place), info)
    if json.loads(place.read_text()) != info:
        raise ConflictError(f"{out} holds another export, which {place} describes: name another folder")
    starts = range(0, len(order), rows_per_file)
    files = [out / f"{number:06d}.{'tar' if format_ == 'webdataset' else format_}" for number in range(len(starts))]
    written = 0
    for path, start in zip(files, starts, strict=True):
        if not path.exists():
            some = order[start : start + rows_per_file]
            rows = zip(map(data.row, some), (row.numpy() for row in data.__getitems__(some)), strict=True)
            with staged_file(str(path)) as temporary:
                match format_:
                    case "parquet":
                        columns = [_facts(facts) | {"latents": latents.tobytes()} for facts, latents in rows]
                        pl.DataFrame(columns).write_parquet(temporary)
                    case "webdataset":
                        _write_tar(temporary, rows)
                    case "mds":
                        _write_mds(temporary, list(rows), _mds_columns(shape))
            written += 1
        on_progress(Progress(f"export of trainset {data.digest}", min(start + rows_per_file, len(order)), len(order)))
    if format_ == "mds":
        publish_json(str(out / "index.json"), _mds_index(files, len(order), rows_per_file, _mds_columns(shape)))
    return Exported(str(out), format_, data.digest, data.frames, len(order), len(files), written)


def _facts(facts: RowFacts) -> dict[str, str]:
    """What is written of a row: its id, data set and file, and as JSON the times of its frames and its labels."""
    return {
        "row_id": facts.row_id,
        "dataset": facts.dataset,
        "uri": facts.uri,
        "times_us": json.dumps(facts.times_us),
        "labels": json.dumps(facts.labels),
    }


def _write_tar(path: Path, rows: Iterable[Row]) -> None:
    with tarfile.open(path, "w") as tar:
        for facts, latents in rows:
            array = io.BytesIO()
            np.save(array, latents)
            for suffix, data in (("latents.npy", array.getvalue()), ("json", json.dumps(_facts(facts)).encode())):
                member = tarfile.TarInfo(f"{facts.row_id}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def _mds_columns(shape: Sequence[int]) -> dict[str, str]:
    """Encodings by column, sorted by name as the format has them."""
    texts = dict.fromkeys(("row_id", "dataset", "uri", "times_us", "labels"), "str")
    return dict(sorted((texts | {"latents": f"ndarray:float16:{','.join(map(str, shape))}"}).items()))


def _write_mds(path: Path, rows: Sequence[Row], columns: Mapping[str, str]) -> None:
    """A shard of mosaicml-streaming: count, offsets, its columns as JSON, then samples, sizes of texts before data."""
    samples = []
    for facts, latents in rows:
        values = {name: text.encode() for name, text in _facts(facts).items()} | {"latents": latents.tobytes()}
        sizes = [len(values[name]) for name, encoding in columns.items() if encoding == "str"]
        samples.append(np.array(sizes, "<u4").tobytes() + b"".join(values[name] for name in columns))
    config = json.dumps(_mds_config(columns), sort_keys=True).encode()
    first = 4 + 4 * (len(samples) + 1) + len(config)
    offsets = first + np.cumsum([0, *map(len, samples)])
    with path.open("xb") as file:
        file.write(np.array([len(samples), *offsets], "<u4").tobytes() + config)
        file.writelines(samples)


def _mds_config(columns: Mapping[str, str]) -> dict[str, Any]:
    sizes = [
        None if encoding == "str" else 2 * math.prod(map(int, encoding.split(":")[2].split(",")))
        for encoding in columns.values()
    ]
    return {
        "version": 2, "format": "mds", "compression": None, "hashes": [], "size_limit": None,
        "column_names": list(columns), "column_encodings": list(columns.values()), "column_sizes": sizes,
    }  # fmt: skip


def _mds_index(files: Sequence[Path], rows: int, rows_per_file: int, columns: Mapping[str, str]) -> dict[str, Any]:
    shards = [
        _mds_config(columns)
        | {
            "samples": min(rows_per_file, rows - number * rows_per_file),
            "raw_data": {"basename": path.name, "bytes": path.stat().st_size, "hashes": {}},
            "zip_data": None,
        }
        for number, path in enumerate(files)
    ]
    return {"version": 2, "shards": shards}
