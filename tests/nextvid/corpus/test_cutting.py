"""Times, trims, padding, views and ids: exact, keyed by ids, inside the shot and its box, stable under growth."""

import itertools
import math
from dataclasses import dataclass, replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from nextvid.config.datasets import ClipPolicy, FilterConfig
from nextvid.corpus.cutting import (
    ShotScores,
    View,
    clip_id,
    clip_times,
    clips_of,
    filter_reason,
    row_id,
    shot_id,
    trimmed,
    views,
)
from nextvid.video.quality import Box

MEDIA = "00" * 16
CLIP = "11" * 16


@dataclass(frozen=True)
class Shot(ShotScores):
    start_us: int = 0
    end_us: int = 10_000_000
    cut_in: str = "edge"
    cut_out: str = "edge"
    motion_mean: float = 1.0
    freeze_share: float = 0.0
    luma_mean: float = 128.0
    blur: float = 100.0


POLICIES = st.builds(
    ClipPolicy,
    frames=st.integers(2, 64),
    fps=st.sampled_from([1.0, 3.75, 4.0, 29.97]),
    clips_per_shot=st.integers(1, 5),
    starts=st.sampled_from(["tile", "random"]),
    pad=st.sampled_from(["skip", "fit", "repeat_last"]),
) | st.builds(
    ClipPolicy,
    frames=st.integers(2, 64),
    stride=st.integers(1, 8),
    clips_per_shot=st.integers(1, 5),
    starts=st.sampled_from(["tile", "random"]),
    pad=st.sampled_from(["skip", "fit", "repeat_last"]),
)
RATES = st.sampled_from([10.0, 24.0, 25.0, 30000 / 1001, 30.0, 60.0])
EDGES = st.sampled_from(["edge", "hard", "dissolve", "fade"])
SHOTS = st.builds(
    lambda start, length, cut_in, cut_out: Shot(start, start + length, cut_in, cut_out),
    st.integers(0, 10**10),
    st.integers(1, 10**8),
    EDGES,
    EDGES,
)


@given(st.integers(0, 10**12), st.integers(1, 200), st.sampled_from(["4", "3.75", "29.97", "23.976", "0.1"]))
def test_times_are_start_plus_i_over_fps_rounded_half_to_even(start: int, frames: int, fps: str) -> None:
    times = clip_times(start, ClipPolicy(frames=frames, fps=float(fps)), 25.0)
    for i, time in enumerate(times):
        exact = Fraction(i * 1_000_000) / Fraction(fps)
        floor = math.floor(exact)
        half = exact - floor
        up = half > Fraction(1, 2) or (half == Fraction(1, 2) and floor % 2 == 1)
        assert time == start + floor + up


def test_stride_counts_source_frames() -> None:
    assert clip_times(7, ClipPolicy(frames=4, stride=2), 25.0) == [7, 80_007, 160_007, 240_007]
    assert clip_times(7, ClipPolicy(frames=1), 25.0) == [7]


@given(SHOTS, POLICIES, RATES, st.sampled_from([0.0, 0.25, 0.5]))
def test_clips_lie_inside_the_trimmed_shot(shot: Shot, policy: ClipPolicy, rate: float, trim_s: float) -> None:
    start_us, end_us = trimmed(shot, trim_s)
    frame_us = 1e6 / rate
    for times in clips_of(MEDIA, shot, policy, trim_s, rate):
        assert len(times) == policy.frames
        assert times == sorted(times)
        assert times[0] >= start_us
        assert times[-1] + frame_us <= end_us + 1000 + 1
        if policy.pad == "skip":
            assert times == clip_times(times[0], policy, rate)
        distinct = len(set(times))
        if policy.pad == "fit" and distinct < policy.frames:
            assert distinct >= policy.frames / 2
        if policy.pad == "fit":
            natural = clip_times(0, policy, rate)[1]
            assert all(b - a <= natural + 1 for a, b in itertools.pairwise(times))


@given(SHOTS, POLICIES, RATES)
def test_clips_are_distinct_and_at_most_as_many_as_asked(shot: Shot, policy: ClipPolicy, rate: float) -> None:
    clips = clips_of(MEDIA, shot, policy, 0.25, rate)
    assert len({tuple(times) for times in clips}) == len(clips) <= policy.clips_per_shot
    long_enough = replace(shot, end_us=shot.start_us + 10**9)
    assert clips_of(MEDIA, long_enough, policy, 0.25, rate)


@given(SHOTS, RATES, st.integers(1, 5))
def test_more_random_clips_leave_the_old_ones_as_they_are(shot: Shot, rate: float, more: int) -> None:
    few = ClipPolicy(frames=8, fps=4, clips_per_shot=3, starts="random")
    many = few.model_copy(update={"clips_per_shot": 3 + more})
    old = clips_of(MEDIA, shot, few, 0.25, rate)
    assert clips_of(MEDIA, shot, many, 0.25, rate)[: len(old)] == old


def test_random_starts_depend_on_media_and_shot_and_spread() -> None:
    policy = ClipPolicy(frames=8, fps=4, clips_per_shot=200, starts="random")
    starts = [times[0] for times in clips_of(MEDIA, Shot(), policy, 0.25, 25.0)]
    assert starts != [times[0] for times in clips_of("22" * 16, Shot(), policy, 0.25, 25.0)]
    slack = 10_000_000 - 1_750_000 - 40_000
    assert 0.4 < sum(starts) / len(starts) / slack < 0.6
    assert min(starts) < slack * 0.1
    assert max(starts) > slack * 0.9


def test_tiles_are_centred_in_equal_segments() -> None:
    policy = ClipPolicy(frames=8, fps=4, clips_per_shot=2)
    first, second = clips_of(MEDIA, Shot(), policy, 0.25, 25.0)
    used = 1_750_000 + 40_000
    assert (first[0], second[0]) == (2_500_000 - used // 2, 7_500_000 - used // 2)
    assert clips_of(MEDIA, Shot(end_us=used), policy, 0.25, 25.0) == [clip_times(0, policy, 25.0)]


def test_padding_of_a_shot_too_short() -> None:
    shot = Shot(end_us=1_000_000)  # 25 frames of 40 ms; 8 frames at 4 Hz take 1.79 s
    policy = ClipPolicy(frames=8, fps=4)
    assert clips_of(MEDIA, shot, policy.model_copy(update={"pad": "skip"}), 0.0, 25.0) == []
    (fitted,) = clips_of(MEDIA, shot, policy, 0.0, 25.0)
    assert fitted == [round(i * 960_000 / 7) for i in range(8)]
    (repeated,) = clips_of(MEDIA, shot, policy.model_copy(update={"pad": "repeat_last"}), 0.0, 25.0)
    assert repeated == [0, 250_000, 500_000, 750_000, 960_000, 960_000, 960_000, 960_000]
    (strided,) = clips_of(MEDIA, shot, ClipPolicy(frames=8, stride=6), 0.0, 25.0)
    assert strided == [60_000 + i * 120_000 for i in range(8)]  # 3 is the largest stride that fits; centred
    (short,) = clips_of(MEDIA, Shot(end_us=200_000), policy, 0.0, 25.0)
    assert short == [0, 40_000, 80_000, 120_000, 160_000, 160_000, 160_000, 160_000]
    assert clips_of(MEDIA, Shot(end_us=120_000), policy, 0.0, 25.0) == []  # 3 of 8: more than half repeated


def test_trims_are_at_cuts_and_not_at_file_ends() -> None:
    assert trimmed(Shot(), 0.25) == (0, 10_000_000)
    assert trimmed(Shot(cut_in="hard"), 0.25) == (250_000, 10_000_000)
    assert trimmed(Shot(cut_in="fade", cut_out="dissolve"), 0.25) == (250_000, 9_750_000)
    assert trimmed(Shot(end_us=100_000, cut_in="hard", cut_out="hard"), 0.25) == (250_000, 250_000)


def test_an_image_is_one_clip_of_one_time() -> None:
    assert clips_of(MEDIA, Shot(end_us=0), ClipPolicy(frames=16, fps=4, clips_per_shot=3), 0.25, 0.0) == [[0]]


BOXES = st.builds(Box, st.integers(0, 500), st.integers(0, 500), st.integers(1, 2000), st.integers(1, 2000))


@given(BOXES, st.sampled_from(["whole", "centre", "random"]), st.integers(1, 6), st.booleans(), st.integers(0, 99))
def test_views_lie_inside_the_box(box: Box, crop: str, count: int, flip: bool, seed: int) -> None:
    if crop == "centre":
        count = 1 if count % 2 else 3
    policy = ClipPolicy.model_validate({"frames": 2, "fps": 4, "views": count, "crop": crop, "flip": flip})
    made = views(f"{seed:032x}", box, policy)
    assert 1 <= len(made) <= count
    assert len(set(made)) == len(made)
    for view in made:
        assert view.w > 0
        assert view.h > 0
        assert box.x <= view.x <= view.x + view.w <= box.x + box.w
        assert box.y <= view.y <= view.y + view.h <= box.y + box.h
        assert flip or not view.flip
        if crop == "centre":
            assert view.w == view.h == min(box.w, box.h)
    if crop == "centre":
        assert abs(2 * made[0].x + made[0].w - 2 * box.x - box.w) <= 1


@pytest.mark.parametrize(
    ("box", "corners"),
    [
        (Box(10, 20, 640, 360), [(150, 20), (10, 20), (290, 20)]),
        (Box(10, 20, 360, 641), [(10, 160), (10, 20), (10, 301)]),
        (Box(10, 20, 360, 360), [(10, 20)]),
    ],
)
def test_three_crops_are_the_middle_and_the_ends_of_the_longer_side(box: Box, corners: list[tuple[int, int]]) -> None:
    made = views(CLIP, box, ClipPolicy(frames=16, stride=4, views=3, crop="centre"))
    assert [(view.x, view.y) for view in made] == corners
    assert {(view.w, view.h, view.flip) for view in made} == {(360, 360, False)}
    assert views(CLIP, box, ClipPolicy(frames=16, stride=4, crop="centre")) == made[:1]


def test_centre_crops_are_one_or_three() -> None:
    with pytest.raises(ValidationError, match="crop 'centre' has 1 or 3 views, not 2"):
        ClipPolicy(frames=16, fps=4, views=2, crop="centre")


@pytest.mark.parametrize(("seconds", "rate"), [(2.0, 12.0), (3.9, 12.0), (4.0, 30.0), (6.0, 12.0)])
def test_a_video_of_ssv2_length_gives_one_clip_that_spans_it(seconds: float, rate: float) -> None:
    shot = Shot(end_us=round(seconds * 1e6))
    (times,) = clips_of(MEDIA, shot, ClipPolicy(frames=16, fps=4, clips_per_shot=1, pad="fit"), 0.25, rate)
    assert len(times) == 16
    assert times[-1] <= shot.end_us - round(1e6 / rate) + 1000
    assert times[-1] - times[0] >= min(3.75e6, 0.8 * shot.end_us)


def test_an_hour_gives_as_many_clips_as_its_shots_and_segments() -> None:
    policy = ClipPolicy(frames=16, fps=4, clips_per_shot=4)
    shots = [Shot(start * 6_000_000, (start + 1) * 6_000_000, "hard", "hard") for start in range(600)]
    clips = [times for shot in shots for times in clips_of(MEDIA, shot, policy, 0.25, 25.0)]
    assert len(clips) == 600 * 4
    assert len({times[0] for times in clips}) == len(clips)
    assert len(clips_of(MEDIA, Shot(end_us=3600 * 10**6), policy, 0.25, 25.0)) == 4


def test_random_crops_have_the_papers_areas_and_aspects_and_half_are_flipped() -> None:
    policy = ClipPolicy(frames=2, fps=4, views=1, crop="random", flip=True)
    box = Box(10, 20, 1280, 960)
    made = [views(f"{seed:032x}", box, policy)[0] for seed in range(600)]
    areas = sorted(view.w * view.h / (box.w * box.h) for view in made)
    aspects = sorted(view.w / view.h for view in made)
    assert 0.299 < areas[0] < 0.33
    assert areas[-1] < 1.001
    assert 0.745 < aspects[0] < 0.77
    assert 1.3 < aspects[-1] < 1.36
    assert abs(math.log(aspects[300]) - (math.log(0.75) + math.log(1.35)) / 2) < 0.08
    assert 0.44 < sum(view.flip for view in made) / len(made) < 0.56


def test_more_views_leave_the_old_ones_as_they_are() -> None:
    few = ClipPolicy(frames=2, fps=4, views=3, flip=True)
    many = few.model_copy(update={"views": 9})
    assert views(CLIP, Box(0, 0, 320, 240), many)[:3] == views(CLIP, Box(0, 0, 320, 240), few)


def test_ids_stay_what_they_were() -> None:
    assert shot_id(MEDIA, 0, 5) == "5d7961b135c0c81dcecd337c68da1ab5"
    assert clip_id(MEDIA, [0, 5]) == "8d0739b624f69c9442201251c4d8186e"
    assert row_id(CLIP, View(1, 2, 3, 4, True)) == "128c8ea41e0c722b61938d87461dd618"
    assert row_id(CLIP, View(1, 2, 3, 4, True), reading=1) == "128c8ea41e0c722b61938d87461dd618"
    assert row_id(CLIP, View(1, 2, 3, 4, True), reading=2) == "c16aee213d074de234e911bce2fde9fb"


def test_ids_tell_everything_apart() -> None:
    assert len({shot_id(MEDIA, 0, 5), shot_id(MEDIA, 1, 5), shot_id(MEDIA, 0, 6), shot_id("22" * 16, 0, 5)}) == 4
    assert len({clip_id(MEDIA, [0, 5]), clip_id(MEDIA, [0, 6]), clip_id(MEDIA, [0]), clip_id("22" * 16, [0, 5])}) == 4
    sides = [(0, 0, 8, 8), (1, 0, 8, 8), (0, 1, 8, 8), (0, 0, 9, 8), (0, 0, 8, 9)]
    assert len({row_id(CLIP, View(*side, flip)) for side in sides for flip in (True, False)}) == 10


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"motion_mean": 0.05}, "static"),
        ({"motion_mean": 7.0}, "unsteady"),
        ({"freeze_share": 0.6}, "frozen"),
        ({"luma_mean": 10.0}, "dark"),
        ({"luma_mean": 240.0}, "bright"),
        ({"blur": 5.0}, "blurred"),
        ({"end_us": 0, "motion_mean": 0.0}, None),
        ({"end_us": 0, "motion_mean": 0.0, "luma_mean": 1.0}, "dark"),
    ],
)
def test_filters_name_the_first_reason(change: dict[str, float], reason: str | None) -> None:
    shot = replace(Shot(), **change)  # type: ignore[arg-type]  # numbers either way
    assert filter_reason(shot, FilterConfig()) == reason
    off = FilterConfig(motion_min=None, motion_max=None, freeze_max=None, luma_min=None, luma_max=None, blur_min=None)
    assert filter_reason(shot, off) is None
