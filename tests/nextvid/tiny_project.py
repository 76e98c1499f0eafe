"""A project of random latents with a signal, its trainset, and a run of a few steps: what evaluation reads.

Latents are written straight into the store and tables by hand, so that no video is decoded; the run is a real one.
Clips of class `fish` carry a fixed pattern in one channel, `bird` none, so that any encoder tells them apart. The files
themselves do not exist.
"""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
import yaml

from nextvid.config.project import Project, open_project
from nextvid.config.recipe import ExecutionConfig
from nextvid.encode.weights import autoencoder_digest
from nextvid.making.publishing import publish_latest
from nextvid.train.distributed import join
from nextvid.train.loop import train
from nextvid.train.pretrain import finish_run, prepare_run
from nextvid.train.run import open_run
from nextvid.trainset.files import write_trainset
from storage import atomic, tables
from storage.digest import digest
from storage.latents import EncodingSpec, LatentStore
from storage.reader import ADDRESS, addresses
from storage.schemas import Clips, Commits, Duplicates, Labels, Lineage, Media
from tests.nextvid.train.pixel_corpus import ask_for_pixels, write_pixels

RECIPE = "demo"
FRAMES = 8
CHANNELS, SIDE = 16, 8  # the demo recipe's grid
VIDEOS, CLIPS_A_VIDEO, IMAGES = 30, 3, 6
CLASSES = ("bird", "fish")
OVERRIDES = (
    "stages.warmup.steps=1", "stages.stable1.steps=1", "stages.stable2.steps=2", "stages.cooldown.steps=1",
    "model.encoder.width=32", "model.encoder.heads=2", "model.encoder.depth=1", "model.encoder.mlp_hidden=64",
    "model.predictor.width=32", "model.predictor.depth=1", "model.decoder.width=32", "model.decoder.depth=1",
    "masks.entries=256",
)  # fmt: skip


def write_project(folder: Path, run: bool = True) -> Project:
    """Everything up to the trainset, and a run of 5 steps that `latest.json` points to."""
    torch.set_num_threads(1)
    save_autoencoder(folder / "autoencoder")
    policy = {"frames": FRAMES, "fps": 4, "crop": "whole"}
    corpus = {
        "root": str(folder / "root"),
        "encoding": {"autoencoder": str(folder / "autoencoder"), "resolution": 8 * SIDE},
        "execution": {"device": "cpu"},
        "datasets": {
            "pets": {"uri": str(folder / "pets"), "weight": 0.9, "clips": [policy], "licence": "CC0-1.0"},
            "stills": {"uri": str(folder / "stills"), "weight": 0.1, "clips": [{"frames": 1}]},
        },
        "benchmarks": {
            "species": {"datasets": ["pets"], "target": "animal", "policy": policy, "epochs": 4, "batch": 8, "seeds": 2}
        },
    }
    path = folder / "corpus.yaml"
    path.write_text(yaml.safe_dump(corpus))
    project = open_project(path)
    _write_tables(project)
    _write_trainset(project)
    if run:
        _write_run(project)
    return project


def write_pixel_project(folder: Path, extra: Sequence[str], without: Collection[bytes] = ()) -> Project:
    """With stored pixels of all rows but those in `without`, and a run that reads them, with `extra` overrides."""
    project = write_project(folder, run=False)
    project = ask_for_pixels(project)
    write_pixels(project, without)
    _write_run(project, ("model.encoder.input=pixels", *extra))
    return project


def save_autoencoder(folder: Path) -> None:
    """AutoencoderKL of the demo's family with random weights: patch 4, f8, 16 channels."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        in_channels=48, out_channels=48, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(16, 16), layers_per_block=1,
        latent_channels=CHANNELS, norm_num_groups=4, mid_block_add_attention=False,
    ).save_pretrained(folder)  # fmt: skip
    (folder / "nextvid.json").write_text(json.dumps({"kind": "autoencoder_kl", "patch": 4}))


def latents_of(row: dict[str, Any]) -> np.ndarray:
    """Noise from the row's id, drifting over time; the class's pattern in channel 0. [F, C, h, w]."""
    rng = np.random.default_rng(list(row["row_id"]))
    still = rng.normal(size=(1, CHANNELS, SIDE, SIDE))
    found = still + 0.3 * rng.normal(size=(row["frames"], CHANNELS, SIDE, SIDE))
    if row["animal"] == "fish":
        found[:, 0] += 3 * np.sign(np.sin(np.arange(SIDE)))
    return found.astype(np.float32)


def clip_rows() -> pl.DataFrame:
    """Rows of Clips with the column `animal`: videos 0 to 19 train, 20 to 29 test; images train."""
    rows = []
    for number in range(VIDEOS + IMAGES):
        video = number < VIDEOS
        dataset = "pets" if video else "stills"
        for index in range(CLIPS_A_VIDEO if video else 1):
            frames = FRAMES if video else 1
            shot = bytes.fromhex(digest(["shot", number, index]))
            rows.append(
                {
                    "row_id": bytes.fromhex(digest(["row", number, index])),
                    "clip_id": bytes.fromhex(digest(["clip", number, index])),
                    "shot_id": shot, "media_id": bytes.fromhex(digest(["media", number])), "dataset": dataset,
                    "batch": f"{dataset}.000000", "uri": uri_of(number), "kind": "video" if video else "image",
                    "decoder": "pyav" if video else "pillow", "frames": frames,
                    "times_us": [2_000_000 * index + 250_000 * f for f in range(frames)], "view_index": 0, "crop_x": 0,
                    "crop_y": 0, "crop_w": 64, "crop_h": 64, "flip": False,
                    "uses": ["pretrain", "species"] if video else ["pretrain"],
                    "split": "test" if 20 <= number < VIDEOS else "train", "group": None, "status": "ok",
                    "reason": None, "error": None, "animal": CLASSES[number % 2] if video else "none",
                }
            )  # fmt: skip
    return pl.DataFrame(rows, schema={**Clips.create_empty().schema, "animal": pl.String()})


def uri_of(number: int) -> str:
    """Where a file would be."""
    return f"/nowhere/pets/{number:03d}.mp4" if number < VIDEOS else f"/nowhere/stills/{number:03d}.png"


def _write_tables(project: Project) -> None:
    root, clips = project.root, clip_rows()
    spec = EncodingSpec(
        autoencoder=autoencoder_digest(project.corpus.encoding.autoencoder), resolution=8 * SIDE, resize="bicubic",
        precision="fp32", posterior="mean", storage="float16", channels=CHANNELS, height=SIDE, width=SIDE,
    )  # fmt: skip
    store = LatentStore(root, spec)
    store.create()
    for (batch,), rows in clips.group_by("batch", maintain_order=True):
        assert isinstance(batch, str)
        tables.write_table(root.table("clips", batch), rows.drop("animal"), Clips)
        tables.write_table(root.table("media", batch), _media(rows), Media)
        tables.write_table(root.table("labels", batch), _labels(rows), Labels)
        tables.publish_checks(root.checks("clips", batch), "clips", [])
        tables.publish_checks(root.latents_checks(spec.digest(), batch), "latents", [])
        _commit(store, batch, rows)
    folder = root.pointed("duplicates", "d0" * 16)
    tables.write_table(f"{folder}/duplicates.parquet", Duplicates.create_empty(), Duplicates)
    contamination = [
        {"benchmark": "species", "test_files": 10, "test_files_seen_in_pretraining": 0,
         "dropped_from_pretrain_shots": {},
         "dropped_from_probe_train_shots": 0, "train_files": 20, "train_files_in_pretraining": 20}
    ]  # fmt: skip
    said = {"batches": clips["batch"].unique().sort().to_list(), "shots": 96, "contamination": contamination}
    atomic.publish_json(f"{folder}/duplicates.json", said)
    tables.publish_checks(f"{folder}/checks.json", "duplicates", [])
    publish_latest(root, "duplicates", "d0" * 16)


def _commit(store: LatentStore, batch: str, rows: pl.DataFrame) -> None:
    part = store.plan_part(batch, rows["frames"][0], rows["row_id"].to_list())
    for shard in range(part.shards):
        slots = part.rows_of(shard)
        own = slots.join(rows, on="row_id", maintain_order="left")
        commits = slots.with_columns(
            status=pl.lit("ok"), reason=pl.lit(None, pl.String), crc32c=pl.lit(None, pl.UInt32),
            sums=pl.lit([], pl.List(pl.Float64)), sums_squared=pl.lit([], pl.List(pl.Float64)),
            posterior_std=pl.lit(None, pl.Float32), psnr_db=pl.lit(None, pl.Float32),
            decode_s=pl.lit(0.0, pl.Float32), encode_s=pl.lit(0.0, pl.Float32),
        ).select(Commits.column_names())  # fmt: skip
        part.write_shard(shard, np.stack([latents_of(row) for row in own.iter_rows(named=True)]), commits)


def _media(clips: pl.DataFrame) -> pl.DataFrame:
    files = clips.unique("media_id", keep="first", maintain_order=True)
    known = files.select("uri", "dataset", "batch", "media_id", "kind", "decoder", "status", "reason", "error")
    wanted = Media.create_empty().schema
    defaults: dict[str, Any] = {"revision": 0, "size_bytes": 1000, "hazards": [], "licence": "CC0-1.0"}
    made = known.with_columns(path=pl.col("uri").str.split("/").list.last()).with_columns(
        pl.lit(defaults.get(name), dtype).alias(name)
        for name, dtype in wanted.items()
        if name not in [*known.columns, "path"]
    )
    return made.select(wanted.names())


def _labels(clips: pl.DataFrame) -> pl.DataFrame:
    nowhere = pl.lit(None, pl.Int64)
    labelled = clips.filter(pl.col("animal") != "none").unique("media_id", maintain_order=True)
    return labelled.select(
        "media_id", nowhere.alias("start_us"), nowhere.alias("end_us"), pl.lit("animal").alias("target"),
        pl.col("animal").alias("value"),
    )  # fmt: skip


def _write_trainset(project: Project) -> None:
    root = project.root
    spec_digest = Path(root.url, "latents").iterdir().__next__().name
    store = LatentStore.open(root, spec_digest)
    batches = ["pets.000000", "stills.000000"]
    rows = clip_rows().filter(pl.col("split") == "train").sort("dataset", "row_id")
    name = digest(["trainset", rows["row_id"].bin.encode("hex").to_list()])
    folder, frozen = root.pointed("trainset", name), {}
    for dataset, frames in (("pets", FRAMES), ("stills", 1)):
        own = rows.filter(pl.col("dataset") == dataset).select("row_id")
        commits = own.join(store.commits(f"{dataset}.000000"), on="row_id", maintain_order="left")
        frozen[frames] = addresses(commits, batches)
        assert frozen[frames].dtype == ADDRESS
    said = {
        "digest": name, "parent": None, "spec": store.spec.to_json(), "weights": {"pets": 0.9, "stills": 0.1},
        "mean": [0.0] * CHANNELS, "std": [1.0] * CHANNELS, "batches": batches,
        "offsets": {f"f{FRAMES}": {"pets": [0, 20 * CLIPS_A_VIDEO]}, "f1": {"stills": [0, IMAGES]}},
        "duplicates": "d0" * 16, "left_out": {}, "dropped": {},
    }  # fmt: skip
    write_trainset(folder, said, frozen, [rows.select(Lineage.column_names())])
    tables.publish_checks(f"{folder}/checks.json", "trainset", [])
    publish_latest(root, "trainset", name)


def _write_run(project: Project, extra: Sequence[str] = ()) -> None:
    how = ExecutionConfig(device="cpu", log_every_steps=1, diagnose_every_steps=2, checkpoint_every_steps=100)
    prepared = prepare_run(project, RECIPE, [*OVERRIDES, *extra], how)
    with join(how) as ranks:
        train(project, open_run(Path(prepared.folder)), ranks)
    finish_run(project, RECIPE, prepared.run_id)
    atomic.publish_json(project.root.latest_run(RECIPE), {"run": prepared.run_id})
