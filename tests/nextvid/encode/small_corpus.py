"""A project of a few videos and images with a clips table written by hand: what the encoder reads, nothing else."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from PIL import Image

from nextvid.config.corpus import MachineConfig
from nextvid.config.project import Project
from nextvid.encode.plan import accepted_spec
from storage.reader import read_row
from storage.store import LatentStore
from tests import factories
from tests.factories import SIDE, clip_row, publish_clips, write_project
from tests.nextvid.video import film

FPS = 8
FRAMES = 24  # 3 s
F = factories.FRAMES  # of a clip
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
    film.write_film(path, frames, fps=FPS, options=film.X264_FAST, pix_fmt="yuv444p", crf="8")


def write_corpus(folder: Path, autoencoder: Path, **given: Any) -> Project:
    """corpus.yaml with one dataset of videos and one of images; `given` are keys of `execution` and `encoding`."""
    execution = {name: given.pop(name) for name in MachineConfig.model_fields if name in given}
    for name in ("films", "stills"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    datasets = {
        "films": {"uri": "films", "weight": 3.0, "clips": [{"frames": F, "fps": FPS / 2}]},
        "stills": {"uri": "stills", "weight": 1.0, "clips": [{"frames": 1}]},
    }
    encoding = {"autoencoder": str(autoencoder), "resolution": SIDE} | given
    return write_project(
        folder, datasets, encoding=encoding, execution={"batch_frames": 16, "device": "cpu"} | execution
    )


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
