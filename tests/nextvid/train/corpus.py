"""A project whose latents are random numbers: store, trainset and corpus.yaml written by hand, in milliseconds."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import polars as pl

from nextvid.config.project import Project, open_project
from nextvid.making.publishing import publish_latest
from nextvid.trainset.files import write_trainset as write_frozen
from storage import tables
from storage.digest import digest, digest_config
from storage.latents import EncodingSpec, LatentStore
from storage.reader import ADDRESS, addresses, row_id
from storage.root import DataRoot
from storage.schemas import Commits
from tests.nextvid.train.tiny import CHANNELS, GRID

BATCHES = ("films.000000", "pictures.000000")
ROWS = {"films.000000": {4: 9, 8: 5}, "pictures.000000": {1: 7}}  # rows by frames
WEIGHTS = {"films": 0.75, "pictures": 0.25}
MEAN = np.arange(CHANNELS, dtype=np.float32)
STD = 1.0 + np.arange(CHANNELS, dtype=np.float32) / 2


def tiny_spec(height: int = GRID, channels: int = CHANNELS) -> EncodingSpec:
    """Latents of the tiny recipe's grid."""
    return EncodingSpec("0" * 32, 8 * height, "bicubic", "fp32", "mean", "float16", channels, height, height)


def make_project(folder: Path, seed: int = 0, spec: EncodingSpec | None = None) -> Project:
    """A project with one trainset, `latest`: clips of 4 and 8 frames in `films`, images in `pictures`."""
    corpus = {
        "root": str(folder / "data"),
        "encoding": {"autoencoder": "none", "resolution": 32},
        "datasets": {
            name: {"uri": name, "weight": weight, "clips": [{"frames": 4, "fps": 4}]}
            for name, weight in WEIGHTS.items()
        },
    }
    path = folder / "corpus.yaml"
    path.write_text(json.dumps(corpus))  # JSON is YAML
    project = open_project(path)
    write_trainset(project.root, spec or tiny_spec(), seed)
    return project


def write_trainset(root: DataRoot, spec: EncodingSpec, seed: int = 0) -> str:
    """Random latents in the store and a trainset of all of them; its digest."""
    store = LatentStore(root, spec)
    store.create()
    rng = np.random.default_rng(seed)
    by_frames: dict[int, list[np.ndarray]] = {}
    for batch, lengths in ROWS.items():
        for frames, rows in lengths.items():
            write_part(store, batch, frames, [digest([seed, batch, frames, row]) for row in range(rows)], rng)
            found = addresses(store.commits(batch, frames), BATCHES)
            ids = [tuple(found["row_id"][row]) for row in range(len(found))]
            by_frames.setdefault(frames, []).append(found[sorted(range(len(found)), key=ids.__getitem__)])
    name = digest_config({"seed": seed, "spec": spec.digest()})
    said = {
        "digest": name,
        "spec": spec.to_json(),
        "weights": WEIGHTS,
        "mean": np.resize(MEAN, spec.channels).tolist(),
        "std": np.resize(STD, spec.channels).tolist(),
        "batches": list(BATCHES),
        "offsets": {
            f"f{frames}": {"pictures" if frames == 1 else "films": [0, sum(map(len, parts))]}
            for frames, parts in by_frames.items()
        },
    }
    folder = root.pointed("trainset", name)
    frozen = {frames: np.concatenate(parts).astype(ADDRESS) for frames, parts in by_frames.items()}
    write_frozen(folder, said, frozen, lineage_of(frozen))
    tables.publish_checks(f"{folder}/checks.json", "trainset", [{"name": "weights_sum_to_one", "passed": True}])
    publish_latest(root, "trainset", name)
    return name


def lineage_of(rows: Mapping[int, np.ndarray]) -> Iterator[pl.DataFrame]:
    """Of rows whose clips, shots and files nobody ever saw."""
    for frames, found in rows.items():
        ids = [row_id(address) for address in found]
        known = dict.fromkeys(("row_id", "clip_id", "shot_id", "media_id"), ids)
        where = [BATCHES[batch] for batch in found["batch"].tolist()]
        names = {"dataset": [batch.split(".")[0] for batch in where], "batch": where, "uri": ["/nowhere"] * len(ids)}
        yield pl.DataFrame(known | names | {"frames": [frames] * len(ids)})


def write_part(store: LatentStore, batch: str, frames: int, names: Sequence[str], rng: np.random.Generator) -> None:
    """One part of random rows around the statistics, committed."""
    spec = store.spec
    part = store.plan_part(batch, frames, [bytes.fromhex(name) for name in names])
    shape = (len(names), *spec.row_shape(frames))
    mean = np.resize(MEAN, (spec.channels, 1, 1))
    std = np.resize(STD, (spec.channels, 1, 1))
    latents = (mean + std * rng.standard_normal(shape)).astype(np.float32)
    planned = part.rows_of(0)
    commits = planned.select("row_id", "slot").with_columns(
        status=pl.lit("ok"),
        reason=pl.lit(None, pl.String),
        error=pl.lit(None, pl.String),
        crc32c=pl.lit(None, pl.UInt32),
        sums=pl.Series([row.sum(axis=(0, 2, 3)).astype(float).tolist() for row in latents]),
        sums_squared=pl.Series([(row**2).sum(axis=(0, 2, 3)).astype(float).tolist() for row in latents]),
        posterior_std=pl.lit(None, pl.Float32),
        psnr_db=pl.lit(None, pl.Float32),
        decode_s=pl.lit(0.0, pl.Float32),
        encode_s=pl.lit(0.0, pl.Float32),
    )
    part.write_shard(0, latents, commits.select(Commits.column_names()))
