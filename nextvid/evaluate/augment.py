"""Augmentation of the clips that probes of pixel encoders learn from; a function of seed, epoch and row alone.

The kinds are those of V-JEPA 2's public probe (docs/method.md 9): RandAugment for videos, the original AutoAugment
policy and flips for images, random resized crops and erasing for both. One draw holds for all frames of a clip, so
still images stay still. Input are stored frames, after their crop.

Axes: F frames, H W pixels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageEnhance, ImageOps

from nextvid.config.benchmarks import Augmentation
from storage.digest import digest

Frames = UInt8[np.ndarray, "F H W 3"]
Box = tuple[int, int, int, int]  # x, y, w, h

LAYERS, MAGNITUDE, SPREAD = 4, 7.0, 0.5  # RandAugment m7 n4 mstd0.5 (docs/method.md 9)
LAYER_SHARE = 0.5  # timm: each of RandAugment's layers is applied with this probability
MOST_MAGNITUDE = 10.0
CROP_AREA, CROP_ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)  # docs/method.md 9
ERASED_SHARE = 0.25  # docs/method.md 9: of the clips
ERASED_AREA, ERASED_ASPECT = (0.02, 1 / 3), (0.3, 1 / 0.3)  # timm's RandomErasing
TRIES = 10  # torchvision's and timm's, for both boxes
GREY = (128, 128, 128)  # fills what a move uncovers
NOISE = 127.5  # standard deviation of 1 where pixels are in [-1, 1]
# at magnitude 10 (timm's RandAugment): degrees, and shares of a side
MOVES = {"rotate": 30.0, "shear_x": 0.3, "shear_y": 0.3, "translate_x": 0.45, "translate_y": 0.45}
STRENGTH = 0.9  # of enhancements, at magnitude 10
ADDED, DARK = 110, 128  # what SolarizeAdd adds at magnitude 10, to values below DARK


def _moved(image: Image.Image, *by: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, by, Image.Resampling.BILINEAR, fillcolor=GREY)


OPERATIONS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "autocontrast": lambda image, _: ImageOps.autocontrast(image),
    "equalize": lambda image, _: ImageOps.equalize(image),
    "invert": lambda image, _: ImageOps.invert(image),
    "rotate": lambda image, degrees: image.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=GREY),
    "posterize": lambda image, bits: ImageOps.posterize(image, int(bits)),
    "solarize": lambda image, threshold: ImageOps.solarize(image, int(threshold)),
    "solarize_add": lambda image, added: image.point(
        [min(255, value + int(added)) if value < DARK else value for value in range(256)] * 3
    ),
    "colour": lambda image, factor: ImageEnhance.Color(image).enhance(factor),
    "contrast": lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
    "brightness": lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    "sharpness": lambda image, factor: ImageEnhance.Sharpness(image).enhance(factor),
    "shear_x": lambda image, share: _moved(image, 1, share, 0, 0, 1, 0),
    "shear_y": lambda image, share: _moved(image, 1, 0, 0, share, 1, 0),
    "translate_x": lambda image, share: _moved(image, 1, 0, share * image.width, 0, 1, 0),
    "translate_y": lambda image, share: _moved(image, 1, 0, 0, 0, 1, share * image.height),
}
ENHANCEMENTS = frozenset({"colour", "contrast", "brightness", "sharpness"})

# AutoAugment's policy for ImageNet: one pair is drawn; (operation, probability, magnitude).
POLICY: tuple[tuple[tuple[str, float, int], tuple[str, float, int]], ...] = (
    (("posterize", 0.4, 8), ("rotate", 0.6, 9)),
    (("solarize", 0.6, 5), ("autocontrast", 0.6, 5)),
    (("equalize", 0.8, 8), ("equalize", 0.6, 3)),
    (("posterize", 0.6, 7), ("posterize", 0.6, 6)),
    (("equalize", 0.4, 7), ("solarize", 0.2, 4)),
    (("equalize", 0.4, 4), ("rotate", 0.8, 8)),
    (("solarize", 0.6, 3), ("equalize", 0.6, 7)),
    (("posterize", 0.8, 5), ("equalize", 1.0, 2)),
    (("rotate", 0.2, 3), ("solarize", 0.6, 8)),
    (("equalize", 0.6, 8), ("posterize", 0.4, 6)),
    (("rotate", 0.8, 8), ("colour", 0.4, 0)),
    (("rotate", 0.4, 9), ("equalize", 0.6, 2)),
    (("equalize", 0.0, 7), ("equalize", 0.8, 8)),
    (("invert", 0.6, 4), ("equalize", 1.0, 8)),
    (("colour", 0.6, 4), ("contrast", 1.0, 8)),
    (("rotate", 0.8, 8), ("colour", 1.0, 2)),
    (("colour", 0.8, 8), ("solarize", 0.8, 7)),
    (("sharpness", 0.4, 7), ("invert", 0.6, 8)),
    (("shear_x", 0.6, 5), ("equalize", 1.0, 9)),
    (("colour", 0.4, 0), ("equalize", 0.6, 3)),
    (("equalize", 0.4, 7), ("solarize", 0.2, 4)),
    (("solarize", 0.6, 5), ("autocontrast", 0.6, 5)),
    (("invert", 0.6, 4), ("equalize", 1.0, 8)),
    (("colour", 0.6, 4), ("contrast", 1.0, 8)),
    (("equalize", 0.8, 8), ("equalize", 0.6, 3)),
)


@dataclass(frozen=True)
class Drawn:
    """What happens to every frame of one clip, in this order."""

    operations: tuple[tuple[str, float], ...]  # with their arguments
    crop: Box  # resized to the whole frame
    flip: bool
    erased: Box | None
    noise: int  # seed of what is put there


def augmented(frames: Frames, kind: Augmentation, seed: int, epoch: int, row: bytes) -> Frames:
    """A clip as the probe learns from it in an epoch."""
    if kind == "none":
        return frames
    drawn = draw(kind, seed, epoch, row, frames.shape[2], frames.shape[1])
    return np.stack([_applied(frame, drawn) for frame in frames])


def middle(frames: Frames, share: float) -> Frames:
    """The middle of each frame, by share of the side, resized to the whole."""
    height, width = frames.shape[1:3]
    x, y = width * (1 - share) / 2, height * (1 - share) / 2
    box = (x, y, width - x, height - y)
    pictures = (Image.fromarray(frame) for frame in frames)
    return np.stack([np.array(each.resize(each.size, Image.Resampling.BICUBIC, box=box)) for each in pictures])


def draw(kind: Augmentation, seed: int, epoch: int, row: bytes, width: int, height: int) -> Drawn:
    """What happens to a row in an epoch; `seed` is that of the probe heads."""
    rng = np.random.Generator(np.random.Philox(key=int(digest(["augment", kind, seed, epoch, row.hex()]), 16)))
    operations = _rand_augment(rng) if kind == "video" else _auto_augment(rng)
    side = min(width, height)
    crop = _box(rng, CROP_AREA, CROP_ASPECT, width, height) or ((width - side) // 2, (height - side) // 2, side, side)
    flip = kind == "image" and bool(rng.random() < 0.5)  # never videos: directions are what some classes differ by
    erased = _box(rng, ERASED_AREA, ERASED_ASPECT, width, height) if rng.random() < ERASED_SHARE else None
    return Drawn(operations, crop, flip, erased, int(rng.integers(1 << 32)))


def _rand_augment(rng: np.random.Generator) -> tuple[tuple[str, float], ...]:
    """Some of LAYERS operations, drawn with replacement; a larger magnitude changes more with every operation."""
    found: list[tuple[str, float]] = []
    for name in rng.choice(list(OPERATIONS), LAYERS).tolist():
        if rng.random() < LAYER_SHARE:
            level = float(np.clip(rng.normal(MAGNITUDE, SPREAD), 0, MOST_MAGNITUDE)) / MOST_MAGNITUDE
            match name:
                case "posterize":
                    found.append((name, 4.0 - int(4 * level)))
                case "solarize":
                    found.append((name, 256.0 - int(256 * level)))
                case name if name in ENHANCEMENTS:
                    found.append((name, max(0.1, 1 + _signed(rng, STRENGTH * level))))
                case _:
                    found.append((name, _argument(rng, name, level)))
    return tuple(found)


def _auto_augment(rng: np.random.Generator) -> tuple[tuple[str, float], ...]:
    """One pair of the policy, each half with its probability."""
    found: list[tuple[str, float]] = []
    for name, probability, magnitude in POLICY[int(rng.integers(len(POLICY)))]:
        if rng.random() < probability:
            level = magnitude / MOST_MAGNITUDE
            match name:
                case "posterize":
                    found.append((name, 4.0 + int(4 * level)))
                case "solarize":
                    found.append((name, float(int(256 * level))))
                case name if name in ENHANCEMENTS:
                    found.append((name, 0.1 + 1.8 * level))
                case _:
                    found.append((name, _argument(rng, name, level)))
    return tuple(found)


def _argument(rng: np.random.Generator, name: str, level: float) -> float:
    """Arguments that are the same function of magnitude in both policies; 0 for operations without one."""
    if name == "solarize_add":
        return float(int(ADDED * level))
    return _signed(rng, MOVES[name] * level) if name in MOVES else 0.0


def _signed(rng: np.random.Generator, value: float) -> float:
    return -value if rng.random() < 0.5 else value


def _box(
    rng: np.random.Generator, area: tuple[float, float], aspect: tuple[float, float], width: int, height: int
) -> Box | None:
    """A random box inside the frame, by share of its area and log-uniform aspect ratio; None where no try fits."""
    for _ in range(TRIES):
        pixels = width * height * rng.uniform(*area)
        ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
        w, h = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    return None


def _applied(frame: UInt8[np.ndarray, "H W 3"], drawn: Drawn) -> UInt8[np.ndarray, "H W 3"]:
    image = Image.fromarray(frame)
    for name, argument in drawn.operations:
        image = OPERATIONS[name](image, argument)
    x, y, w, h = drawn.crop
    image = image.resize(image.size, Image.Resampling.BILINEAR, box=(x, y, x + w, y + h))
    found = np.array(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if drawn.flip else image)
    if drawn.erased is not None:
        x, y, w, h = drawn.erased
        noise = np.random.default_rng(drawn.noise).normal(127.5, NOISE, (h, w, 3))
        found[y : y + h, x : x + w] = noise.clip(0, 255).round()
    return found
