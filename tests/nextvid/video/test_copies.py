"""How many copies the hashes of the first pass find: exact, remuxed, encoded again, resized, letterboxed; and how many
unrelated films they join."""

import itertools
import shutil
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from nextvid.config.datasets import DuplicateConfig, ShotConfig
from nextvid.trainset.duplicates import groups, near_pairs
from nextvid.video.decode import stream
from nextvid.video.probe import probe
from nextvid.video.shots import first_pass
from tests.nextvid.video.film import X264_VERYFAST, write_film
from tests.nextvid.video.splices import FPS, scene

CONFIG = DuplicateConfig()
Images = list[np.ndarray]
Hashes = list[tuple[bytes, int]]  # with their quality
# Least share of copies that is found. Our measurement: 1 for each, on real films and made ones, at most 12 of 31 bits
# apart; films of 240x136 are up to 32 bits from their copies at half the size, whose 68 lines PDQ has to stretch.
LEAST = {
    "exact": 1.0,
    "remuxed": 1.0,
    "encoded again": 0.95,
    "half the size": 0.95,
    "letterboxed": 0.95,
    "brighter": 0.95,
}


def remuxed(source: Path, path: Path) -> Path:
    with av.open(str(source)) as given, av.open(str(path), "w") as container:
        old = given.streams.video[0]
        new = container.add_stream_from_template(old)
        for packet in given.demux(old):
            if packet.dts is not None:
                packet.stream = new
                container.mux(packet)
    return path


def copies_of(source: Path, images: Images, folder: Path) -> dict[str, Path]:
    """A copy of a film in each way."""
    height, width = images[0].shape[:2]
    bar = round(0.12 * height / 2) * 2
    framed = [cv2.copyMakeBorder(image, bar, bar, 0, 0, cv2.BORDER_CONSTANT, value=(16, 16, 16)) for image in images]
    small = [cv2.resize(image, (width // 4 * 2, height // 4 * 2), interpolation=cv2.INTER_AREA) for image in images]
    bright = [cv2.convertScaleAbs(image, alpha=1.1, beta=8) for image in images]
    return {
        "exact": Path(shutil.copy(source, folder / "exact.mp4")),
        "remuxed": remuxed(source, folder / "remuxed.mkv"),
        "encoded again": write_film(folder / "again.mp4", images, fps=FPS, options=X264_VERYFAST, crf="35"),
        "half the size": write_film(folder / "small.mp4", small, fps=FPS),
        "letterboxed": write_film(folder / "framed.mp4", framed, fps=FPS),
        "brighter": write_film(folder / "bright.mp4", bright, fps=FPS),
    }


def hashes_of(path: Path) -> Hashes:
    facts = probe(path)
    shots = first_pass(path, facts, ShotConfig())
    return [pair for shot in shots for pair in zip(shot.hashes, shot.hash_quality, strict=True)]


def joined(films: list[Hashes]) -> np.ndarray:
    """The group of each film, as `duplicates` forms them of all their hashes at once."""
    owner = np.array([n for n, film in enumerate(films) for _ in film])
    bits = np.frombuffer(b"".join(pair[0] for film in films for pair in film), np.uint8).reshape(len(owner), -1)
    quality = np.array([pair[1] for film in films for pair in film])
    pairs = owner[near_pairs(bits, CONFIG.distance, quality, CONFIG.quality_min)].reshape(-1, 2)
    return groups(len(films), pairs)


def check(sources: list[Images], folder: Path) -> None:
    originals: list[Hashes] = []
    copies: dict[str, list[Hashes]] = {kind: [] for kind in LEAST}
    for number, images in enumerate(sources):
        place = folder / str(number)
        place.mkdir()
        source = write_film(place / "source.mp4", images, fps=FPS)
        originals.append(hashes_of(source))
        for kind, path in copies_of(source, images, place).items():
            copies[kind].append(hashes_of(path))
    alone = joined(originals)
    assert len(set(alone.tolist())) == len(sources), f"unrelated films were joined: {alone}"
    rates = {}
    for kind, made in copies.items():
        found = joined([*originals, *made])
        count = len(sources)
        rates[kind] = float(np.mean(found[:count] == found[count:]))
        assert len(set(found[:count].tolist())) == count, f"{kind}: copies joined unrelated films"
    for kind, least in LEAST.items():
        assert rates[kind] >= least, f"{kind}: {rates}"


def test_copies_of_made_films_are_found(tmp_path: Path) -> None:
    check([scene(seed, 50, 320, 180) for seed in range(200, 212)], tmp_path)


@pytest.mark.realdata
def test_copies_of_real_films_are_found(tmp_path: Path, real_media: Path) -> None:
    folder = real_media / "assorted"
    names = (
        "decord_flipping_a_pancake.mkv",
        "dj_video1.mp4",
        "intel_bottle-detection.mp4",
        "mdn_friday.mp4",
        "mma2_demo.mp4",
        "mma2_test.avi",
        "moviepy_chaplin.mp4",
        "sam2_01_dog.mp4",
        "sam2_04_coffee.mp4",
        "sam2_05_default_juggle.mp4",
        "vda_Tokyo-Walk_rgb.mp4",
        "mdn_flower.webm",
    )
    sources = []
    for name in names:
        frames = itertools.islice(stream(folder / name), 30, 80)
        sources.append([f.reformat(320, 180, "rgb24", interpolation="AREA").to_ndarray() for _, f in frames])
    check(sources, tmp_path)
