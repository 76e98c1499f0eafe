"""Small real media for these tests: films of drifting textures with hard cuts, and pictures; and projects over them."""

import hashlib
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import yaml
from PIL import Image

from nextvid.config.project import Project, open_project

SIDE = 64
FPS = 8


def seed_of(name: str) -> int:
    """A seed of one's own for each scene."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)


def scene(name: str, frames: int, speed: float = 0.6, light: float = 0.0) -> np.ndarray:
    """A texture of this name that drifts by `speed` pixels a frame; uint8 [frames, SIDE, SIDE, 3]. Unlike names look
    unlike."""
    rng = np.random.default_rng(seed_of(name))
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float64)
    base = rng.uniform(70, 180, 3)
    kx, ky = rng.uniform(-0.12, 0.12, (2, 6))
    phase, size = rng.uniform(0, 2 * np.pi, 6), rng.uniform(5, 10, 6)
    out = np.empty((frames, SIDE, SIDE, 3))
    for frame in range(frames):
        at = x + speed * frame
        wave = sum(size[i] * np.sin(2 * np.pi * (kx[i] * at + ky[i] * y) + phase[i]) for i in range(6))
        out[frame] = base + light + np.asarray(wave)[..., None]
    return out.clip(0, 255).round().astype(np.uint8)


def write_film(path: Path, scenes: Sequence[np.ndarray], crf: int = 10) -> None:
    """The scenes one after the other, cut hard, as H.264."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        options = {"crf": str(crf), "g": "12", "preset": "ultrafast", "threads": "1"}
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        stream.time_base = Fraction(1, FPS)
        for frame in np.concatenate(list(scenes)):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())


def write_picture(path: Path, name: str, quality: int = 92) -> None:
    """One frame of a scene as JPEG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(scene(name, 1)[0]).save(path, "JPEG", quality=quality)


def write_project(folder: Path, datasets: dict[str, Any], **more: Any) -> Project:
    """A corpus.yaml with its root in `folder`."""
    said = {"root": "root", "encoding": {"autoencoder": "none", "resolution": SIDE}, "datasets": datasets} | more
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "corpus.yaml"
    file.write_text(yaml.safe_dump(said), encoding="utf-8")
    return open_project(file)
