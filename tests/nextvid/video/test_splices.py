"""Recall and precision of cuts, dissolves and fades on films spliced from sources that tuned nothing.

The thresholds of nextvid/video/transitions.py were tuned on the sources that are not named here.
"""

import itertools
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest

from nextvid.config.datasets import ShotConfig
from nextvid.video.decode import stream
from nextvid.video.probe import probe
from nextvid.video.shots import first_pass
from tests.nextvid.video.film import X264_VERYFAST, write_film
from tests.nextvid.video.splices import FPS, Found, Join, compared, found, scene

LEAST = {"hard": 0.95, "dissolve": 0.8, "fade": 0.9}  # our requirement: shares found
PRECISION = 0.9
# Real sources held apart: (file, first frame, frames), each within one shot of its film.
HELD_APART = (
    ("androidx_bbb_642x642_768kbps_30fps_vp9.webm", 7, 80),
    ("androidx_edit_list_positive_shift.mp4", 0, 200),
    ("dj_video1.mp4", 20, 120),
    ("intel_bottle-detection.mp4", 0, 300),
    ("mdn_friday.mp4", 0, 180),
    ("mma2_demo.mp4", 0, 190),
    ("moviepy_big_buck_bunny_0_30.webm", 110, 170),
    ("sam2_01_dog.mp4", 0, 280),
    ("sam2_05_default_juggle.mp4", 0, 240),
    ("vda_Tokyo-Walk_rgb.mp4", 0, 190),
)
KINDS = ("hard", "dissolve", "fade")
Images = list[np.ndarray]


def joined(rng: np.random.Generator, sources: list[Images], count: int, speed: int) -> tuple[Images, list[Join]]:
    """`count` joins of random pieces of random sources; blends of 8 to 25 frames, every `speed`-th frame."""
    images: Images = []
    joins: list[Join] = []
    before = -1
    for number in range(count + 1):
        which = int(rng.choice([n for n in range(len(sources)) if n != before]))
        piece, before = _piece(rng, sources[which], speed), which
        if number == 0:
            images = piece
            continue
        kind, length = KINDS[number % 3], int(rng.integers(8, 26))
        first = len(images) - (length if kind != "hard" else 0)
        match kind:
            case "dissolve":
                for n in range(length):
                    share = (n + 1) / (length + 1)
                    images[first + n] = cv2.addWeighted(images[first + n], 1 - share, piece[n], share, 0)
                joins.append((kind, first, len(images) - 1))
                images += piece[length:]
            case "fade":
                for n in range(length):
                    images[first + n] = (images[first + n] * (1 - (n + 1) / length)).astype(np.uint8)
                images += [np.zeros_like(images[0])] * int(rng.integers(1, 10))
                images += [(image * (n / length)).astype(np.uint8) for n, image in enumerate(piece[:length])]
                joins.append((kind, first, len(images) - 1))
                images += piece[length:]
            case _:
                joins.append((kind, first, first))
                images += piece
    return images, joins


def _piece(rng: np.random.Generator, source: Images, speed: int) -> Images:
    """A run of 60 to 85 frames of a source, played back and forth where it is too short."""
    wanted = int(rng.integers(60, 86))
    there = [*source, *source[::-1]] * (1 + speed * wanted // len(source))
    start = int(rng.integers(0, max(1, len(source) - speed * wanted)))
    return list(there[start : start + speed * wanted : speed])


def measured(path: Path, images: Images, joins: list[Join]) -> Found:
    write_film(path, images, fps=FPS, options=X264_VERYFAST, crf="23")  # as web video is coded
    facts = probe(path)
    return compared(joins, found(first_pass(path, facts, ShotConfig()), facts.start_us))


def require(result: Found) -> None:
    said = f"{result.hits} of {result.joins}, false: {result.false}"
    for kind, least in LEAST.items():
        assert result.recall(kind) >= least, said
    assert result.precision >= PRECISION, said


def test_joins_of_made_scenes_are_found(tmp_path: Path) -> None:
    images, joins = joined(np.random.default_rng(1), [scene(seed, 90, 160, 90) for seed in range(100, 110)], 30, 1)
    require(measured(tmp_path / "a.mp4", images, joins))


@pytest.fixture(scope="module")
def real_sources(real_media: Path) -> list[Images]:
    sources = []
    for name, first, count in HELD_APART:
        frames = itertools.islice(stream(real_media / "assorted" / name), first, first + count)
        sources.append([f.reformat(160, 90, "rgb24", interpolation="AREA").to_ndarray() for _, f in frames])
    return sources


@pytest.mark.realdata
@pytest.mark.parametrize(("speed", "count"), [(1, 90), (2, 45)])
def test_joins_of_real_sources_are_found(tmp_path: Path, real_sources: list[Images], speed: int, count: int) -> None:
    images, joins = joined(np.random.default_rng(speed), real_sources, count, speed)
    assert Counter(kind for kind, _, _ in joins) == dict.fromkeys(KINDS, count // 3)
    result = measured(tmp_path / "a.mp4", images, joins)
    require(result)


def test_flashes_and_strobes_are_no_cuts(tmp_path: Path) -> None:
    images = scene(11, 100, 160, 90)
    for at in (20, 50, 51, 80):
        images[at] = np.minimum(images[at].astype(int) + 120, 255).astype(np.uint8)
    result = measured(tmp_path / "a.mp4", images, [("hard", 99, 99)])
    assert [t for t in result.false if t[0] == "hard"] == []


def test_fades_to_white_count_as_fades(tmp_path: Path) -> None:
    one, two = scene(12, 60, 160, 90), scene(13, 60, 160, 90)
    white = np.full_like(one[0], 255)
    out = [cv2.addWeighted(image, 1 - (n + 1) / 12, white, (n + 1) / 12, 0) for n, image in enumerate(one[-12:])]
    back = [cv2.addWeighted(image, n / 12, white, 1 - n / 12, 0) for n, image in enumerate(two[:12])]
    images = [*one[:-12], *out, *[white] * 4, *back, *two[12:]]
    result = measured(tmp_path / "a.mp4", images, [("fade", 48, 75)])
    assert result.recall("fade") == 1
    assert result.false == []


def test_short_dissolves_at_eight_frames_a_second_are_found(tmp_path: Path) -> None:
    images = scene(14, 30, 160, 90)
    for seed in range(15, 20):
        following = scene(seed, 30, 160, 90)
        for n in range(4):
            images[n - 4] = cv2.addWeighted(images[n - 4], 1 - (n + 1) / 5, following[n], (n + 1) / 5, 0)
        images += following[4:]
    path = write_film(tmp_path / "a.mp4", images, fps=8)
    shots = first_pass(path, probe(path), ShotConfig())
    assert [shot.cut_in for shot in shots] == ["edge"] + ["dissolve"] * 5
    for number, shot in enumerate(shots[1:], 1):
        assert abs(shot.start_us - (26 * number + 4) * 125_000) <= 250_000
