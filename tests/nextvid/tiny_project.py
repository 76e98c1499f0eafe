"""A project of random latents with a signal, its trainset, and a run of a few steps: what evaluation reads.

Latents are written straight into the store and tables by hand, so that no video is decoded; the run is a real one.
Clips of class `fish` carry a fixed pattern in one channel, `bird` none, so that any encoder tells them apart. The files
themselves do not exist.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from nextvid.config.project import Project
from nextvid.config.recipe import ExecutionConfig
from nextvid.encode.plan import encoding_spec
from nextvid.evaluate.compute import compute_probes
from nextvid.evaluate.probes import finish_probes, plan_probes
from nextvid.making.outcome import Outcome
from nextvid.train.distributed import join
from nextvid.train.loop import train
from nextvid.train.pretrain import finish_run, prepare_run
from nextvid.train.run import open_run
from storage import tables
from storage.digest import digest
from storage.records import publish_record
from storage.schemas import Clips, Labels, Lineage, Media
from storage.store import LatentStore
from tests.factories import (
    passed,
    publish_clips,
    publish_duplicates,
    publish_trainset,
    put_latents,
    save_autoencoder,
    table,
    write_project,
)
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


def write_evaluated(folder: Path, run: bool = True) -> Project:
    """Everything up to the trainset, and a run of 5 steps that `latest.json` points to."""
    torch.set_num_threads(1)
    save_autoencoder(folder / "autoencoder", CHANNELS)
    policy = {"frames": FRAMES, "fps": 4, "crop": "whole"}
    datasets = {
        "pets": {"uri": str(folder / "pets"), "weight": 0.9, "clips": [policy], "licence": "CC0-1.0"},
        "stills": {"uri": str(folder / "stills"), "weight": 0.1, "clips": [{"frames": 1}]},
    }
    species = {"datasets": ["pets"], "target": "animal", "policy": policy, "epochs": 4, "batch": 8, "seeds": 2}
    project = write_project(
        folder,
        datasets,
        root=str(folder / "root"),
        encoding={"autoencoder": str(folder / "autoencoder"), "resolution": 8 * SIDE},
        execution={"device": "cpu"},
        cache={"folder": str(folder / "cache")},
        benchmarks={"species": species},
    )
    _write_tables(project)
    if run:
        _write_run(project)
    return project


def write_pixel_project(folder: Path, extra: Sequence[str], without: Collection[bytes] = ()) -> Project:
    """With stored pixels of all rows but those in `without`, and a run that reads them, with `extra` overrides."""
    project = ask_for_pixels(write_evaluated(folder, run=False))
    write_pixels(project, without)
    _write_run(project, ("model.encoder.input=pixels", *extra))
    return project


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
    """Every table up to `duplicates`, the latents, and a trainset of all rows of the split train."""
    root, clips = project.root, clip_rows()
    store = LatentStore(root, encoding_spec(project))
    for (batch,), rows in clips.group_by("batch", maintain_order=True):
        assert isinstance(batch, str)
        publish_clips(project, batch, rows.drop("animal").to_dicts())
        tables.write_table(root.table("media", batch), _media(rows), Media)
        tables.write_table(root.table("labels", batch), _labels(rows), Labels)
        put_latents(
            store, batch, rows["frames"][0], {row["row_id"]: latents_of(row) for row in rows.iter_rows(named=True)}
        )
        passed(root.latents_checks(store.digest, batch), "latents")
    contamination = [
        {"benchmark": "species", "test_files": 10, "test_files_seen_in_pretraining": 0,
         "dropped_from_pretrain_shots": {},
         "dropped_from_probe_train_shots": 0, "train_files": 20, "train_files_in_pretraining": 20}
    ]  # fmt: skip
    publish_duplicates(project, batches=clips["batch"].unique().sort().to_list(), shots=96, contamination=contamination)
    lineage = clips.filter(split="train").select(Lineage.column_names())
    publish_trainset(store, lineage, {"pets": 0.9, "stills": 0.1}, [0.0] * CHANNELS, [1.0] * CHANNELS)


def _media(clips: pl.DataFrame) -> pl.DataFrame:
    known = ("uri", "dataset", "batch", "media_id", "kind", "decoder", "status")
    files = clips.unique("media_id", keep="first", maintain_order=True).select(
        known, path=pl.col("uri").str.split("/").list.last()
    )
    return table(Media, files.to_dicts(), revision=0, size_bytes=1000, hazards=[], licence="CC0-1.0")


def _labels(clips: pl.DataFrame) -> pl.DataFrame:
    labelled = clips.filter(pl.col("animal") != "none").unique("media_id", maintain_order=True)
    return table(Labels, labelled.select("media_id", value="animal").to_dicts(), target="animal")


def train_steps(project: Project, overrides: Sequence[str]) -> Path:
    """Train a run to its end, here; its folder."""
    how = ExecutionConfig(device="cpu", log_every_steps=1, diagnose_every_steps=2, checkpoint_every_steps=100)
    prepared = prepare_run(project, RECIPE, overrides, how)
    with join(how) as ranks:
        train(project, open_run(Path(prepared.folder)), ranks)
    return Path(prepared.folder)


def probe(project: Project, recipe: str = RECIPE, run: str | None = None, **plan: Any) -> Outcome:
    """`make_probes`, here instead of in child processes."""
    planned = plan_probes(project, recipe, run, **plan)
    if made := bool(planned.missing):
        with join(ExecutionConfig(device="cpu")) as ranks:
            compute_probes(project, planned, ranks)
    return finish_probes(planned, made=made, seconds=0.0)


def _write_run(project: Project, extra: Sequence[str] = ()) -> None:
    run = train_steps(project, [*OVERRIDES, *extra]).name
    finish_run(project, RECIPE, run)
    publish_record(project.root.latest_run(RECIPE), {"run": run})
