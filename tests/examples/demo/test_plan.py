"""The plan: balance, splits, times, and that small corpora still hold every kind of trouble."""

import itertools
from collections import Counter

import numpy as np
import pytest

from examples.demo import plan
from examples.demo.scenes import MOTIONS, SOURCE_FPS, TRAIN_DIGITS, draw_shot

VIDEOS = plan.plan_videos(0, 1000)


def labels(split: str) -> list[tuple[int, str]]:
    parts = [part for video in VIDEOS if video.split == split for part in video.parts]
    return [(part.shape, part.motion) for part in parts if part.motion is not None]


def test_sizes_are_those_of_the_study() -> None:
    assert (len(labels("train")), len(labels("test"))) == (4000, 1000)
    assert [video.split for video in VIDEOS].count("test") == 200


@pytest.mark.parametrize("split", ["train", "test"])
def test_pairs_of_digit_and_motion_are_balanced(split: str) -> None:
    counts = Counter(labels(split))
    assert len(counts) == 10 * len(MOTIONS)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_no_digit_image_is_in_both_splits() -> None:
    used = {
        split: {part.digit for video in VIDEOS if video.split == split for part in video.parts}
        for split in ("train", "test")
    }
    assert max(used["train"]) < TRAIN_DIGITS <= min(used["test"])
    assert len(used["train"]) > 1100
    assert len(used["test"]) > 400


def test_labels_do_not_tell_the_background() -> None:
    drifts = {motion: [0, 0] for motion in MOTIONS}
    for video in VIDEOS[:40]:
        rng = np.random.default_rng((*video.seed, 1))
        before = None
        for part in video.parts:
            before = draw_shot(rng, part.digit, part.motion, plan.MARGIN, before, part.dissolve_in)
            if part.motion is not None:
                drifts[part.motion][before.scene.drift != (0.0, 0.0)] += 1
    shares = [moving / (still + moving) for still, moving in drifts.values()]
    assert min(shares) > 0.3  # .75 of about 16 each: 4 standard errors


def test_plans_repeat_and_a_longer_corpus_only_adds_labels_of_its_own() -> None:
    assert plan.plan_videos(0, 1000) == VIDEOS
    assert plan.plan_videos(3, 20) != plan.plan_videos(4, 20)
    assert plan.plan_images(0, 40) == plan.plan_images(0, 40)


@pytest.mark.parametrize("count", [8, 12, 1000])
def test_every_size_has_cuts_dissolves_stills_and_both_splits(count: int) -> None:
    videos = plan.plan_videos(0, count)
    parts = [part for video in videos for part in video.parts]
    assert any(part.motion is None for part in parts)
    assert any(part.dissolve_in for part in parts)
    assert {video.split for video in videos} == {"train", "test"}
    assert len({video.ending for video in videos}) >= 3
    assert not any(video.parts[0].dissolve_in for video in videos)


def test_a_twentieth_of_videos_has_a_still_in_train_alone() -> None:
    still = [video for video in VIDEOS if any(part.motion is None for part in video.parts)]
    assert len(still) == 50
    assert {video.split for video in still} == {"train"}


def test_clear_spans_and_dissolves_tile_the_rendered_video() -> None:
    for video in VIDEOS[:4]:
        found = plan.spans(video)
        assert found[0].start_s == 0
        for left, right in itertools.pairwise(found):
            gap = plan.DISSOLVE_FRAMES / SOURCE_FPS if right.part.dissolve_in else 0
            assert right.start_s - left.end_s == gap
        assert found[-1].end_s * SOURCE_FPS == len(plan.render_video(video))


def test_each_shot_holds_exactly_one_clip_between_its_trims() -> None:
    clip_s, trim_s, clip_fps = 8 / 4, 0.25, 4  # corpus.yaml
    assert SOURCE_FPS % clip_fps == 0
    for video in VIDEOS[:200]:
        for n, span in enumerate(plan.spans(video)):
            ends = (n > 0) + (n < len(video.parts) - 1)  # trimmed at cuts and dissolves, not at file ends
            length = span.end_s - span.start_s - ends * trim_s
            assert clip_s <= length < 2 * clip_s - 1 / clip_fps


def test_rendering_a_dissolve_starts_from_the_old_shot_and_ends_near_the_new() -> None:
    video = next(video for video in VIDEOS if any(part.dissolve_in for part in video.parts[1:]))
    number = next(n for n, part in enumerate(video.parts) if part.dissolve_in)
    frames, span = plan.render_video(video).astype(float), plan.spans(video)[number]
    new = round(span.start_s * SOURCE_FPS)
    ends = frames[new - plan.DISSOLVE_FRAMES - 1], frames[new]
    distance = [np.abs(frames[new - plan.DISSOLVE_FRAMES + n] - ends[0]).mean() for n in range(plan.DISSOLVE_FRAMES)]
    assert distance == sorted(distance)
    assert distance[-1] < np.abs(ends[1] - ends[0]).mean()


def test_images_show_training_digits_in_several_sizes_and_formats() -> None:
    images = plan.plan_images(0, 250)
    assert {image.ending for image in images} == {"jpg", "png"}
    assert {image.side for image in images} == {64, 96, 128}
    assert max(image.digit for image in images) < TRAIN_DIGITS
    assert Counter(image.shape for image in images) == dict.fromkeys(range(10), 25)
    assert (plan.render_image(images[0]) == plan.render_image(images[0])).all()
