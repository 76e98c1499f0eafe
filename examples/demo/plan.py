"""Plan the demo corpus from a seed: its files, and their shots, transitions, labels and splits.

Labels are balanced: 120 consecutive shots of a split show each of the 12 motions with each of the 10 digits once.
Shares are our choice, so that the corpus exercises every path of curation: cuts, dissolves, stills, copies,
re-encodings, test files leaked into train, broken files.
"""

from dataclasses import dataclass

import numpy as np

from examples.demo.scenes import MOTIONS, SIZE, SOURCE_FPS, Frames, Rng, Shot, digit_images, dissolve, draw_shot, render

VERSION = 2  # of the generator: any change of a pixel or a label raises it
SHOTS = 5  # labelled shots a video: 800 training videos hold the study's 4000 training clips (docs/demo.md)
SHOT_FRAMES = 22  # 2.75 s: one clip of 8 frames at 4 a second, 0.25 s trimmed at both cuts, 0.125 s of room at each
DISSOLVE_FRAMES = 4  # 0.5 s
DISSOLVE_ROOM = 4  # frames more beside dissolves, whose ends are found less exactly than cuts
MARGIN = SHOT_FRAMES // 2 + DISSOLVE_ROOM + DISSOLVE_FRAMES + 2  # pixels of texture around: drift is below 1 px a frame
TEST_EVERY = 5  # every fifth video is a test video (80 to 20, as the hash split)
DISSOLVE_EVERY = 6  # about every sixth transition is a dissolve
STILL_EVERY = 20  # every twentieth video holds one shot without any motion
COPY_EVERY, RECODE_EVERY, LEAK_EVERY, BROKEN_EVERY = 80, 80, 500, 160  # one each for so many videos, at least one
_VIDEOS, _IMAGES = 0, 1  # first word of the seed of a video's and of an image's generator


@dataclass(frozen=True)
class Part:
    """One shot of a video plan: what moves and how long; `motion=None` is a still, which has no labels."""

    digit: int  # index of the digit's image
    shape: int
    motion: str | None
    frames: int  # of its clear part
    dissolve_in: bool  # comes in by a dissolve from the shot before, else by a cut


@dataclass(frozen=True)
class VideoPlan:
    """One original video; copies and broken files are made from originals."""

    name: str  # without ending
    ending: str
    split: str
    parts: tuple[Part, ...]
    seed: tuple[int, int, int]  # of every draw that makes its pixels


@dataclass(frozen=True)
class ImagePlan:
    """One image: a frame of a shot of a training digit, at one of three sizes."""

    name: str
    ending: str
    shape: int
    digit: int
    side: int  # pixels
    seed: tuple[int, int, int]


@dataclass(frozen=True)
class Span:
    """The clear part of a shot: its time in the file, in seconds, and what it shows."""

    start_s: float
    end_s: float
    part: Part


def plan_videos(seed: int, count: int) -> list[VideoPlan]:
    """Plan `count` videos; every fifth is a test video, with digits of images that no training video shows."""
    shots = {split: _labels(seed, split, count * SHOTS) for split in ("train", "test")}
    plans = []
    for n in range(count):
        rng = np.random.default_rng((seed, _VIDEOS, n))
        split = "test" if n % TEST_EVERY == TEST_EVERY - 1 else "train"
        mine = [shots[split].pop() for _ in range(SHOTS)]
        labels: list[tuple[int, str | None]] = [*mine]
        if n % STILL_EVERY == 3:  # an early, training one, so that small corpora have a still too
            labels.insert(int(rng.integers(SHOTS + 1)), (int(rng.integers(10)), None))
        turns = [i > 0 and bool(rng.uniform() < 1 / DISSOLVE_EVERY) for i in range(len(labels))]
        turns[2] |= n == 0  # so that small corpora have a dissolve too
        parts = tuple(
            Part(
                digit=int(rng.choice(digit_images(split, shape))),
                shape=shape,
                motion=motion,
                frames=SHOT_FRAMES + (DISSOLVE_ROOM if turns[i] or (i + 1 < len(turns) and turns[i + 1]) else 0),
                dissolve_in=turns[i],
            )
            for i, (shape, motion) in enumerate(labels)
        )
        plans.append(VideoPlan(f"scene_{n:05d}", _ending(n), split, parts, (seed, _VIDEOS, n)))
    return plans


def plan_images(seed: int, count: int) -> list[ImagePlan]:
    """Plan `count` images of training digits, three JPEG to one PNG."""
    plans = []
    for n in range(count):
        rng = np.random.default_rng((seed, _IMAGES, n))
        shape = n % 10
        side = int(rng.choice([SIZE, SIZE, SIZE * 3 // 2, SIZE * 2]))
        digit = int(rng.choice(digit_images("train", shape)))
        ending = "png" if n % 4 == 3 else "jpg"
        plans.append(ImagePlan(f"still_{n:05d}", ending, shape, digit, side, (seed, _IMAGES, n)))
    return plans


def render_video(plan: VideoPlan) -> Frames:
    """All frames [n, h, w, c] of a video, cuts and dissolves included; a function of the plan alone."""
    rng = np.random.default_rng((*plan.seed, 1))
    pieces: list[Frames] = []
    before: Shot | None = None
    old: Part | None = None
    for part in plan.parts:
        shot = draw_shot(rng, part.digit, part.motion, MARGIN, before, part.dissolve_in)
        if part.dissolve_in:
            assert before is not None
            assert old is not None
            ending = render(before, old.frames, DISSOLVE_FRAMES, old.frames)
            pieces.append(dissolve(ending, render(shot, -DISSOLVE_FRAMES, DISSOLVE_FRAMES, part.frames)))
        pieces.append(render(shot, 0, part.frames, part.frames))
        before, old = shot, part
    return np.concatenate(pieces)


def render_image(plan: ImagePlan) -> Frames:
    """The one frame [h, w, c] of an image plan at SIZE; write_image scales it."""
    rng = np.random.default_rng((*plan.seed, 1))
    motion = MOTIONS[int(rng.integers(len(MOTIONS)))]
    shot = draw_shot(rng, plan.digit, motion, MARGIN, None, dissolve=False)
    return np.asarray(render(shot, int(rng.integers(SHOT_FRAMES)), 1, SHOT_FRAMES)[0])


def spans(plan: VideoPlan) -> list[Span]:
    """The clear parts of all shots in order. A gap between two of them is a dissolve, no gap is a cut."""
    found, frame = [], 0
    for part in plan.parts:
        frame += DISSOLVE_FRAMES if part.dissolve_in else 0
        found.append(Span(frame / SOURCE_FPS, (frame + part.frames) / SOURCE_FPS, part))
        frame += part.frames
    return found


def _labels(seed: int, split: str, count: int) -> list[tuple[int, str]]:
    """At least `count` pairs of digit and motion: blocks of all 120 pairs, each block shuffled."""
    pairs = [(shape, motion) for shape in range(10) for motion in MOTIONS]
    rng = np.random.default_rng((seed, 2, len(split)))
    return [pairs[i] for _ in range(count // len(pairs) + 1) for i in rng.permutation(len(pairs))]


def _ending(n: int) -> str:
    """Container of video n: of twenty, fourteen MP4, two WebM, two Matroska, one QuickTime and one AVI."""
    match n % 20:
        case 1 | 11:
            return "webm"
        case 6 | 16:
            return "mkv"
        case 8:
            return "mov"
        case 12:
            return "avi"
        case _:
            return "mp4"


def one_in(count: int, every: int) -> int:
    """How many of a kind a corpus of `count` videos has: one for each `every`, at least one."""
    return max(1, count // every)


def generator(seed: int, *words: int) -> Rng:
    """Random generator for choices about the whole corpus."""
    return np.random.default_rng((seed, 3, *words))
