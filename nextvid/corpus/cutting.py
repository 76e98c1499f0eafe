"""Cut clips from a shot: which shots are used, the times of a clip's frames, the crops of its views, and their ids.

Pure functions of scores, policies and ids. Everything random is drawn from a hash of ids: a start from (media, shot
start, n), a crop and a flip from (clip, view). So more clips or views leave the others as they are. Rules of padding
are those of docs/method.md 8.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from nextvid.config.datasets import ClipPolicy, FilterConfig
from nextvid.video.quality import Box
from storage.digest import digest

MICROSECONDS = 1_000_000
ROUNDING_US = 1_000  # Matroska rounds times to this; a clip may end this much after its shot and still be inside it
CROP_AREA = (0.3, 1.0)  # docs/method.md 8: share of the shot's picture
CROP_ASPECT = (0.75, 1.35)  # docs/method.md 8: width over height, log-uniform
CROP_TRIES = 10  # torchvision's RandomResizedCrop, which V-JEPA 2 uses
PLACES = (1, 0, 2)  # of the square: the middle first, so that one view is the middle; then the ends
REPEATED_SHARE = 0.5  # our choice: `fit` repeats the last frame for at most this share, else the shot is too short


@dataclass(frozen=True)
class ShotScores:
    """The columns of a row of Shots that decide about clips."""

    start_us: int
    end_us: int
    cut_in: str
    cut_out: str
    motion_mean: float
    freeze_share: float
    luma_mean: float
    blur: float

    @staticmethod
    def of(shot: Mapping[str, Any]) -> "ShotScores":
        """From a row of Shots with status ok."""
        return ShotScores(**{name: shot[name] for name in ShotScores.__dataclass_fields__})


@dataclass(frozen=True)
class View:
    """A crop of a clip, in pixels of the upright source, and whether it is mirrored left to right."""

    x: int
    y: int
    w: int
    h: int
    flip: bool


def shot_id(media: str, start_us: int, end_us: int) -> str:
    """Id of a shot, 32 hex digits."""
    return digest([media, start_us, end_us])


def clip_id(media: str, times_us: Sequence[int]) -> str:
    """Id of a clip, 32 hex digits, from the time of each of its frames."""
    return digest([media, list(times_us)])


def row_id(clip: str, view: View, reading: int = 1) -> str:
    """Id of a view, 32 hex digits; each view is one row of the latent store. `reading`: MediaFacts.reading."""
    return digest([clip, view.x, view.y, view.w, view.h, view.flip, *([reading] if reading > 1 else [])])


def filter_reason(shot: ShotScores, filters: FilterConfig) -> str | None:
    """Why the shot is not used: static, unsteady, frozen, dark, bright or blurred; None for one that is."""
    moving = shot.end_us > shot.start_us  # an image has no motion to judge
    tests = (
        ("static", moving and _below(shot.motion_mean, filters.motion_min)),
        ("unsteady", moving and _above(shot.motion_mean, filters.motion_max)),
        ("frozen", moving and _above(shot.freeze_share, filters.freeze_max)),
        ("dark", _below(shot.luma_mean, filters.luma_min)),
        ("bright", _above(shot.luma_mean, filters.luma_max)),
        ("blurred", _below(shot.blur, filters.blur_min)),
    )
    return next((reason for reason, failed in tests if failed), None)


def trimmed(shot: ShotScores, trim_s: float) -> tuple[int, int]:
    """(start_us, end_us) of a shot without `trim_s` at each cut; at the file's ends nothing is trimmed."""
    trim_us = round(trim_s * MICROSECONDS)
    start_us = shot.start_us + (0 if shot.cut_in == "edge" else trim_us)
    end_us = shot.end_us - (0 if shot.cut_out == "edge" else trim_us)
    return start_us, max(start_us, end_us)


def clip_times(start_us: int, policy: ClipPolicy, fps_hz: float) -> list[int]:
    """The times of a clip that starts at `start_us`: start + i/rate, rounded half to even in microseconds.

    `fps_hz` is the source's rate, which only `stride` needs.
    """
    if policy.fps is not None:  # as it is written: 29.97, not the nearest binary number
        step_us = Fraction(MICROSECONDS) / Fraction(str(policy.fps))
    else:
        step_us = Fraction(MICROSECONDS) * (policy.stride or 0) / Fraction(fps_hz)
    return [start_us + round(i * step_us) for i in range(policy.frames)]


def clips_of(media: str, shot: ShotScores, policy: ClipPolicy, trim_s: float, fps_hz: float) -> list[list[int]]:
    """Times of each clip that the policy cuts from a shot, in order of their number, without repeats.

    Empty where the shot is too short for the policy's `pad`. An image gives one clip of one time.
    """
    if shot.end_us == shot.start_us:
        return [[shot.start_us]]
    start_us, end_us = trimmed(shot, trim_s)
    frame_us = Fraction(MICROSECONDS) / Fraction(fps_hz)
    offsets = _offsets(policy, end_us - start_us, frame_us, fps_hz)
    if offsets is None:
        return []
    slack_us = max(0, math.floor(end_us - start_us - offsets[-1] - frame_us))
    used_us = end_us - start_us - slack_us
    clips: list[list[int]] = []
    for n in range(policy.clips_per_shot):
        if policy.starts == "random":
            shift_us = _uniform(slack_us + 1, ["start", media, shot.start_us, n])
        else:  # in the middle of the n-th of equal segments
            middle = (2 * n + 1) * (end_us - start_us) // (2 * policy.clips_per_shot)
            shift_us = min(max(middle - used_us // 2, 0), slack_us)
        times = [start_us + shift_us + offset for offset in offsets]
        if times not in clips:
            clips.append(times)
    return clips


def views(clip: str, box: Box, policy: ClipPolicy) -> list[View]:
    """The policy's views of a clip inside the shot's crop box, without repeats."""
    found: list[View] = []
    for index in range(policy.views):
        match policy.crop:
            case "whole":
                crop = box
            case "centre":
                side = min(box.w, box.h)
                half = PLACES[index]  # in halves of what is left beside the square
                crop = Box(box.x + (box.w - side) * half // 2, box.y + (box.h - side) * half // 2, side, side)
            case "random":
                crop = _random_crop(clip, index, box)
        flip = policy.flip and bool(_uniform(2, ["flip", clip, index]))
        view = View(crop.x, crop.y, crop.w, crop.h, flip)
        if view not in found:
            found.append(view)
    return found


def _below(value: float, limit: float | None) -> bool:
    return limit is not None and value < limit


def _above(value: float, limit: float | None) -> bool:
    return limit is not None and value > limit


def _offsets(policy: ClipPolicy, length_us: int, frame_us: Fraction, fps_hz: float) -> list[int] | None:
    """Times of a clip from its start, with its last frame inside `length_us`; None where `pad` does not allow it."""
    offsets = clip_times(0, policy, fps_hz)
    last_us = length_us - frame_us  # start of the shot's last frame
    if last_us < -ROUNDING_US:
        return None
    if offsets[-1] <= last_us + ROUNDING_US:
        return offsets
    match policy.pad:
        case "skip":
            return None
        case "repeat_last":
            return [min(offset, max(0, math.floor(last_us))) for offset in offsets]
        case "fit":
            frames = math.floor((last_us + ROUNDING_US) / frame_us) + 1
            if frames < policy.frames * REPEATED_SHARE:
                return None
            step_us = max(last_us / (policy.frames - 1), frame_us)  # spans the shot, where frames are that dense
            if policy.stride is not None:
                step_us = frame_us * max(1, math.floor((last_us + ROUNDING_US) / (policy.frames - 1) / frame_us))
            return [round(min(i * step_us, max(last_us, Fraction(0)))) for i in range(policy.frames)]


def _random_crop(clip: str, index: int, box: Box) -> Box:
    for attempt in range(CROP_TRIES):
        key = int(digest(["crop", clip, index, attempt]), 16)
        area, aspect, across, down = ((key >> (32 * part) & 0xFFFFFFFF) / 2**32 for part in range(4))
        pixels = box.w * box.h * (CROP_AREA[0] + area * (CROP_AREA[1] - CROP_AREA[0]))
        low, high = (math.log(edge) for edge in CROP_ASPECT)
        ratio = math.exp(low + aspect * (high - low))
        w, h = max(1, round(math.sqrt(pixels * ratio))), max(1, round(math.sqrt(pixels / ratio)))
        if w <= box.w and h <= box.h:
            return Box(box.x + int(across * (box.w - w + 1)), box.y + int(down * (box.h - h + 1)), w, h)
    # as torchvision does: the largest centred crop with an allowed aspect
    w = min(box.w, max(1, round(box.h * CROP_ASPECT[1])))
    h = min(box.h, max(1, round(box.w / CROP_ASPECT[0])))
    return Box(box.x + (box.w - w) // 2, box.y + (box.h - h) // 2, w, h)


def _uniform(n: int, key: list[object]) -> int:
    """An integer in [0, n), the same for the same key for ever."""
    return int(digest(key), 16) * n >> 128
