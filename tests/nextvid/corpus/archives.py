"""Tar and parquet files of pictures."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import polars as pl


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    """A tar file of these members, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_parquet(path: Path, cells: Sequence[tuple[str | None, bytes | None]]) -> Path:
    """A parquet file with the column `image`, as the library `datasets` writes it, two rows a group."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pl.DataFrame(
        {"image": [{"bytes": data, "path": name} for name, data in cells], "label": list(range(len(cells)))},
        schema={"image": pl.Struct({"bytes": pl.Binary, "path": pl.String}), "label": pl.Int64},
    )
    table.write_parquet(path, row_group_size=2)
    return path
