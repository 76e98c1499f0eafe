"""A project of a few videos and images with a clips table written by hand: what the encoder reads, nothing else."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import polars as pl
import yaml
from PIL import Image

from nextvid.config.corpus import MachineConfig
from nextvid.config.project import Project, open_project
from nextvid.encode.plan import accepted_spec
from storage.digest import digest, digest_file
from storage.latents import LatentStore
from storage.reader import read_row
from storage.schemas import Clips
from storage.tables import publish_checks, write_table

SIDE = 64
FPS = 8
FRAMES = 24  # 3 s
F = 4  # frames a clip
FILMS, STILLS = "films.000000", "stills.000000"


def texture(seed: int, frames: int = FRAMES, side: int = SIDE) -> np.ndarray:
    """Smooth random texture that drifts; uint8 [frames, side, side, 3]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side].astype(np.float64)
    kx, ky = rng.uniform(-0.1, 0.1, (2, 5, 3))
    phase, size = rng.uniform(0, 2 * np.pi, (5, 3)), rng.uniform(10, 22, (5, 3))
    out = np.empty((frames, side, side, 3))
    for frame in range(frames):
        at = x + 2.5 * frame
        for c in range(3):
            out[frame, :, :, c] = 128 + sum(
                size[i, c] * np.sin(2 * np.pi * (kx[i, c] * at + ky[i, c] * y) + phase[i, c]) for i in range(5)
            )
    return out.clip(0, 255).round().astype(np.uint8)


def write_video(path: Path, frames: np.ndarray) -> None:
    """H.264 of good quality in MP4, closed groups of pictures."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "8", "g": "12", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv444p"
        stream.time_base = Fraction(1, FPS)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())


def write_corpus(folder: Path, autoencoder: Path, **given: Any) -> Project:
    """corpus.yaml with one dataset of videos and one of images; `given` are keys of `execution` and `encoding`."""
    execution = {name: given.pop(name) for name in MachineConfig.model_fields if name in given}
    content = {
        "root": "root",
        "execution": {"batch_frames": 16, "device": "cpu"} | execution,
        "encoding": {"autoencoder": str(autoencoder), "resolution": SIDE} | given,
        "datasets": {
            "films": {"uri": "films", "weight": 3.0, "clips": [{"frames": F, "fps": FPS / 2}]},
            "stills": {"uri": "stills", "weight": 1.0, "clips": [{"frames": 1}]},
        },
    }
    for name in ("films", "stills"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "corpus.yaml").write_text(yaml.safe_dump(content))
    return open_project(folder / "corpus.yaml")


def clip_row(uri: Path, index: int, view: int = 0, **changes: Any) -> dict[str, Any]:
    """A row of Clips: the `index`-th clip of a file; views differ by crop and flip."""
    image = uri.suffix == ".png"
    media = bytes.fromhex(digest_file(uri)) if uri.exists() else bytes(16)
    start_us = index * 125_000
    times = [0] if image else [start_us + i * 250_000 for i in range(F)]
    row: dict[str, Any] = {
        "status": "ok",
        "reason": None,
        "error": None,
        "shot_id": bytes.fromhex(digest([media.hex(), "shot"])),
        "media_id": media,
        "dataset": "stills" if image else "films",
        "batch": f"{'stills' if image else 'films'}.000000",
        "uri": str(uri),
        "kind": "image" if image else "video",
        "decoder": "pillow" if image else "pyav",
        "frames": len(times),
        "times_us": times,
        "view_index": view,
        "crop_x": 4 * view,
        "crop_y": 2 * view,
        "crop_w": SIDE - 6 * view,
        "crop_h": SIDE - 6 * view,
        "flip": view % 2 == 1,
        "uses": ["pretrain"],
        "split": "train",
        "group": None,
    } | changes
    named = [media.hex(), *map(int, times)]
    row.setdefault("clip_id", bytes.fromhex(digest(named)))
    row.setdefault("row_id", bytes.fromhex(digest([*named, view])))
    return row


def publish_clips(project: Project, batch: str, rows: Sequence[dict[str, Any]]) -> pl.DataFrame:
    """Write a batch's clips table and its passed checks."""
    table = pl.DataFrame(list(rows), schema_overrides={"error": pl.String, "reason": pl.String, "group": pl.String})
    table = table.select(Clips.create_empty().columns).sort("row_id")
    write_table(project.root.table("clips", batch), table, Clips)
    publish_checks(project.root.checks("clips", batch), "clips", [{"name": "by hand", "passed": True}])
    return table


def films(folder: Path, count: int = 3) -> list[Path]:
    """`count` small videos of different textures."""
    paths = [folder / "films" / f"{index}.mp4" for index in range(count)]
    for index, path in enumerate(paths):
        if not path.exists():
            write_video(path, texture(index))
    return paths


def stills(folder: Path, count: int = 2) -> list[Path]:
    """`count` small images."""
    paths = [folder / "stills" / f"{index}.png" for index in range(count)]
    for index, path in enumerate(paths):
        Image.fromarray(texture(50 + index, 1)[0]).save(path)
    return paths


def begin(folder: Path, autoencoder: Path, **encoding: Any) -> Project:
    """Three films of four views and two stills of two, cut and not yet encoded."""
    made = write_corpus(folder, autoencoder, **encoding)
    rows = [clip_row(path, index, view) for path in films(folder) for index in (0, 3) for view in (0, 1)]
    publish_clips(made, FILMS, rows)
    publish_clips(made, STILLS, [clip_row(path, 0, view) for path in stills(folder) for view in (0, 1)])
    return made


def stored(project: Project, batch: str) -> dict[bytes, np.ndarray]:
    """Every committed row, read through zarr."""
    store = LatentStore(project.root, accepted_spec(project))
    good = store.commits(batch).filter(pl.col("status") == "ok")
    return {
        row["row_id"]: read_row(store, batch, row["frames"], row["part"], row["slot"])
        for row in good.iter_rows(named=True)
    }
