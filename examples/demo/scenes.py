"""Draw the demo's scenes as numpy frames: a handwritten digit that moves over a textured background.

Files are written by files.py, labels are planned by plan.py. The constants are those of the laptop study
(docs/demo.md). Speeds are per source frame; a clip takes every second frame, so they are double per stored frame. Axes:
n frames, h rows, w columns, c red, green, blue; frames are uint8, textures and masks float32 in 0..1.
"""

import functools
import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from storage.errors import CorpusError

Frames = NDArray[np.uint8]
Picture = NDArray[np.float32]
Rng = np.random.Generator

SIZE = 64  # pixels; docs/demo.md
SOURCE_FPS = 8  # our choice: clips of 4 frames a second take every second frame, as the study did
TRAIN_DIGITS = 1300  # docs/demo.md: the first 1300 digit images train, the other 497 test
GLYPH = 32  # pixels of a digit before it is warped onto the canvas: 4 times the 8 of scikit-learn's images
DIGIT_PX = (19.0, 24.0)  # docs/demo.md: digit canvas
SPEED_PX = (0.9, 1.7)  # docs/demo.md: per source frame
TURN_DEG = (4.0, 8.0)  # docs/demo.md: per source frame
LOG_SCALE = (0.035, 0.06)  # docs/demo.md: per source frame
DRIFTING = 0.75  # docs/demo.md: share of scenes whose background drifts, independently of the digit
DRIFT_PX = 1.0  # docs/demo.md: fastest drift per source frame
BLOBS = (4, 11)  # docs/demo.md: 4 to 10 blobs
STRIPES = (0.02, 0.05)  # our choice: stronger ones, drifting, look like dissolves (22 of 505 shots were lost at .09)
CLOUD, CLOUD_PX = 0.05, 7.0  # brightness and spacing; our measurement: no two of 5000 scenes have hashes within 31 bits
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601
CUT_CONTENT = 40.0  # neighbouring scenes differ by this in ContentDetector's measure, whose threshold is 27
DISSOLVE_LUMA = 50.0  # mean change of luma over a dissolve: detectors ask for 20 within 0.48 s
DIRECTIONS = ("right", "down_right", "down", "down_left", "left", "up_left", "up", "up_right")
MOTIONS = (*DIRECTIONS, "turn_clockwise", "turn_anticlockwise", "grow", "shrink")  # 12 classes: 8 + 2 + 2


@dataclass(frozen=True)
class Scene:
    """A background: a texture wider than the frame, and how the frame slides over it."""

    texture: Picture  # [h, w, c], SIZE + 2 * margin on a side
    margin: int
    drift: tuple[float, float]  # pixels per source frame, x then y


@dataclass(frozen=True)
class Shot:
    """One digit moving over one scene. Times are source frames, 0 the middle of the shot."""

    scene: Scene
    digit: int  # index into scikit-learn's 1797 images
    motion: str | None  # one of MOTIONS; None: nothing moves at all
    colour: tuple[float, float, float]
    centre: tuple[float, float]  # x, y at the middle of the shot
    size: float  # pixels of the digit's canvas at the middle of the shot
    angle: float  # degrees at the middle of the shot
    rate: float  # pixels, degrees or log scale per source frame
    gain: float
    flicker: float  # standard deviation of the gain from frame to frame
    flicker_seed: int


@functools.cache
def digits() -> tuple[Picture, NDArray[np.int64]]:
    """Scikit-learn's 1797 handwritten digits as masks [n, GLYPH, GLYPH] with soft edges, and which digit each shows.

    Sharpened strokes cost the autoencoder 2 dB of its PSNR (our measurement), so they stay as soft as the 8 x 8 images.
    """
    loaded = load_digits()
    masks = [cv2.resize(image, (GLYPH, GLYPH), interpolation=cv2.INTER_LINEAR) for image in loaded.images / 16.0]
    return np.stack(masks).astype(np.float32), loaded.target.astype(np.int64)


@functools.cache
def digit_images(split: str, shape: int) -> NDArray[np.int64]:
    """Indices of the images that show digit `shape` in a split; train and test share none.

    Raises CorpusError on a split that is neither `train` nor `test`.
    """
    _, shown = digits()
    indices = np.flatnonzero(shown == shape)
    match split:
        case "train":
            return indices[indices < TRAIN_DIGITS]
        case "test":
            return indices[indices >= TRAIN_DIGITS]
        case _:
            raise CorpusError(f"split '{split}': the demo has digits for 'train' and 'test'")


def draw_scene(rng: Rng, margin: int, moving: bool = True) -> Scene:
    """Draw a background: a gradient of two related colours, stripes and blobs; `moving=False` never drifts."""
    side = SIZE + 2 * margin
    hue, saturation, value = rng.uniform(0, 1), rng.uniform(0.35, 0.8), rng.uniform(0.3, 0.85)
    first = _rgb(hue, saturation, value)
    second = _rgb(hue + rng.uniform(-0.1, 0.1), saturation + rng.uniform(-0.2, 0.2), value + rng.uniform(-0.25, 0.25))
    y, x = np.meshgrid(*[np.linspace(-side / SIZE, side / SIZE, side, dtype=np.float32)] * 2, indexing="ij")
    theta = rng.uniform(0, 2 * math.pi)
    ramp = np.clip(0.5 + 0.5 * (np.cos(theta) * x + np.sin(theta) * y), 0, 1)[..., None]
    texture = first + (second - first) * ramp
    theta, period = rng.uniform(0, math.pi), rng.uniform(7, 18) / (SIZE / 2)  # pixels to the unit of x and y
    wave = np.sin((np.cos(theta) * x + np.sin(theta) * y) * np.float32(2 * math.pi / period) + rng.uniform(0, 6.28))
    texture += (np.float32(rng.uniform(*STRIPES)) * wave)[..., None]
    axis = np.arange(side, dtype=np.float32)
    for _ in range(round(int(rng.integers(*BLOBS)) * (side / SIZE) ** 2)):  # soft spots, as many per area at every size
        (y_at, x_at), width = rng.uniform(0, side, 2), rng.uniform(2.5, 7.0)
        colour = rng.uniform(-0.3, 0.3, 3).astype(np.float32)
        rows, columns = (np.exp(-0.5 * ((axis - at) / width) ** 2) for at in (y_at, x_at))
        texture += rows[:, None, None] * columns[None, :, None] * colour
    # a smooth random field: with it, scenes with similar stripes differ in their perceptual hashes
    knots = math.ceil(side / CLOUD_PX) + 1
    field = rng.standard_normal((knots, knots)).astype(np.float32) * np.float32(CLOUD)
    texture += cv2.resize(field, (side, side), interpolation=cv2.INTER_CUBIC)[..., None]
    speed = rng.uniform(0, DRIFT_PX) if moving and rng.uniform() < DRIFTING else 0.0
    heading = rng.uniform(0, 2 * math.pi)
    drift = (speed * math.cos(heading), speed * math.sin(heading))
    return Scene(np.clip(texture, 0.0, 1.0).astype(np.float32), margin, drift)


def draw_shot(rng: Rng, digit: int, motion: str | None, margin: int, before: Shot | None, dissolve: bool) -> Shot:
    """Draw a shot of `digit` whose scene differs enough from the one before for its cut or dissolve to be found.

    Backgrounds are drawn again, at most 64 times, until they differ by CUT_CONTENT and, for a dissolve, DISSOLVE_LUMA.
    """
    scene = draw_scene(rng, margin, moving=motion is not None)
    for _ in range(64):
        if before is None or _differ(before.scene, scene, dissolve):
            break
        scene = draw_scene(rng, margin, moving=motion is not None)
    tint = rng.uniform(-0.15, 0.15, 3)
    bright = float((_inner(scene) @ LUMA).mean()) < 0.5
    level = rng.uniform(0.85, 1.0) if bright else rng.uniform(0.0, 0.15)
    red, green, blue = np.clip(level + tint, 0, 1).tolist()
    centre = SIZE / 2 + rng.uniform(-3, 3, 2)
    still = motion is None
    return Shot(
        scene=scene,
        digit=digit,
        motion=motion,
        colour=(red, green, blue),
        centre=(float(centre[0]), float(centre[1])),
        size=rng.uniform(*DIGIT_PX),
        angle=rng.uniform(-12, 12),
        rate=rng.uniform(*_rates(motion)),
        gain=rng.uniform(0.92, 1.08),
        flicker=0.0 if still else rng.uniform(0.0, 0.015),
        flicker_seed=int(rng.integers(2**31)),
    )


def render(shot: Shot, first: int, count: int, length: int) -> Frames:
    """Frames [n, h, w, c] number `first` to `first + count` of a shot whose clear part is `length` frames.

    Frames before 0 and from `length` on are shown in dissolves. A frame has the same pixels in whichever range it is.
    """
    (glyph, _), scene = digits(), shot.scene
    colour = np.array(shot.colour, np.float32)
    frames = np.empty((count, SIZE, SIZE, 3), np.uint8)
    for n in range(count):
        number = first + n
        time = number - (length - 1) / 2
        picture = _inner(scene).copy()
        if scene.drift != (0.0, 0.0):
            shift = [min(max(scene.margin + speed * time, 0.0), 2.0 * scene.margin) for speed in scene.drift]
            matrix = np.array([[1, 0, -shift[0]], [0, 1, -shift[1]]])
            size, border = (SIZE, SIZE), cv2.BORDER_REPLICATE
            picture = np.asarray(cv2.warpAffine(scene.texture, matrix, size, None, cv2.INTER_LINEAR, border))
        mask = _place(glyph[shot.digit], shot, time)[..., None]
        picture += mask * (colour - picture)
        gain = shot.gain
        if shot.flicker:
            gain += shot.flicker * np.random.default_rng((shot.flicker_seed, number + 1024)).standard_normal()
        frames[n] = np.clip(picture * (255 * gain) + 0.5, 0, 255)
    return frames


def dissolve(old: Frames, new: Frames) -> Frames:
    """Blend two stretches of n frames linearly; neither end is pure."""
    count = len(old)
    weight = (np.arange(1, count + 1, dtype=np.float32) / (count + 1))[:, None, None, None]
    return (old * (1 - weight) + new * weight + 0.5).astype(np.uint8)


def _rates(motion: str | None) -> tuple[float, float]:
    match motion:
        case None:
            return 0.0, 0.0
        case "turn_clockwise" | "turn_anticlockwise":
            return TURN_DEG
        case "grow" | "shrink":
            return LOG_SCALE
        case _:
            return SPEED_PX


def _place(glyph: Picture, shot: Shot, time: float) -> Picture:
    """The digit's mask [h, w] at `time`: its image under rotation, scale and shift."""
    (x, y), size, angle = shot.centre, shot.size, shot.angle
    match shot.motion:
        case None:
            pass
        case "turn_clockwise":
            angle += shot.rate * time
        case "turn_anticlockwise":
            angle -= shot.rate * time
        case "grow":
            size *= math.exp(shot.rate * time)
        case "shrink":
            size *= math.exp(-shot.rate * time)
        case direction:
            heading = DIRECTIONS.index(direction) * math.pi / 4  # rows run down, so angles run clockwise
            x, y = x + shot.rate * time * math.cos(heading), y + shot.rate * time * math.sin(heading)
    scale, turn = size / GLYPH, math.radians(angle)
    cos, sin, middle = scale * math.cos(turn), scale * math.sin(turn), (GLYPH - 1) / 2
    matrix = np.array([[cos, -sin, x - (cos - sin) * middle], [sin, cos, y - (sin + cos) * middle]])
    return np.asarray(cv2.warpAffine(glyph, matrix, (SIZE, SIZE), flags=cv2.INTER_LINEAR), np.float32)


def _inner(scene: Scene) -> Picture:
    return scene.texture[scene.margin : scene.margin + SIZE, scene.margin : scene.margin + SIZE]


def _differ(old: Scene, new: Scene, dissolve: bool) -> bool:
    """Whether ContentDetector's measure (mean change of hue, saturation and value) clears its threshold with room."""
    a, b = ((_inner(scene) * 255).astype(np.uint8) for scene in (old, new))
    hsv_a, hsv_b = (cv2.cvtColor(picture, cv2.COLOR_RGB2HSV).astype(np.float32) for picture in (a, b))
    if float(np.abs(hsv_a - hsv_b).mean()) < CUT_CONTENT:
        return False
    grey_a, grey_b = (cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY).astype(np.float32) for picture in (a, b))
    return not dissolve or float(np.abs(grey_a - grey_b).mean()) >= DISSOLVE_LUMA


def _rgb(hue: float, saturation: float, value: float) -> Picture:
    """One colour [c] from hue (any real, turns), saturation and value (clipped)."""
    hsv = np.array([[[hue % 1.0 * 360, np.clip(saturation, 0.25, 1), np.clip(value, 0.15, 1)]]], np.float32)
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0], np.float32)
