"""A trainset of ten million rows from clips tables: time and memory of the process that makes it.

`python -m benchmarks.manifests [--quick]` writes 100 batches of 100,000 clips (with --quick 10 of 10,000) with every
column of the schema and the commits of their latents, 391 files of 256 rows a batch. A process of its own then seals
the parts, as the maker that finishes them does, and filters, joins and freezes the rows, as the asset does; it reports
time and peak memory (our bounds at ten million rows: ten minutes and 2 GB). Latents are not written.
"""

import json as jsonlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import polars as pl
import tyro

from benchmarks.measure import machine, show, write
from nextvid.config.project import Project, open_project
from nextvid.encode.plan import accepted_spec
from nextvid.making.publishing import publish_latest
from nextvid.planning.acceptance import ensure_accepted
from nextvid.trainset.trainset import Trainset, make_trainset
from storage import atomic
from storage.digest import digest_bytes
from storage.schemas import Clips, Commits, Duplicates
from storage.shard import ROWS_PER_SHARD
from storage.store import LatentStore
from storage.tables import publish_checks, write_many, write_table

PEAK_MB, TOTAL_S = 2048, 600  # our bounds at ten million rows
BATCHES, ROWS = 100, 100_000
QUICK_BATCHES, QUICK_ROWS = 10, 10_000
FRAMES = 16  # the paper's
SPLIT = {"train": 0.9, "val": 0.05, "test": 0.05}
GIVE_WAY = 0.02  # shots that give way to a duplicate
FAILED = 0.01  # rows that could not be encoded
CORPUS = """
root: {root}
encoding: {{autoencoder: {autoencoder}, resolution: 64}}
datasets:
  films: {{uri: {root}/films, weight: 3.0, clips: [{{frames: {frames}, fps: 4}}]}}
  shows: {{uri: {root}/shows, weight: 1.0, clips: [{{frames: {frames}, fps: 4}}]}}
"""


def main(
    quick: bool = False, batches: int = 0, json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
) -> None:
    """Write the tables, make the trainset, print time and memory, and with --json write what README.md documents.

    Args:
        quick: 100,000 rows instead of ten million, in under a minute.
        batches: other than 100 batches (or 10) of so many rows, for a machine that is shared.
        json: file for the results.
    """
    rows = QUICK_ROWS if quick else ROWS
    batches = batches or (QUICK_BATCHES if quick else BATCHES)
    with tempfile.TemporaryDirectory(prefix="nextvid-manifests-") as folder:
        size_bytes = _write(Path(folder), batches, rows)
        code = f"from benchmarks.manifests import child; child({folder!r})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        found: dict[str, float] = jsonlib.loads(done.stdout.splitlines()[-1])
    row: dict[str, Any] = {"name": f"{batches * rows:,} clips", "clips": batches * rows, "tables_mb": size_bytes / 1e6}
    row |= found
    row["us_a_row"] = (row["seal_s"] + row["seconds"]) / row["clips"] * 1e6
    row["cpu_us_a_row"] = row["cpu_s"] / row["clips"] * 1e6
    found = {"peak_mb": row["peak_mb"], "total_s": row["seal_s"] + row["seconds"]}
    bounds = {"peak_mb": PEAK_MB, "total_s": TOTAL_S}
    targets = {
        name: {"measured": found[name], "at_most": most, "met": found[name] <= most} for name, most in bounds.items()
    }
    results = {
        "benchmark": "manifests",
        "quick": quick,
        "machine": machine() | {"polars": pl.__version__},
        "rows": [row],
        "targets": targets,
    }
    show("a trainset from clips tables", ("", *list(row)[1:]), [list(row.values())])
    for name, target in targets.items():
        print(f"{name}: {target['measured']:.0f}, at most {target['at_most']}: {'met' if target['met'] else 'MISSED'}")
    write(json, results)


def child(folder: str) -> None:
    """Seal every part and make the trainset; prints rows, seconds and megabytes as JSON."""
    project = open_project(Path(folder) / "corpus.yaml")
    store = LatentStore(project.root, accepted_spec(project))
    start_mb, began, cpu_began = _peak_mb(), time.perf_counter(), time.process_time()
    for batch in store.batches():
        store.seal(batch)
    sealed = time.perf_counter()
    made = make_trainset(project)
    seal_s, seconds, peak_mb = sealed - began, time.perf_counter() - sealed, _peak_mb()
    assert made.passed, made.checks
    lengths = Trainset.open(project.root).lengths
    assert lengths == (FRAMES,), lengths
    cpu_s = time.process_time() - cpu_began
    said = {"trainset_rows": made.rows, "seal_s": seal_s, "seconds": seconds, "cpu_s": cpu_s, "start_mb": start_mb}
    print(jsonlib.dumps(said | {"peak_mb": peak_mb}))


def _write(folder: Path, batches: int, rows: int) -> int:
    """Clips, commits, duplicates and verdicts of a corpus; bytes of the clips tables."""
    autoencoder = Path(__file__).resolve().parents[1] / "examples" / "demo" / "autoencoder"
    root_folder = folder / "root"
    (folder / "corpus.yaml").write_text(CORPUS.format(root=root_folder, autoencoder=autoencoder, frames=FRAMES))
    project = open_project(folder / "corpus.yaml")
    ensure_accepted(project)
    root, spec = project.root, accepted_spec(project)
    store = LatentStore(root, spec)
    store.create()
    rng, size_bytes = np.random.default_rng(0), 0
    inputs: dict[str, list[str]] = {}
    dropped: list[pl.DataFrame] = [Duplicates.create_empty()]
    for number in range(batches):
        dataset = "films" if number < batches * 3 // 4 else "shows"
        batch = f"{dataset}.{number:06d}"
        clips = _clips(rng, dataset, batch, rows)
        write_table(root.table("clips", batch), clips, Clips)
        atomic.publish_bytes(root.table("shots", batch), batch.encode())
        publish_checks(root.checks("clips", batch), "clips", [{"name": "written", "passed": True}])
        publish_checks(root.latents_checks(spec.digest(), batch), "latents", [{"name": "written", "passed": True}])
        part, commits = (
            store.plan_part(batch, FRAMES, clips["row_id"].to_list()),
            _commits_of(rng, clips, spec.channels),
        )
        write_many(
            {part.commit_path(n): commits[n * ROWS_PER_SHARD :][:ROWS_PER_SHARD] for n in range(part.shards)}, Commits
        )
        dropped.append(_given_way(rng, clips))
        tables = [atomic.read_bytes(root.table(noun, batch)) for noun in ("shots", "clips")]
        inputs[batch] = [digest_bytes(data) for data in tables]
        size_bytes += len(tables[1])
    _publish_duplicates(project, pl.concat(dropped), inputs)
    return size_bytes


def _clips(rng: np.random.Generator, dataset: str, batch: str, rows: int) -> pl.DataFrame:
    """Two clips a shot, ten shots a file; every column as `clips` writes it."""
    shots, media = np.arange(rows) // 2, np.arange(rows) // 20
    starts = 4_000_000 * (np.arange(rows) % 20)
    times = starts[:, None] + 250_000 * np.arange(FRAMES)
    ids = {"row_id": np.arange(rows), "clip_id": np.arange(rows), "shot_id": shots, "media_id": media}
    return pl.DataFrame(
        {name: _ids(rng, rows)[which] for name, which in ids.items()}
        | {
            "uri": pl.Series(np.char.add(f"/data/{dataset}/{batch}/", media.astype(str))) + ".mp4",
            "times_us": pl.Series(times, dtype=pl.Array(pl.Int64, FRAMES)).cast(pl.List(pl.Int64)),
            "split": rng.choice(list(SPLIT), rows, p=list(SPLIT.values())),
            "frames": np.full(rows, FRAMES, np.int32),
        }
    ).with_columns(
        *(pl.lit(value).alias(name) for name, value in _CLIP.items()),
        dataset=pl.lit(dataset),
        batch=pl.lit(batch),
        uses=pl.lit(["pretrain"]),
        **{name: pl.lit(None, pl.String) for name in ("reason", "error", "group")},
    )


_CLIP = {
    "status": "ok", "kind": "video", "decoder": "decord", "view_index": 0, "crop_x": 0, "crop_y": 0, "crop_w": 256,
    "crop_h": 256, "flip": False,
}  # fmt: skip


def _commits_of(rng: np.random.Generator, clips: pl.DataFrame, channels: int) -> pl.DataFrame:
    """The commits of one part of all rows."""
    rows = clips.height
    ok = rng.random(rows) >= FAILED
    sums = pl.Series(rng.standard_normal((rows, channels)), dtype=pl.Array(pl.Float64, channels))
    found = clips.select("row_id").with_columns(
        slot=pl.int_range(rows, dtype=pl.UInt32),
        status=pl.Series(np.where(ok, "ok", "quarantined")),
        crc32c=pl.Series(rng.integers(0, 2**32, rows, np.uint32)),
        sums=sums.cast(pl.List(pl.Float64)),
        sums_squared=(sums.cast(pl.List(pl.Float64)).list.eval(pl.element() ** 2 + 1000.0)),
        posterior_std=pl.lit(0.01, pl.Float32),
        decode_s=pl.lit(0.05, pl.Float32),
        encode_s=pl.lit(0.01, pl.Float32),
    )
    missing = {name: kind for name, kind in Commits.create_empty().schema.items() if name not in found.columns}
    return found.with_columns(pl.lit(None, kind).alias(name) for name, kind in missing.items()).select(
        Commits.column_names()
    )


def _given_way(rng: np.random.Generator, clips: pl.DataFrame) -> pl.DataFrame:
    """Lines of `duplicates` for a share of the batch's shots."""
    shots = clips.select("shot_id", "media_id", "dataset", "batch").unique("shot_id", maintain_order=True)
    some = shots.filter(pl.Series(rng.random(shots.height) < GIVE_WAY))
    lines = some.with_columns(
        group=pl.int_range(some.height, dtype=pl.Int64),
        split=pl.lit("train"),
        benchmarks=pl.lit([], pl.List(pl.String)),
        pretrain=pl.lit(True),
        dropped_from=pl.lit(["pretrain"]),
        reason=pl.lit("copy"),
    )
    return pl.DataFrame(lines.to_dict(), schema=Duplicates.create_empty().schema)


def _publish_duplicates(project: Project, table: pl.DataFrame, inputs: dict[str, list[str]]) -> None:
    root, key = project.root, "0" * 32
    folder = root.pointed("duplicates", key)
    write_table(f"{folder}/duplicates.parquet", table, Duplicates)
    atomic.publish_json(f"{folder}/duplicates.json", {"inputs": inputs})
    publish_checks(f"{folder}/checks.json", "duplicates", [{"name": "written", "passed": True}])
    publish_latest(root, "duplicates", key)


def _ids(rng: np.random.Generator, count: int) -> pl.Series:
    data = rng.bytes(16 * count)
    return pl.Series([data[first : first + 16] for first in range(0, len(data), 16)], dtype=pl.Binary)


def _peak_mb() -> float:
    """Of this process since it began; ru_maxrss would count what the process was forked from."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


if __name__ == "__main__":
    tyro.cli(main)
