"""The file of features: rows are kept part by part while they are computed, then one file in the format asked for.

A row is a clip, or a file that gave none, with status and reason. Parts are parquet files in the folder FILE.parts,
each with all rows of its files and published atomically: what is in one is not computed again. Of a file that was
computed again, since it had failed or changed, the newest rows are kept.

Axes: N rows, S the shape of one vector.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from storage import atomic
from storage.errors import ConfigError, NExTVidError, RefusedError

FORMATS = (".parquet", ".npz", ".safetensors")
COLUMNS = {
    "path": pl.String(),
    "start_us": pl.Int64(),  # of the first frame
    "end_us": pl.Int64(),  # of the last frame
    "status": pl.String(),  # ok, or quarantined: the columns are those of the table `media`
    "reason": pl.String(),
    "error": pl.String(),
    "fingerprint": pl.String(),  # size and time of the last change, or the object store's word for it
}
SETTINGS = "nextvid"  # the key of the metadata that holds the settings
KEPT_BYTES = 1 << 26  # bytes of vectors in a part: our choice, 16,000 mean vectors of a ViT-L


@dataclass(frozen=True)
class Output:
    """A file of features, its settings as plain values, and the shape of one vector."""

    path: Path
    settings: Mapping[str, Any]
    shape: tuple[int, ...]

    @property
    def parts(self) -> Path:
        """The folder of what is not merged yet."""
        return self.path.with_name(f"{self.path.name}.parts")

    @property
    def schema(self) -> pl.Schema:
        """Columns of a row; the vector is null where the status is not ok."""
        return pl.Schema({**COLUMNS, "vector": pl.Array(pl.Float32(), self.shape)})

    def open(self) -> pl.DataFrame:
        """Make the folder of parts; the columns but the vector of all rows that there are.

        Raises ConfigError for an ending that is no format and for a file that is none of ours, RefusedError where rows
        were made with other settings.
        """
        if self.path.suffix not in FORMATS:
            raise ConfigError(f"{self.path}: the ending must be one of {', '.join(FORMATS)}")
        recorded = self.parts / "settings.json"
        for place, found in (
            (self.path, _settings(self.path) if self.path.exists() else None),
            (self.parts, atomic.read_json(str(recorded)) if recorded.exists() else None),
        ):
            if found is not None and found != self.settings:
                names = sorted({*found, *self.settings})
                other = [f"{n} {found.get(n)!r}" for n in names if found.get(n) != self.settings.get(n)]
                raise RefusedError(f"{place} was made with other settings ({', '.join(other)}): name another file")
        if not recorded.exists():
            atomic.publish_json(str(recorded), dict(self.settings))
        frames = [frame.select(*COLUMNS) for frame in self._sources()]
        return pl.concat(frames).collect() if frames else self.schema.to_frame().drop("vector")

    def add(self, rows: pl.DataFrame, name: str) -> None:
        """Keep rows of schema `schema`, all of their files, under a name that no other writer uses."""
        number = sum(1 for _ in self.parts.glob("*.parquet"))
        with atomic.staged_file(str(self.parts / f"{number:06d}-{name}.parquet"), exclusive=True) as staged:
            rows.write_parquet(staged)

    def merge(self) -> None:
        """Write the file from what it was and the parts, then remove these; nothing where there are no parts."""
        sources = self._sources()
        if len(sources) > self.path.exists():
            numbered = [frame.with_columns(source=number) for number, frame in enumerate(sources)]
            newest = pl.concat([frame.select("path", "source") for frame in numbered]).group_by("path").max()
            rows = pl.concat(numbered).join(newest, on=["path", "source"], how="semi", maintain_order="left")
            with atomic.staged_file(str(self.path)) as staged:
                self._write(rows.drop("source"), staged)
        atomic.remove_tree(str(self.parts))

    def _sources(self) -> list[pl.LazyFrame]:
        """What there is, older first: the file, then parts by number, not by a clock that may jump."""
        found = [self._read()] if self.path.exists() else []
        parts = sorted(self.parts.glob("*.parquet"))
        return found + [pl.scan_parquet(part, glob=False) for part in parts]

    def _read(self) -> pl.LazyFrame:
        if self.path.suffix == ".parquet":
            return pl.scan_parquet(self.path, glob=False)
        if self.path.suffix == ".npz":
            with np.load(self.path, allow_pickle=False) as file:
                arrays = dict(file)
                columns = {name: arrays[name].tolist() for name in COLUMNS}
        else:
            arrays = load_file(self.path)
            columns = {name: arrays[name].tolist() for name in ("start_us", "end_us")} | _metadata(self.path)["columns"]
        frame = pl.DataFrame({n: [None if v == "" else v for v in columns[n]] for n in COLUMNS}, schema=COLUMNS)
        vectors = pl.Series("vector", arrays["vector"].reshape(len(frame), *self.shape), dtype=self.schema["vector"])
        ok = pl.when(pl.col("status") == "ok")
        times = [ok.then(pl.col(name)).alias(name) for name in ("start_us", "end_us")]
        return frame.with_columns(*times, vectors).with_columns(ok.then(pl.col("vector")).alias("vector")).lazy()

    def _write(self, rows: pl.LazyFrame, staged: Path) -> None:
        """In memory but for parquet. What has no null has NaN in vectors and -1 as times in its place."""
        metadata = {SETTINGS: json.dumps(dict(self.settings))}
        if self.path.suffix == ".parquet":
            rows.select(self.schema.names()).sink_parquet(staged, metadata=metadata)
            return
        table = rows.collect()
        vectors = np.full((table.height, *self.shape), np.nan, np.float32)
        ok = (table["status"] == "ok").to_numpy()
        vectors[ok] = table.filter(ok)["vector"].to_numpy()
        times: dict[str, Any] = {name: table[name].fill_null(-1).to_numpy() for name in ("start_us", "end_us")}
        words = {name: table[name].fill_null("").to_list() for name, kind in COLUMNS.items() if kind == pl.String()}
        if self.path.suffix == ".npz":
            with staged.open("wb") as file:
                arrays: dict[str, Any] = {
                    name: np.array(value, np.str_) for name, value in {**words, **metadata}.items()
                }
                np.savez(file, vector=vectors, **times, **arrays)
        else:
            save_file({"vector": vectors, **times}, staged, {**metadata, "columns": json.dumps(words)})


def _settings(path: Path) -> Any:  # noqa: ANN401 - JSON is Any
    """The settings that a file was made with. Raises ConfigError where it is no file of features."""
    try:
        match path.suffix:
            case ".parquet":
                return json.loads(pl.read_parquet_metadata(path)[SETTINGS])
            case ".npz":
                with np.load(path, allow_pickle=False) as file:
                    return json.loads(str(file[SETTINGS]))
            case _:
                return _metadata(path)[SETTINGS]
    except NExTVidError:
        raise
    except (KeyError, ValueError, OSError, SafetensorError, pl.exceptions.PolarsError) as error:
        raise ConfigError(f"{path} is not a file that 'nextvid features' wrote: name another file") from error


def _metadata(path: Path) -> dict[str, Any]:
    with safe_open(path, "np") as file:
        return {name: json.loads(value) for name, value in (file.metadata() or {}).items()}


def table_of(output: Output, rows: Iterable[Mapping[str, Any]], vectors: list[np.ndarray]) -> pl.DataFrame:
    """Rows of the schema: `vectors` are those of the rows whose status is ok, in order."""
    table = pl.DataFrame(list(rows), schema=COLUMNS)
    ok = table["status"] == "ok"
    given = pl.DataFrame(
        {"row": table.with_row_index("row").filter(ok)["row"]},
    ).with_columns(pl.Series("vector", np.stack(vectors) if vectors else [], dtype=output.schema["vector"]))
    return table.with_row_index("row").join(given, on="row", how="left", maintain_order="left").drop("row")
