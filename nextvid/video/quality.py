"""Scores of a shot from frames sampled a few times a second: motion, freeze, light, blur, letterbox, perceptual hashes.

Scores decide nothing here: thresholds are applied when clips are cut (nextvid/corpus/cutting.py), so that a new one
decodes nothing again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
from jaxtyping import UInt8

from nextvid.video.display import Display
from nextvid.video.pdq import pdq_hash
from nextvid.video.planes import Look, Planes

# Of the short side. Our measurement on 665 pairs of real frames: a third of the time of 64 pixels,
# the scores correlate by 0.99 and their medians differ by 7 %.
FLOW_SIDE = 40
FLOW_S = 0.25  # motion is stated per quarter second
GREY_SIDE = 256  # our choice: blur and letterbox on 256 pixels of the short side
PICTURE_SIDE = 160  # longest side of the kept picture: preview, and what is hashed (PDQ itself works on 64 x 64)
FREEZE = 0.05  # our choice: grey levels of difference between thumbnails below which nothing moved
BAR_MEAN = 24.0  # our choice: grey level of a bar, with room for coding noise and lifted blacks
BAR_STD = 8.0  # our choice: a bar is flat
BAR_SHARE = 0.02  # our choice: a bar counts from 2 % of a side on ...
BAR_FRAMES = 0.9  # ... when it is there in 90 % of the frames
FARNEBACK = (
    0.5,
    3,
    15,
    3,
    5,
    1.2,
    0,
)  # OpenCV's documented example: pyramid, levels, window, iterations, poly n and sigma


@dataclass(frozen=True)
class Sample:
    """One sampled frame. The first five numbers are grey levels; bars are shares of height and width."""

    time_us: int
    luma_mean: float
    luma_std: float
    blur: float
    change: float | None  # mean difference of thumbnails from the sample before; None for the first
    motion: float | None  # mean |flow| from the sample before, % of the diagonal per 0.25 s
    bars: tuple[float, float, float, float] | None  # top, bottom, left, right; None where the frame is dark all over


@dataclass(frozen=True)
class Scores:
    """Scores of one shot, as in the `shots` table."""

    motion_mean: float
    motion_p90: float
    freeze_share: float
    luma_mean: float
    luma_std: float
    blur: float
    black_share: float


@dataclass(frozen=True)
class Box:
    """A rectangle in upright source pixels."""

    x: int
    y: int
    w: int
    h: int


class Sampler:
    """Measures sampled frames of one file, each against the one before."""

    def __init__(self, display: Display) -> None:
        self._display = display
        self._sizes: tuple[tuple[int, int], ...] = ()  # (width, height) of the grey, kept and small pictures
        self._before: tuple[int, UInt8[np.ndarray, "h w"], UInt8[np.ndarray, "h w"]] | None = None

    def grey(self, planes: Planes) -> UInt8[np.ndarray, "h w"]:
        """The picture to measure, in square pixels and not upright; those of a file have the size of the first."""
        if not self._sizes:
            height, width = planes.y.shape
            width, height = replace(self._display, turns=0).size(width, height)
            grey, shrink = _shrunk(width, height, GREY_SIDE / min(width, height)), FLOW_SIDE / min(width, height)
            small = (max(1, round(width * shrink)), max(1, round(height * shrink)))
            self._sizes = (grey, _shrunk(*grey, PICTURE_SIDE / max(grey)), small)
        return planes.grey(*self._sizes[0])

    def measure(
        self, time_us: int, grey: UInt8[np.ndarray, "h w"], thumb: UInt8[np.ndarray, "h3 w"]
    ) -> tuple[Sample, Look]:
        """The sample and its upright picture, at most 160 pixels a side, from `grey` and `Planes.thumbnail`."""
        luma, *chroma = thumb.reshape(3, -1, thumb.shape[1])
        _, kept, least = self._sizes
        picture = cv2.resize(grey, kept, interpolation=cv2.INTER_LINEAR)
        small = cv2.resize(picture, least, interpolation=cv2.INTER_LINEAR)
        change = motion = None
        if self._before is not None:
            before_us, before_luma, before_small = self._before
            change = float(cv2.norm(luma, before_luma, cv2.NORM_L1)) / luma.size
            squares = np.square(cv2.calcOpticalFlowFarneback(before_small, small, None, *FARNEBACK))
            # not `sum` over an axis of two, which is ten times slower
            pixels = float(np.sqrt(squares[..., 0] + squares[..., 1]).mean())
            share = 100.0 * pixels / float(np.hypot(*small.shape))
            motion = share * FLOW_S / max((time_us - before_us) / 1e6, 1e-3)
        self._before = (time_us, luma, small)
        mean, std = cv2.meanStdDev(luma)
        edges = cv2.Laplacian(grey, cv2.CV_16S)
        mean_square = cv2.norm(edges, cv2.NORM_L2SQR) / edges.size  # a tenth of the time of meanStdDev on 16 bits
        sample = Sample(
            time_us=time_us,
            luma_mean=float(mean[0, 0]),
            luma_std=float(std[0, 0]),
            blur=float(mean_square - cv2.mean(edges)[0] ** 2),
            change=change,
            motion=motion,
            bars=_bars(self._display.upright(grey)),
        )
        return sample, Look(
            self._display.upright(picture), np.array([self._display.upright(plane) for plane in chroma])
        )


def _shrunk(width: int, height: int, share: float) -> tuple[int, int]:
    return max(1, round(width * min(1.0, share))), max(1, round(height * min(1.0, share)))


def scores(samples: Sequence[Sample], black_luma: float) -> Scores:
    """Scores of the samples of one shot, in order. What needs pairs of samples is 0 where there is only one."""
    assert samples, "a shot has at least one sample"
    pairs = samples[1:]  # the first sample's pair began in the shot before
    motion = [s.motion for s in pairs if s.motion is not None] or [0.0]
    frozen = [s.change < FREEZE for s in pairs if s.change is not None] or [False]
    luma = [s.luma_mean for s in samples]
    return Scores(
        motion_mean=float(np.mean(motion)),
        motion_p90=float(np.percentile(motion, 90)),
        freeze_share=float(np.mean(frozen)),
        luma_mean=float(np.mean(luma)),
        luma_std=float(np.mean([s.luma_std for s in samples])),
        blur=float(np.median([s.blur for s in samples])),
        black_share=float(np.mean([value < black_luma for value in luma])),
    )


def crop_box(samples: Sequence[Sample], width: int, height: int) -> Box:
    """The picture without bars that are in 90 % of the samples; the whole frame where there are none."""
    seen = [sample.bars for sample in samples if sample.bars is not None]
    if not seen:
        return Box(0, 0, width, height)
    steady = np.quantile(np.array(seen), 1 - BAR_FRAMES, axis=0, method="lower")
    sides = np.array([height, height, width, width])
    top, bottom, left, right = (np.ceil(np.where(steady >= BAR_SHARE, steady, 0.0) * sides - 1e-9)).astype(int).tolist()
    if (
        width - left - right < width // 4 or height - top - bottom < height // 4
    ):  # our choice: no letterbox leaves a strip
        return Box(0, 0, width, height)
    return Box(left, top, width - left - right, height - top - bottom)


def perceptual_hash(luma: UInt8[np.ndarray, "h w"], box: Box, width: int, height: int) -> tuple[bytes, int]:
    """PDQ (32 bytes) and its quality (0 to 100) of what `box` shows, in a picture of a width x height source."""
    down, across = luma.shape[0] / height, luma.shape[1] / width
    top, left = int(np.ceil(box.y * down)), int(np.ceil(box.x * across))
    bottom, right = int((box.y + box.h) * down), int((box.x + box.w) * across)
    inside = luma[top : max(bottom, top + 1), left : max(right, left + 1)]
    return pdq_hash(inside)


def _bars(grey: UInt8[np.ndarray, "h w"]) -> tuple[float, float, float, float] | None:
    """Shares of the frame that are flat and black at top, bottom, left, right."""
    if min(cv2.mean(edge)[0] for edge in (grey[:1], grey[-1:], grey[:, :1], grey[:, -1:])) > BAR_MEAN + 1:
        return 0.0, 0.0, 0.0, 0.0  # in most pictures no bar begins at any edge
    return _bars_by_lines(grey)


def _bars_by_lines(grey: UInt8[np.ndarray, "h w"]) -> tuple[float, float, float, float] | None:
    rows = _dark(grey, axis=1)
    columns = _dark(grey, axis=0)
    if rows.all() or columns.all():
        return None
    high, wide = grey.shape
    top, bottom = int(np.argmin(rows)), int(np.argmin(rows[::-1]))
    left, right = int(np.argmin(columns)), int(np.argmin(columns[::-1]))
    # one line more where there is a bar: the line on its edge mixes bar and picture
    shares = [(n + 1) / side if n else 0.0 for n, side in ((top, high), (bottom, high), (left, wide), (right, wide))]
    return shares[0], shares[1], shares[2], shares[3]


def _dark(grey: UInt8[np.ndarray, "h w"], axis: int) -> np.ndarray:
    """Which lines along `axis` are dark and flat."""
    dark: np.ndarray = cv2.reduce(grey, axis, cv2.REDUCE_AVG, dtype=cv2.CV_32F).ravel() < BAR_MEAN
    lines = np.flatnonzero(dark)  # few, and none in most pictures: the deviation is the dear part
    if len(lines):
        dark[lines] = grey.take(lines, axis=1 - axis).std(axis=axis, dtype=np.float32) < BAR_STD
    return dark
