"""Where one shot ends and the next begins: hard cuts, dissolves, fades and holes in time.

The detector takes one thumbnail a frame, in order, and keeps a few numbers a frame and the last second of thumbnails,
so an hour of video costs megabytes. A hard cut is a step far above the steps beside it that does not come back (a flash
does); a dissolve is the mean of its ends, which are brought nearer to each other than either is flat
(docs/decisions/0018 has the formula and what else was tried); a fade is a run of blank frames and the ramps beside it.
Thresholds were tuned on one half of the real media and measured on the other (tests/nextvid/video/test_splices.py).
"""

from collections import deque
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from jaxtyping import UInt8

from nextvid.config.datasets import ShotConfig
from nextvid.video.probe import HOLE_FRAMES, HOLE_S

Kind = Literal["hard", "dissolve", "fade"]
Luma = UInt8[np.ndarray, "h w"]

BESIDE = 3  # frames on either side of a cut that it is compared with
NOISE = 4.0  # our choice: grey levels of a step that coding alone makes
COMES_BACK = 0.5  # our choice: a cut's sides stay at least this share of its step apart, a flash's do not
ONE_STEP = 0.55  # our choice: a change of which one step makes more than this share is a cut, not a blend
DIP_MAX = 3.0  # our choice: by the formula a blend's dip is 1; beyond 3 it is a flash to black
BLEND_S, BLEND_FRAMES = (
    0.12,
    3,
)  # our choice: fewer hits in a row are chance; at 8 frames a second a blend has one or two
BLEND_SHARE = 0.25  # of the hits, on either side: ours; the test holds in the middle two thirds of a blend
FADE_S = (
    2.0  # our choice: a blank run up to here belongs to a fade; a longer one is a shot of its own, with its own luma
)
FLAT = 4.0  # our choice: grey levels of standard deviation below which a frame is of one colour, black or not
RAMP_STEP = (
    0.15  # our choice: standard deviation a frame by which a fade's ramp must keep changing, above the noise of coding
)


@dataclass(frozen=True)
class Transition:
    """Frames from start_us to before end_us belong to no shot; a hard cut has none. `score`: change in grey levels."""

    start_us: int
    end_us: int
    kind: Kind
    score: float


class Transitions:
    """Feed every frame with `see`, then ask `found`."""

    def __init__(self, config: ShotConfig, fps_hz: float) -> None:
        self.config = config
        self.fps_hz = fps_hz
        self.lag = max(2, round(config.dissolve_lag_s * fps_hz))
        self._recent: deque[UInt8[np.ndarray, "h3 w"]] = deque(maxlen=max(2 * self.lag + 1, 2 * BESIDE))
        self._cuts: list[int] = []
        self.times_us: list[int] = []
        self.luma: list[float] = []
        self.std: list[float] = []  # of luma within the frame
        self._step: list[float] = []  # luma's change from the frame before
        self._colour_step: list[float] = []  # the sum of it and of the changes of Cb and Cr
        self._change: list[float] = []  # luma's change over the lag, of the frame one lag ago
        self._blend: list[bool] = []  # whether that frame is a blend of its ends

    def see(self, time_us: int, thumb: UInt8[np.ndarray, "h3 w"]) -> None:
        """One frame: its Y, Cb and Cr thumbnails, one below the other (planes.Planes.thumbnail)."""
        mean, std = cv2.meanStdDev(_luma(thumb))
        self.luma.append(float(mean[0, 0]))
        self.std.append(float(std[0, 0]))
        before = self._recent[-1] if self._recent else thumb
        self._step.append(_difference(_luma(before), _luma(thumb)))
        self._colour_step.append(_colour_difference(before, thumb))
        self.times_us.append(time_us)
        self._recent.append(thumb)
        if len(self.times_us) > BESIDE:
            self._judge_cut(len(self.times_us) - 1 - BESIDE)
        if len(self._recent) > 2 * self.lag:
            self._judge_blend()

    def found(self, end_us: int) -> list[Transition]:
        """Transitions in order, not overlapping; `end_us` is where the last frame ends. To be asked once."""
        if not self.times_us:
            return []
        count = len(self.times_us)
        for index in range(max(1, count - BESIDE), count):
            self._judge_cut(index)
        times = [*self.times_us, end_us]
        spans: list[tuple[int, int, Kind]] = [(*span, "dissolve") for span in self._dissolves()]
        fades: list[tuple[int, int, Kind]] = [(*span, "fade") for span in self._fades()]
        merged = _merged(sorted([*spans, *fades]))
        change = np.array(self._step)
        middle = change[self.lag : self.lag + len(self._change)]
        np.maximum(middle, self._change, out=middle)
        result = [
            Transition(times[first], times[last + 1], kind, float(change[first : last + 1].max()))
            for first, last, kind in merged
        ]
        alone = [cut for cut in self._cuts if not any(first <= cut <= last + 1 for first, last, _ in merged)]
        for first, last in _runs(alone, join=round(self.config.min_shot_s * self.fps_hz)):
            result.append(Transition(times[first], times[last], "hard", max(self._step[first : last + 1])))
        gaps, frame_us, holes = np.diff(np.array(self.times_us)), 1e6 / self.fps_hz, list[Transition]()
        for after in np.flatnonzero(gaps > max(float(HOLE_S) * 1e6, HOLE_FRAMES * frame_us)):
            start_us, until_us = self.times_us[after] + round(frame_us), self.times_us[after + 1]
            if not any(t.start_us <= until_us and start_us <= t.end_us for t in result):
                holes.append(Transition(start_us, until_us, "hard", self._step[after + 1]))
        return sorted([*result, *holes], key=lambda t: (t.start_us, t.end_us))

    def _judge_cut(self, index: int) -> None:
        """Whether frame `index` begins a shot, by the BESIDE frames before and behind it."""
        step, steps = self._colour_step[index], self._colour_step
        if index == 0 or step <= self.config.cut_change:
            return
        beside = sorted([*steps[max(1, index - BESIDE) : index], *steps[index + 1 : index + 1 + BESIDE]])[-2:]
        if step <= self.config.cut_ratio * sum(beside) / max(1, len(beside)) + NOISE:
            return
        first, last = len(self.times_us) - len(self._recent), len(self.times_us) - 1
        here, before = self._recent[index - first], self._recent[index - 1 - first]
        earlier, later = (self._recent[max(0, index - 2) - first], self._recent[min(last, index + BESIDE) - first])
        if min(_colour_difference(before, later), _colour_difference(earlier, here)) >= COMES_BACK * step:
            self._cuts.append(index)

    def _judge_blend(self) -> None:
        """Whether the frame one lag ago is the mean of those a lag before and behind it."""
        before, middle, after = (_luma(self._recent[at]) for at in (-2 * self.lag - 1, -self.lag - 1, -1))
        change = _difference(before, after)
        self._change.append(change)
        self._blend.append(
            change > self.config.dissolve_change
            and max(self._step[-2 * self.lag :]) < ONE_STEP * change
            and self._is_mean(before, middle, after, change)
        )

    def _is_mean(self, before: Luma, middle: Luma, after: Luma, change: float) -> bool:
        """By the formula; the deviation of `before - after` without the 16-bit picture of it, which is dear."""
        residual = _difference(middle, cv2.addWeighted(before, 0.5, after, 0.5, 0)) / change
        if residual >= self.config.dissolve_residual:
            return False
        mean = self.luma[-2 * self.lag - 1] - self.luma[-1]
        variance = max(cv2.norm(before, after, cv2.NORM_L2SQR) / before.size - mean * mean, 0.0)
        ends = (self.std[-2 * self.lag - 1] ** 2 + self.std[-1] ** 2) / 2
        dip = (ends - self.std[-self.lag - 1] ** 2) / (variance / 4 + 1e-3)
        return bool(residual + self.config.dissolve_dip < dip < DIP_MAX)

    def _dissolves(self) -> list[tuple[int, int]]:
        hits = [index + self.lag for index, hit in enumerate(self._blend) if hit]
        last = len(self.times_us) - 1
        enough = min(BLEND_FRAMES, max(1, round(BLEND_S * self.fps_hz)))
        spans = []
        for a, b in _runs(hits, join=self.lag // 2):
            if b - a + 1 >= enough:
                margin = max(1, self.lag // 4, round(BLEND_SHARE * (b - a + 1)))
                spans.append((max(0, a - margin), min(last, b + margin)))
        return spans

    def _fades(self) -> list[tuple[int, int]]:
        blank = (np.array(self.luma) < self.config.fade_luma) | (np.array(self.std) < FLAT)
        spans = []
        for first, last in _runs(np.flatnonzero(blank).tolist(), join=1):
            down, up = self._ramp(first, -1), self._ramp(last, 1)
            if last - first + 1 <= FADE_S * self.fps_hz:
                if first > down or last < up or last > first:
                    spans.append((down, up))
            else:  # a blank shot of its own, with a ramp on either side
                spans += [(down, first - 1)] if down < first else []
                spans += [(last + 1, up)] if up > last else []
        return spans

    def _ramp(self, index: int, way: int) -> int:
        """The outermost frame of a ramp of contrast that ends at `index`."""
        limit = index + way * round(FADE_S * self.fps_hz)
        while 0 <= index + way < len(self.std) and index != limit:
            if self.std[index + way] < self.std[index] + RAMP_STEP:
                break
            if self._step[max(index, index + way)] > self.config.dissolve_change * 2:
                break  # a jump: a cut to or from the blank frame
            index += way
        return index


def _luma(thumb: UInt8[np.ndarray, "h3 w"]) -> UInt8[np.ndarray, "h w"]:
    return thumb[: thumb.shape[0] // 3]


def _difference(a: UInt8[np.ndarray, "h w"], b: UInt8[np.ndarray, "h w"]) -> float:
    """Mean absolute difference in grey levels."""
    return float(cv2.norm(a, b, cv2.NORM_L1)) / a.size


def _colour_difference(a: UInt8[np.ndarray, "h3 w"], b: UInt8[np.ndarray, "h3 w"]) -> float:
    """The mean absolute differences of Y, Cb and Cr added up, in grey levels."""
    return 3 * _difference(a, b)


def _runs(indices: list[int], join: int) -> list[tuple[int, int]]:
    """First and last of each run of ascending indices; those at most `join` apart are one run."""
    runs: list[tuple[int, int]] = []
    for index in indices:
        if runs and index - runs[-1][1] <= join:
            runs[-1] = (runs[-1][0], index)
        else:
            runs.append((index, index))
    return runs


def _merged(spans: list[tuple[int, int, Kind]]) -> list[tuple[int, int, Kind]]:
    """Overlapping or touching spans as one; with a fade in it, it is a fade."""
    merged: list[tuple[int, int, Kind]] = []
    for first, last, kind in spans:
        if merged and first <= merged[-1][1] + 1:
            previous = merged[-1]
            both: Kind = "fade" if "fade" in (kind, previous[2]) else "dissolve"
            merged[-1] = (previous[0], max(last, previous[1]), both)
        else:
            merged.append((first, last, kind))
    return merged
