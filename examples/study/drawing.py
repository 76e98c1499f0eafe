"""Draw the study's clips: handwritten digits that fill the frame, over smooth colour fields, at three speeds.

A clip of one number shows the same digit, colours, place and direction in every data set; only speeds differ. Axes: n
frames, h rows, w columns, c red, green, blue.
"""

import csv
import math
import shutil
from pathlib import Path

import cv2
import numpy as np

from examples.demo.files import write_video
from examples.demo.scenes import (
    DIRECTIONS,
    DRIFT_PX,
    DRIFTING,
    GLYPH,
    LOG_SCALE,
    MOTIONS,
    SIZE,
    SPEED_PX,
    TURN_DEG,
    Frames,
    Picture,
    Rng,
    digit_images,
    digits,
)
from examples.study.tables import Data

SOURCE_FRAMES = 10  # at 8 a second: a clip of 4 frames at 4 a second and room for it
SIDE_PX = (44.0, 60.0)  # of a digit's canvas, the pilot's (docs/study_plan.md)
TILT_DEG = 20.0  # the pilot's
MARGIN = 16  # pixels of ground around the frame: a drift of 1 pixel a source frame uses 5
KNOT_PX = 16  # distance of the knots of a ground's colours; of a digit's it is the frame's side
COLUMNS = ("path", "shape", "motion", "split")


def write_clips(folder: Path, data: Data, train: int, test: int) -> None:
    """Write a data set once: a video for each clip under videos/, and labels.csv. A folder that exists is complete."""
    if folder.exists():
        return
    making = folder.with_name(f".{folder.name}.making")
    shutil.rmtree(making, ignore_errors=True)
    (making / "videos").mkdir(parents=True)
    rows = []
    for split, count in (("train", train), ("test", test)):
        for number in range(count):
            rng = np.random.default_rng([split == "test", number])
            shape, motion = number % 10, MOTIONS[number // 10 % len(MOTIONS)]
            digit = int(rng.choice(digit_images(split, shape)))
            name = f"{split}_{number:05d}.mp4"
            write_video(making / "videos" / name, draw_clip(rng, digit, motion, data.speed, data.drift))
            rows.append((name, f"digit_{shape}", motion, split))
    with (making / "labels.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(rows)
    making.rename(folder)


def draw_clip(rng: Rng, digit: int, motion: str, speed: float, drift: bool) -> Frames:
    """Frames [n, h, w, c] of one clip. `speed` is over the demo's; every draw is the same at every speed."""
    ground = 0.55 * _colours(rng, SIZE + 2 * MARGIN, KNOT_PX)
    object_ = 0.45 + 0.55 * _colours(rng, SIZE, SIZE)
    if rng.random() < 0.5:
        ground, object_ = 1 - ground, 1 - object_
    side, tilt = rng.uniform(*SIDE_PX), rng.uniform(-TILT_DEG, TILT_DEG)
    centre = SIZE / 2 + rng.uniform(-1, 1, 2) * (SIZE - side) / 2
    rates = {"turn": TURN_DEG, "size": LOG_SCALE, "place": SPEED_PX}
    rate = {name: speed * rng.uniform(*bounds) for name, bounds in rates.items()}
    heading, pace = rng.uniform(0, 2 * math.pi), rng.uniform(0, DRIFT_PX) * (rng.random() < DRIFTING)
    glyph, frames = digits()[0][digit], np.empty((SOURCE_FRAMES, SIZE, SIZE, 3), np.uint8)
    for number in range(SOURCE_FRAMES):
        time = number - (SOURCE_FRAMES - 1) / 2
        x, y, now, angle = centre[0], centre[1], side, tilt
        match motion:
            case "turn_clockwise" | "turn_anticlockwise":
                angle += rate["turn"] * time * (1 if motion == "turn_clockwise" else -1)
            case "grow" | "shrink":
                now *= math.exp(rate["size"] * time * (1 if motion == "grow" else -1))
            case _:
                way = DIRECTIONS.index(motion) * math.pi / 4
                x, y = x + rate["place"] * time * math.cos(way), y + rate["place"] * time * math.sin(way)
        mask = _placed(glyph, x, y, now, angle)[..., None]
        shift = [MARGIN + drift * pace * time * part for part in (math.cos(heading), math.sin(heading))]
        behind = cv2.warpAffine(ground, np.array([[1, 0, -shift[0]], [0, 1, -shift[1]]]), (SIZE, SIZE))
        frames[number] = np.clip((behind * (1 - mask) + object_ * mask) * 255 + 0.5, 0, 255)
    return frames


def _colours(rng: Rng, side: int, knot_px: int) -> Picture:
    """A smooth random field of colours [h, w, c] of `side` pixels, from 0 to 1."""
    knots = max(2, side // knot_px)
    field = cv2.resize(rng.random((knots, knots, 3)).astype(np.float32), (side, side), interpolation=cv2.INTER_CUBIC)
    return np.asarray(np.clip(field, 0, 1), np.float32)


def _placed(glyph: Picture, x: float, y: float, side: float, angle: float) -> Picture:
    """The digit's mask [h, w] of `side` pixels, turned by `angle` degrees, its middle at (x, y)."""
    scale, turn = side / GLYPH, math.radians(angle)
    cos, sin, middle = scale * math.cos(turn), scale * math.sin(turn), (GLYPH - 1) / 2
    matrix = np.array([[cos, -sin, x - (cos - sin) * middle], [sin, cos, y - (sin + cos) * middle]])
    return np.asarray(cv2.warpAffine(glyph, matrix, (SIZE, SIZE), flags=cv2.INTER_LINEAR), np.float32)
