"""Small real media for these tests: films of drifting textures with hard cuts, and pictures."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from tests.factories import SIDE
from tests.nextvid.video import film

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
    film.write_film(path, np.concatenate(list(scenes)), fps=FPS, options=film.X264_FAST, crf=str(crf))


def write_picture(path: Path, name: str, quality: int = 92) -> None:
    """One frame of a scene as JPEG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(scene(name, 1)[0]).save(path, "JPEG", quality=quality)
