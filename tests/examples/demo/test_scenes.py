"""Scenes: what moves is what the label says, and nothing depends on how frames are asked for."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scenedetect import ContentDetector, FrameTimecode

from examples.demo.scenes import (
    DIRECTIONS,
    DRIFT_PX,
    MOTIONS,
    SIZE,
    TRAIN_DIGITS,
    Frames,
    Scene,
    Shot,
    digit_images,
    digits,
    dissolve,
    draw_scene,
    draw_shot,
    render,
)
from storage.errors import CorpusError

LENGTH = 22


def plain_shot(motion: str | None, rate: float, digit: int = 0) -> Shot:
    """A white digit in the middle of a black frame."""
    scene = Scene(np.zeros((SIZE + 32, SIZE + 32, 3), np.float32), 16, (0.0, 0.0))
    return Shot(scene, digit, motion, (1.0, 1.0, 1.0), (31.5, 31.5), 20.0, 0.0, rate, 1.0, 0.0, 0)


def centroid(frame: Frames) -> tuple[float, float]:
    weight = frame[..., 0].astype(float)
    y, x = np.mgrid[:SIZE, :SIZE]
    return float((weight * x).sum() / weight.sum()), float((weight * y).sum() / weight.sum())


def tilt_deg(frame: Frames) -> float:
    """Angle of the longer axis against the x axis, rows running down."""
    weight = frame[..., 0].astype(float)
    (cx, cy), (y, x) = centroid(frame), np.mgrid[:SIZE, :SIZE]
    xx, yy, xy = ((weight * a * b).sum() for a, b in ((x - cx, x - cx), (y - cy, y - cy), (x - cx, y - cy)))
    return 0.5 * math.degrees(math.atan2(2 * xy, xx - yy))


def test_digit_images_are_all_used_and_shared_by_no_two_splits() -> None:
    found = {split: np.concatenate([digit_images(split, d) for d in range(10)]) for split in ("train", "test")}
    assert sorted(np.concatenate(list(found.values())).tolist()) == list(range(1797))
    assert found["train"].max() < TRAIN_DIGITS <= found["test"].min()
    masks, shown = digits()
    assert masks.min() >= 0
    assert masks.max() == 1
    assert all((shown[digit_images("test", d)] == d).all() for d in range(10))


def test_unknown_split_is_refused() -> None:
    with pytest.raises(CorpusError, match="'val'"):
        digit_images("val", 3)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_digit_moves_where_the_label_says(direction: str) -> None:
    frames = render(plain_shot(direction, rate=1.5), 6, 9, LENGTH)
    (x0, y0), (x1, y1) = centroid(frames[0]), centroid(frames[-1])
    assert math.hypot(x1 - x0, y1 - y0) == pytest.approx(8 * 1.5, abs=0.3)  # bilinear warps shift a centroid by tenths
    right, down = (x1 - x0) > 2, (y1 - y0) > 2
    left, up = (x0 - x1) > 2, (y0 - y1) > 2
    words = [word for word, on in (("down", down), ("up", up), ("left", left), ("right", right)) if on]
    assert "_".join(words) == direction


@pytest.mark.parametrize(("motion", "sign"), [("turn_clockwise", 1), ("turn_anticlockwise", -1)])
def test_digit_turns_where_the_label_says(motion: str, sign: int) -> None:
    one = int(digit_images("train", 1)[0])
    frames = render(plain_shot(motion, rate=5.0, digit=one), 8, 5, LENGTH)
    turned = (tilt_deg(frames[-1]) - tilt_deg(frames[0]) + 90) % 180 - 90
    assert turned == pytest.approx(sign * 20, abs=2)


@pytest.mark.parametrize(("motion", "sign"), [("grow", 1), ("shrink", -1)])
def test_digit_scales_as_the_label_says(motion: str, sign: int) -> None:
    frames = render(plain_shot(motion, rate=0.05), 7, 9, LENGTH)
    areas = frames[..., 0].astype(float).sum(axis=(1, 2))
    assert math.log(areas[-1] / areas[0]) == pytest.approx(sign * 2 * 8 * 0.05, abs=0.06)


def test_background_drifts_with_the_scene_and_the_digit_does_not_follow() -> None:
    texture = np.zeros((SIZE + 40, SIZE + 40, 3), np.float32)
    texture[20 + 10 : 20 + 14, 20 + 50 : 20 + 54] = 0.5  # a grey square away from the digit
    drifting = replace(plain_shot("right", rate=0.0), scene=Scene(texture, 20, (-1.0, 0.5)))
    frames = render(drifting, 7, 9, LENGTH).astype(int)
    alone = render(plain_shot("right", rate=0.0), 7, 9, LENGTH).astype(int)
    squares = np.clip(frames - alone, 0, 255).astype(np.uint8)
    (x0, y0), (x1, y1) = centroid(squares[0]), centroid(squares[-1])
    assert x1 - x0 == pytest.approx(8.0, abs=0.3)  # the view slides left
    assert y1 - y0 == pytest.approx(-4.0, abs=0.3)
    assert (frames[:, 24:40, 24:40] == alone[:, 24:40, 24:40]).all()


def test_still_shot_repeats_one_frame() -> None:
    shot = draw_shot(np.random.default_rng(4), 7, None, 20, None, dissolve=False)
    frames = render(shot, 0, LENGTH, LENGTH)
    assert (frames == frames[0]).all()
    assert frames[0].std() > 5


@settings(max_examples=25, deadline=None)
@given(first=st.integers(-4, 26), count=st.integers(1, 6), motion=st.sampled_from(MOTIONS), seed=st.integers(0, 50))
def test_a_frame_does_not_depend_on_the_range_it_is_asked_in(first: int, count: int, motion: str, seed: int) -> None:
    shot = draw_shot(np.random.default_rng(seed), seed, motion, 20, None, dissolve=False)
    together = render(shot, first, count, LENGTH)
    assert (together == np.concatenate([render(shot, first + n, 1, LENGTH) for n in range(count)])).all()


def test_scenes_are_a_function_of_their_generator_and_differ_among_seeds() -> None:
    first, again, other = (draw_scene(np.random.default_rng(seed), 20) for seed in (1, 1, 2))
    assert (first.texture == again.texture).all()
    assert first.drift == again.drift
    assert np.abs(first.texture - other.texture).mean() > 0.02


def test_three_quarters_of_the_scenes_drift_and_none_faster_than_the_study() -> None:
    speeds = [math.hypot(*draw_scene(np.random.default_rng(n), 2).drift) for n in range(400)]
    assert 0.66 < np.mean([speed > 0 for speed in speeds]) < 0.84  # .75, 4 standard errors of 400
    assert max(speeds) <= DRIFT_PX


def test_digit_stands_out_from_its_scene() -> None:
    for seed in range(30):
        shot = draw_shot(np.random.default_rng(seed), 5, "right", 20, None, dissolve=False)
        shown = render(replace(shot, flicker=0.0), 11, 1, LENGTH)[0].astype(float)
        bare = render(replace(shot, flicker=0.0, size=0.01), 11, 1, LENGTH)[0].astype(float)
        changed = np.abs(shown - bare).max(axis=2)
        assert np.percentile(changed, 97) > 40, seed  # strokes cover 3 to 6 % of a frame


def test_neighbouring_scenes_are_a_cut_to_the_detector_and_no_frame_within_a_shot_is() -> None:
    rng = np.random.default_rng(8)
    shots = [draw_shot(rng, 3, MOTIONS[0], 20, None, dissolve=False)]
    for n in range(1, 12):
        shots.append(draw_shot(rng, 3 + n, MOTIONS[n], 20, shots[-1], dissolve=n == 5))
    frames = np.concatenate([render(shot, 0, LENGTH, LENGTH) for shot in shots])
    detector = ContentDetector(threshold=27.0, min_scene_len=2)
    found = [
        cut.frame_num
        for n, frame in enumerate(frames)
        for cut in detector.process_frame(FrameTimecode(n, 8.0), np.ascontiguousarray(frame[..., ::-1]))
    ]
    assert found == [LENGTH * n for n in range(1, 12)]


def test_dissolve_is_the_weighted_mean_of_both_ends() -> None:
    old, new = np.zeros((4, SIZE, SIZE, 3), np.uint8), np.full((4, SIZE, SIZE, 3), 250, np.uint8)
    assert dissolve(old, new)[:, 0, 0, 0].tolist() == [50, 100, 150, 200]
