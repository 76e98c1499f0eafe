"""Small projects and what stands in them: tables, latents and trainsets from random numbers, without any video.

Each function writes one thing as its maker would, with as little as its reader needs.
"""

import json
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dataframely as dy
import numpy as np
import polars as pl
import yaml

from nextvid.config.project import Project, open_project
from nextvid.corpus.clips import make_clips
from nextvid.corpus.media import make_media
from nextvid.corpus.shots import make_shots
from nextvid.corpus.sources import update_sources
from nextvid.encode.plan import encoding_spec
from nextvid.graph import GRAPH
from nextvid.making.batches import VERSIONED
from nextvid.making.outcome import Outcome
from nextvid.making.publishing import publish_latest, read_latest
from nextvid.trainset.files import write_trainset
from storage import atomic
from storage.digest import digest, digest_bytes, digest_config, digest_file
from storage.reader import addresses
from storage.schemas import Clips, Commits, Duplicates, Lineage, Shots
from storage.store import LatentStore
from storage.tables import publish_checks, write_table

DEMO = Path(__file__).resolve().parents[1] / "examples" / "demo"
SIDE = 64  # pixels a side of frames and clips
FRAMES = 4  # of a clip


def write_settings(folder: Path, datasets: Mapping[str, Any], **more: Any) -> Path:
    """A corpus.yaml in `folder`, its root beside it; `more` are other keys of the file."""
    encoding = {"autoencoder": "none", "resolution": SIDE}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "corpus.yaml"
    known = {"root": "root", "encoding": encoding, "datasets": datasets, "protocols": ["memory", "s3", "hf"]}
    path.write_text(yaml.safe_dump(known | more))
    return path


def write_project(folder: Path, datasets: Mapping[str, Any], **more: Any) -> Project:
    """The project of `write_settings`."""
    return open_project(write_settings(folder, datasets, **more))


def edit_project(path: Path, change: Callable[[dict[str, Any]], Any]) -> Project:
    """Change what a corpus.yaml says; the project as it is then."""
    said = yaml.safe_load(path.read_text())
    change(said)
    path.write_text(yaml.safe_dump(said))
    return open_project(path)


def copy_project(project: Project, folder: Path) -> Project:
    """A copy of a project's whole folder, before evaluation, that a test may change."""
    base = project.path.parent
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("probes", "samples", "report"))
    path = folder / project.path.name
    path.write_text(path.read_text().replace(str(base), str(folder)))
    return open_project(path)


def demo_settings(folder: Path) -> str:
    """The demo's corpus.yaml over `folder`/data/corpus; a small corpus has a larger share of broken files."""
    text = (DEMO / "corpus.yaml").read_text().replace("../../data/demo", str(folder / "data"))
    text = text.replace("quarantine_budget: 0.05", "quarantine_budget: 0.9")
    return text.replace("autoencoder: autoencoder", f"autoencoder: {DEMO / 'autoencoder'}")


def write_autoencoder(folder: Path, channels: int = 3) -> Path:
    """As much of an autoencoder's folder as planning reads: 8 pixels a cell."""
    folder.mkdir()
    config = {"_class_name": "AutoencoderKL", "latent_channels": channels, "block_out_channels": [8] * 4}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"weights, never loaded")
    return folder


def save_autoencoder(folder: Path, channels: int = 8) -> Path:
    """AutoencoderKL of the demo's family with random weights: patch 4, 8 pixels a cell."""
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        in_channels=48, out_channels=48, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(16, 16), latent_channels=channels,
        norm_num_groups=4, mid_block_add_attention=False,
    ).save_pretrained(folder)  # fmt: skip
    (folder / "nextvid.json").write_text(json.dumps({"kind": "autoencoder_kl", "patch": 4}))
    return folder


def make_corpus(project: Project) -> dict[str, Outcome]:
    """List the files and make media, shots and clips of every batch; each outcome by asset and batch."""
    update_sources(project)
    makers = {"media": make_media, "shots": make_shots, "clips": make_clips}
    return {
        f"{name} {batch}": make(project, batch) for batch in project.root.batches() for name, make in makers.items()
    }


@contextmanager
def unchanged(folder: Path | str) -> Iterator[None]:
    """Nothing below the folder is written, added or removed meanwhile."""
    before = {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*")}
    yield
    assert {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*")} == before


def flip(path: Path | str, at: int = -1) -> None:
    """Damage one bit of a file's byte `at`."""
    data = bytearray(Path(path).read_bytes())
    data[at] ^= 1
    Path(path).write_bytes(data)


def table(schema: type[dy.Schema], rows: Iterable[Mapping[str, Any]], **same: Any) -> pl.DataFrame:
    """Rows that name some columns of a schema; `same` are values of others in all rows, and the rest is null."""
    return pl.DataFrame([same | dict(row) for row in rows], schema=schema.create_empty().schema)


def commits(
    planned: pl.DataFrame, failed: Collection[bytes] = (), schema: type[dy.Schema] = Commits, **measured: Any
) -> pl.DataFrame:
    """Planned rows as committed: ok, but for the ids in `failed`; what `measured` does not name is null or zero."""
    lost = pl.col("row_id").is_in(list(failed))
    said: dict[str, Any] = {
        "status": pl.when(lost).then(pl.lit("quarantined")).otherwise(pl.lit("ok")),
        "reason": pl.when(lost).then(pl.lit("timeout")),
        "sums": [],
        "sums_squared": [],
        "decode_s": 0.0,
        "encode_s": 0.0,
    } | measured
    types = schema.create_empty().schema
    for name, dtype in types.items():
        if name not in planned.columns:
            value = said.get(name)
            column = value if isinstance(value, pl.Expr | pl.Series) else pl.lit(value, dtype)
            planned = planned.with_columns(column.cast(dtype).alias(name))
    return planned.select(types.names())


def put_latents(
    store: LatentStore,
    batch: str,
    frames: int,
    latents: Mapping[bytes, np.ndarray],
    failed: Collection[bytes] = (),
    **measured: Any,
) -> None:
    """Commit one part of clips of a length: latents [F, C, h, w] by row id."""
    store.create()
    part = store.plan_part(batch, frames, list(latents))
    for shard in range(part.shards):
        planned = part.rows_of(shard)
        rows = np.stack([latents[row] for row in planned["row_id"].to_list()])
        part.write_shard(shard, rows, commits(planned, failed, **measured))


def clip_row(uri: Path, index: int, view: int = 0, **changes: Any) -> dict[str, Any]:
    """A row of Clips: the `index`-th clip of a file; views differ by crop and flip."""
    image = uri.suffix == ".png"
    dataset = "stills" if image else "films"
    media = bytes.fromhex(digest_file(uri)) if uri.exists() else bytes(16)
    times = [0] if image else [index * 125_000 + i * 250_000 for i in range(FRAMES)]
    named = [media.hex(), *times]
    row: dict[str, Any] = {
        "status": "ok", "row_id": bytes.fromhex(digest([*named, view])), "clip_id": bytes.fromhex(digest(named)),
        "shot_id": bytes.fromhex(digest([media.hex(), "shot"])), "media_id": media, "dataset": dataset,
        "batch": f"{dataset}.000000", "uri": str(uri), "kind": "image" if image else "video",
        "decoder": "pillow" if image else "pyav", "frames": len(times), "times_us": times, "view_index": view,
        "crop_x": 4 * view, "crop_y": 2 * view, "crop_w": SIDE - 6 * view, "crop_h": SIDE - 6 * view,
        "flip": view % 2 == 1, "uses": ["pretrain"], "split": "train",
    }  # fmt: skip
    return row | changes


def current_versions(asset: str) -> dict[str, str]:
    """What a maker of today records as versions."""
    found = {"version": str(GRAPH[asset].version)} if asset in VERSIONED else {}
    return found | ({"media": str(GRAPH["media"].version)} if asset == "shots" else {})


def passed(path: str, asset: str, passed: bool = True) -> None:
    """The checks of an asset with one verdict."""
    publish_checks(path, asset, [{"name": "by hand", "passed": passed}], current_versions(asset))


def publish_clips(project: Project, batch: str, rows: Sequence[Mapping[str, Any]]) -> pl.DataFrame:
    """Write a batch's clips table, sorted by row id, and its passed checks."""
    made = table(Clips, rows).sort("row_id")
    write_table(project.root.table("clips", batch), made, Clips)
    passed(project.root.checks("clips", batch), "clips")
    return made


def publish_duplicates(
    project: Project, rows: Sequence[Mapping[str, Any]] = (), without: Collection[str] = (), **said: Any
) -> str:
    """A duplicates table, the latest, that knows every batch as it is now, except those in `without`; its digest."""
    root, inputs = project.root, {}
    for batch in sorted(set(root.batches("clips")) - set(without)):
        paths = [root.table(noun, batch) for noun in ("shots", "clips")]
        inputs[batch] = [digest_bytes(atomic.read_bytes(path)) for path in paths if atomic.exists(path)]
    key = digest([inputs, [[row["shot_id"].hex(), row["dropped_from"]] for row in rows]])
    folder = root.pointed("duplicates", key)
    write_table(f"{folder}/duplicates.parquet", table(Duplicates, rows), Duplicates)
    atomic.publish_json(f"{folder}/duplicates.json", {"inputs": inputs, **said})
    passed(f"{folder}/checks.json", "duplicates")
    publish_latest(root, "duplicates", key)
    return key


def publish_trainset(
    store: LatentStore, lineage: pl.DataFrame, weights: Mapping[str, float], mean: Sequence[float], std: Sequence[float]
) -> str:
    """A trainset, the latest, of the committed rows that `lineage` (schema Lineage) names; its digest."""
    root, batches = store.root, lineage["batch"].unique().sort().to_list()
    frozen: dict[int, np.ndarray] = {}
    offsets: dict[str, dict[str, tuple[int, int]]] = {}
    for frames in lineage["frames"].unique().sort():
        rows = lineage.filter(frames=frames).sort("dataset", "row_id")
        stored = pl.concat([store.commits(batch, frames) for batch in rows["batch"].unique()])
        frozen[frames] = addresses(
            rows.select("row_id", "batch").join(stored, ["row_id", "batch"], maintain_order="left"), batches
        )
        counts = rows["dataset"].rle().struct.unnest()
        firsts = counts["len"].cum_sum() - counts["len"]
        offsets[f"f{frames}"] = {
            name: (first, n) for name, first, n in zip(counts["value"], firsts, counts["len"], strict=True)
        }
    key = digest_config({"spec": store.spec.digest(), "rows": [row.hex() for row in lineage["row_id"]]})
    said = {
        "digest": key, "parent": None, "spec": store.spec.to_json(), "weights": dict(weights), "mean": list(mean),
        "std": list(std), "batches": batches, "offsets": offsets, "duplicates": read_latest(root, "duplicates"),
        "left_out": {}, "dropped": {},
    }  # fmt: skip
    folder = root.pointed("trainset", key)
    write_trainset(folder, said, frozen, [lineage.select(Lineage.column_names())])
    passed(f"{folder}/checks.json", "trainset")
    publish_latest(root, "trainset", key)
    return key


class Corpus:
    """A project whose clips, latents and duplicates are random numbers: what the trainset reads, without any file."""

    def __init__(self, folder: Path, autoencoder: Path | None = None) -> None:
        self.folder, self.autoencoder = folder, autoencoder or write_autoencoder(folder / "autoencoder")
        self.project = self.configure()
        self.latents: dict[bytes, np.ndarray] = {}

    def configure(self, **changes: Any) -> Project:
        """corpus.yaml with other values of some keys."""
        policy = [{"frames": FRAMES, "fps": 4}]
        datasets = {
            "films": {"uri": "films", "weight": 3.0, "clips": policy},
            "stills": {"uri": "stills", "weight": 1.0, "clips": [{"frames": 1}]},
            "empty": {"uri": "empty", "weight": 4.0, "clips": policy},
            "probe": {"uri": "probe"},
        }
        encoding = {"autoencoder": str(self.autoencoder), "resolution": 16}
        self.project = write_project(self.folder, **{"datasets": datasets, "encoding": encoding} | changes)
        return self.project

    def row(self, batch: str, index: int, **changes: Any) -> dict[str, Any]:
        """A row of Clips; two clips a file."""
        name = batch.split(".")[0]
        frames = 1 if name == "stills" else FRAMES
        media = bytes.fromhex(digest([name, index // 2]))
        here: dict[str, Any] = {
            "batch": batch,
            "dataset": name,
            "frames": frames,
            "times_us": list(range(frames)),
            "media_id": media,
            "shot_id": bytes.fromhex(digest([media.hex(), "shot"])),
            "clip_id": bytes.fromhex(digest([batch, index, "clip"])),
            "row_id": bytes.fromhex(digest([batch, index])),
        }
        return clip_row(Path(f"/{name}/{index // 2}.{'png' if frames == 1 else 'mp4'}"), index, **(here | changes))

    def clips(self, batch: str, rows: Sequence[dict[str, Any]]) -> None:
        """Publish a batch's shots and clips."""
        publish_clips(self.project, batch, rows)
        passed(self.project.root.checks("shots", batch), "shots")
        write_table(self.project.root.table("shots", batch), Shots.create_empty(), Shots)

    def encode(
        self,
        batch: str,
        rows: Sequence[dict[str, Any]],
        failed: Sequence[int] = (),
        verdict: bool = True,
        seed: int = 0,
        **measured: float,
    ) -> None:
        """Commit random latents; channel c of dataset-dependent mean and width."""
        spec = encoding_spec(self.project)
        rng = np.random.default_rng([seed, len(batch)])
        shape = (len(rows), *spec.row_shape(rows[0]["frames"]))
        scale = 0.5 + np.arange(spec.channels)[:, None, None]
        latents = rng.standard_normal(shape) * scale + len(batch) * 0.1 + rng.standard_normal((len(rows), 1, 1, 1, 1))
        found = {row["row_id"]: latents[i].astype(np.float16) for i, row in enumerate(rows)}
        lost = [rows[i]["row_id"] for i in failed]
        store = LatentStore(self.project.root, spec)
        put_latents(store, batch, rows[0]["frames"], found, lost, **{"posterior_std": 0.01, "psnr_db": 30.0} | measured)
        self.latents |= {row: values for row, values in found.items() if row not in lost}
        passed(self.project.root.latents_checks(spec.digest(), batch), "latents", verdict)

    def rows(self, batch: str, *span: int) -> list[dict[str, Any]]:
        """The rows of a batch whose indexes are `range(*span)`."""
        return [self.row(batch, index) for index in range(*span)]

    def add(self, batch: str, count: int, **how: Any) -> None:
        """Publish the first clips of a batch and encode them."""
        self.clips(batch, self.rows(batch, count))
        self.encode(batch, self.rows(batch, count), **how)

    def duplicates(self, rows: Sequence[dict[str, Any]] = (), without: Sequence[str] = ()) -> str:
        """`publish_duplicates` of this project."""
        return publish_duplicates(self.project, rows, without)


def doubled(row: dict[str, Any], group: int, drop: bool, reason: str | None = None) -> dict[str, Any]:
    """A row of Duplicates for the shot of a clip row."""
    return {name: row[name] for name in ("shot_id", "media_id", "dataset", "batch", "split")} | {
        "group": group,
        "benchmarks": [use for use in row["uses"] if use != "pretrain"],
        "pretrain": "pretrain" in row["uses"],
        "dropped_from": ["pretrain"] if drop else [],
        "reason": reason,
    }
