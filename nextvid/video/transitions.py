"""Where one shot ends and the next begins: hard cuts, dissolves, fades and holes in time.

Holds a detector fed one thumbnail a frame, in order; keeps a few numbers a frame and the last half second of
thumbnails, so an hour of video costs megabytes. Hard cuts are PySceneDetect's ContentDetector; the dissolve test is
that of research: video, 8 (a blend is the mean of its ends, motion is not), fades are runs of dark frames and the
ramps beside them. Holds no decoding.
"""

from collections import deque
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from jaxtyping import UInt8
from scenedetect import ContentDetector, FrameTimecode

from nextvid.corpus.project import ShotConfig

Kind = Literal["hard", "dissolve", "fade"]

FADE_S = 2.0  # ours: a dark run up to here belongs to a fade; a longer one is a shot of its own, with its own luma
HOLE_S = 0.5  # ours: no frame for this long, at a rate that should have had several, is a hole and not motion
HOLE_FRAMES = 2.5  # ours: so that slow sequences (1 fps) have no holes
RAMP_STEP = 0.3  # ours: grey levels a frame by which a fade's ramp must keep changing, above the noise of coding
MARGIN = 0.5  # of the lag: the test holds from a quarter lag inside a linear blend on; the rest is for noise


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
        self.lag = max(1, round(config.dissolve_lag_s * fps_hz))
        self._cuts = ContentDetector(config.content_threshold, min_scene_len=float(config.min_shot_s))
        self._recent: deque[UInt8[np.ndarray, "h w"]] = deque(maxlen=2 * self.lag + 1)
        self._hard: list[int] = []
        self.times_us: list[int] = []
        self.luma: list[float] = []
        self._step: list[float] = []  # change from the frame before
        self._change: list[float] = []  # change over the lag, of the frame one lag ago
        self._residual: list[float] = []  # distance of that frame from the mean of its ends, as a share of the change

    def see(self, time_us: int, thumb: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w"]:
        """One frame as a BGR thumbnail; returns the grey thumbnail made of it."""
        grey: UInt8[np.ndarray, "h w"] = cv2.cvtColor(thumb, cv2.COLOR_BGR2GRAY)
        index = len(self.times_us)
        cuts = self._cuts.process_frame(FrameTimecode(index, fps=self.fps_hz), thumb)
        self._hard += [cut.frame_num for cut in cuts]
        self._step.append(_difference(grey, self._recent[-1]) if self._recent else 0.0)
        self._recent.append(grey)
        self.times_us.append(time_us)
        self.luma.append(float(cv2.mean(grey)[0]))
        if len(self._recent) == 2 * self.lag + 1:
            self._blend()
        return grey

    def found(self, end_us: int) -> list[Transition]:
        """Transitions in order, not overlapping; `end_us` is where the last frame ends."""
        if not self.times_us:
            return []
        times = [*self.times_us, end_us]
        spans: list[tuple[int, int, Kind]] = [(*span, "dissolve") for span in self._dissolves()]
        fades: list[tuple[int, int, Kind]] = [(*span, "fade") for span in self._fades()]
        merged = _merged(sorted([*spans, *fades]))
        change = np.maximum(self._padded(self._change), np.array(self._step))
        result = [
            Transition(times[first], times[last + 1], kind, float(change[first : last + 1].max()))
            for first, last, kind in merged
        ]
        for cut in self._hard:
            if not any(first <= cut <= last + 1 for first, last, _ in merged):
                result.append(Transition(times[cut], times[cut], "hard", self._step[cut]))
        return sorted([*result, *self._holes(result)], key=lambda t: (t.start_us, t.end_us))

    def _blend(self) -> None:
        before, middle, after = self._recent[0], self._recent[self.lag], self._recent[-1]
        change = _difference(before, after)
        self._change.append(change)
        if change <= self.config.dissolve_change:
            self._residual.append(1.0)  # not needed below the threshold
            return
        mean = cv2.addWeighted(before, 0.5, after, 0.5, 0)
        self._residual.append(_difference(middle, mean) / change)

    def _padded(self, values: list[float]) -> np.ndarray:
        """Values that belong to the frames from `lag` to n - lag, as an array over all frames."""
        whole = np.zeros(len(self.times_us))
        whole[self.lag : self.lag + len(values)] = values
        return whole

    def _dissolves(self) -> list[tuple[int, int]]:
        hit = np.zeros(len(self.times_us), bool)
        hit[self.lag : self.lag + len(self._change)] = (np.array(self._change) > self.config.dissolve_change) & (
            np.array(self._residual) < self.config.dissolve_residual
        )
        margin = round(MARGIN * self.lag)
        last = len(self.times_us) - 1
        return [(max(0, a - margin), min(last, b + margin)) for a, b in _runs(hit, join=self.lag)]

    def _fades(self) -> list[tuple[int, int]]:
        luma = np.array(self.luma)
        spans = []
        for first, last in _runs(luma < self.config.fade_luma, join=1):
            down, up = self._ramp(first, -1), self._ramp(last, 1)
            if last - first + 1 <= FADE_S * self.fps_hz:
                if first > down or last < up or last > first:
                    spans.append((down, up))
            else:  # a dark shot of its own, with a ramp on either side
                spans += [(down, first - 1)] if down < first else []
                spans += [(last + 1, up)] if up > last else []
        return spans

    def _ramp(self, index: int, way: int) -> int:
        """The outermost frame of a ramp of brightness that ends at `index`."""
        limit = index + way * round(FADE_S * self.fps_hz)
        while 0 <= index + way < len(self.luma) and index != limit:
            if self.luma[index + way] < self.luma[index] + RAMP_STEP:
                break
            if abs(self.luma[index + way] - self.luma[index]) > self.config.dissolve_change * 2:
                break  # a jump: a cut to or from black
            index += way
        return index

    def _holes(self, others: list[Transition]) -> list[Transition]:
        gaps = np.diff(np.array(self.times_us))
        frame_us = 1e6 / self.fps_hz
        holes = []
        for index in np.flatnonzero(gaps > max(HOLE_S * 1e6, HOLE_FRAMES * frame_us)):
            start_us, end_us = self.times_us[index] + round(frame_us), self.times_us[index + 1]
            if not any(t.start_us <= end_us and start_us <= t.end_us for t in others):
                holes.append(Transition(start_us, end_us, "hard", self._step[index + 1]))
        return holes


def _difference(a: UInt8[np.ndarray, "h w"], b: UInt8[np.ndarray, "h w"]) -> float:
    """Mean absolute difference in grey levels."""
    return float(cv2.norm(a, b, cv2.NORM_L1)) / a.size


def _runs(hit: np.ndarray, join: int) -> list[tuple[int, int]]:
    """First and last index of each run of True; runs at most `join` apart are one."""
    runs: list[tuple[int, int]] = []
    for index in np.flatnonzero(hit).tolist():
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
