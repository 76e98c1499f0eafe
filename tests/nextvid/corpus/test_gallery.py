"""Contact sheets, the pictures kept at the ends of each score, the sheet of what was left out, and histograms."""

import io
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from nextvid.config.project import Project
from nextvid.corpus.clips import make_clips
from nextvid.corpus.gallery import (
    CAPTION_HEIGHT,
    ENDS,
    GAP,
    HEADER_HEIGHT,
    KEPT,
    MARK_WIDTH,
    TILE_HEIGHT,
    TILE_WIDTH,
    Histogram,
    KeptPictures,
    SheetRow,
    Tile,
    extreme,
    histograms_png,
    read_pictures,
    rejected_sheet,
    scores_of,
)
from nextvid.corpus.gallery import contact_sheet as sheet
from nextvid.corpus.shots import make_shots
from nextvid.video.shots import ShotFacts
from storage import tables
from storage.schemas import Pictures, Shots
from tests.nextvid.corpus.conftest import Made

BATCH = "films.000000"


def shot(number: int, **scores: float) -> ShotFacts:
    values: dict[str, object] = {field.name: 0 for field in fields(ShotFacts)}
    rng = np.random.default_rng(number)
    values |= {name: float(rng.uniform(0, 100)) for name in ("motion_mean", "freeze_share", "luma_mean", "blur")}
    values |= {"start_us": 0, "end_us": int(rng.integers(1, 10**7)), "cut_in": "edge", "cut_out": "edge"}
    values |= {
        "hashes": (),
        "hash_quality": (),
        "hash_times_us": (),
        "preview": np.full((9, 16, 3), number % 256, np.uint8),
    }
    return ShotFacts(**(values | scores))  # type: ignore[arg-type]  # the fields by name


def identity(number: int) -> bytes:
    return number.to_bytes(16, "big")


def table(shots: dict[bytes, ShotFacts]) -> pl.DataFrame:
    return pl.DataFrame(
        [{"shot_id": key, **scores_of(s.__dict__), "start_us": 0, "end_us": s.end_us} for key, s in shots.items()]
    )


def test_the_ends_of_every_score_are_kept_however_many_shots_go_by() -> None:
    shots = {identity(n): shot(n) for n in range(3000)}
    kept = KeptPictures()
    for key, one in shots.items():
        kept.add(key, one)
        assert len(kept._shots) <= 8 * KEPT * len(ENDS) + 1
    found = kept.table(Pictures.create_empty(), table(shots))
    assert set(found["shot_id"]) == extreme({key: scores_of(one.__dict__) for key, one in shots.items()})
    assert found.height <= KEPT * len(ENDS)
    assert Image.open(io.BytesIO(found["jpeg"][0])).size == (16, 9)


def test_pictures_of_before_compete_with_new_ones_and_shots_that_went_lose_theirs() -> None:
    old = {identity(n): shot(n) for n in range(40)}
    first = KeptPictures()
    for key, one in old.items():
        first.add(key, one)
    before = first.table(Pictures.create_empty(), table(old))
    later = KeptPictures()
    later.add(identity(99), shot(99, motion_mean=-1.0))
    del old[identity(0)]
    after = later.table(before, table(old | {identity(99): shot(99, motion_mean=-1.0)}))
    assert identity(99) in set(after["shot_id"])
    assert identity(0) not in set(after["shot_id"])
    assert set(after["shot_id"]) <= set(before["shot_id"]) | {identity(99)}


def test_the_sheet_names_each_reason_with_its_number() -> None:
    shots = {identity(n): shot(n) for n in range(20)}
    clips = pl.DataFrame(
        {
            "shot_id": [identity(n) for n in range(20)],
            "status": ["rejected"] * 18 + ["ok"] * 2,
            "reason": ["static"] * 12 + ["blurred"] * 3 + ["held_out"] * 3 + [None] * 2,
            "uri": [f"/d/{n}.mp4" for n in range(20)],
        }
    )
    kept = KeptPictures()
    for key, one in shots.items():
        kept.add(key, one)
    pictures = kept.table(Pictures.create_empty(), table(shots))
    full = Image.open(io.BytesIO(rejected_sheet(clips, table(shots), pictures)))
    static_alone = Image.open(io.BytesIO(rejected_sheet(clips.head(12), table(shots), pictures)))
    nothing = Image.open(io.BytesIO(rejected_sheet(clips.tail(2), table(shots), pictures)))
    assert full.height > static_alone.height >= nothing.height
    assert np.asarray(static_alone).std() > np.asarray(nothing).std()


def test_histograms_have_a_panel_a_score_and_survive_empty_and_odd_values() -> None:
    odd = [0.0, float("nan"), 1e-9, 5.0]
    data = histograms_png(
        [Histogram("a", odd, (0.1, None), log=True), Histogram("b", []), Histogram("c", [1.0])],
        {"kept": 3, "static": 1},
    )
    picture = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert picture.shape[1] > 900
    assert picture.std() > 5
    more = histograms_png([Histogram(str(n), [1.0, 2.0]) for n in range(6)], {})
    assert Image.open(io.BytesIO(more)).height > picture.shape[0]


def test_makers_leave_the_pictures_and_name_them(small_corpus: Made) -> None:
    shots, clips = small_corpus.outcomes[f"shots {BATCH}"], small_corpus.outcomes[f"clips {BATCH}"]
    assert set(shots.pictures) == {"shots"}
    assert set(clips.pictures) == {"left out by pretraining", "scores and lengths"}
    for path in (*shots.pictures.values(), *clips.pictures.values()):
        assert Image.open(io.BytesIO(Path(path).read_bytes())).width > 100
    root = small_corpus.project.root
    ids = tables.read_table(root.table("shots", BATCH), Shots).drop_nulls("shot_id")["shot_id"]
    assert set(read_pictures(root, BATCH)["shot_id"]) == set(ids)  # few shots: all are at some end
    assert root.batches("shots") == ["films.000000", "stills.000000"]


def test_new_thresholds_show_what_they_reject_and_decode_nothing(
    own_copy: Callable[..., Project], monkeypatch: pytest.MonkeyPatch
) -> None:
    project = own_copy(curation={"filters": {"motion_min": 90.0, "motion_max": None}})
    before = Path(project.root.preview("clips", BATCH)).read_bytes()
    monkeypatch.setattr("nextvid.corpus.shots._first_passes", lambda *_: pytest.fail("nothing is decoded again"))
    make_clips(project, BATCH)
    after = Path(project.root.preview("clips", BATCH)).read_bytes()
    assert after != before
    assert Image.open(io.BytesIO(after)).width > Image.open(io.BytesIO(before)).width


def test_making_again_writes_no_picture(own_copy: Callable[..., Project]) -> None:
    project = own_copy()
    paths = [project.root.preview("clips", BATCH, "scores"), project.root.pictures(BATCH)]
    times = [Path(path).stat().st_mtime_ns for path in paths]
    make_shots(project, BATCH)
    make_clips(project, BATCH)
    assert [Path(path).stat().st_mtime_ns for path in paths] == times


RED, BLUE = (200, 40, 40), (60, 90, 200)
STEP_X, STEP_Y = TILE_WIDTH + MARK_WIDTH + GAP, TILE_HEIGHT + CAPTION_HEIGHT + HEADER_HEIGHT


def picture(colour: tuple[int, int, int], height: int = 90, width: int = 160) -> np.ndarray:
    return np.full((height, width, 3), colour, np.uint8)


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def test_tiles_stand_in_lines_with_their_marks() -> None:
    tiles = [
        Tile(picture((10, 20, 30)), "a", "hard"),
        Tile(picture((40, 50, 60)), "b", "fade"),
        Tile(picture((7, 8, 9)), "c"),
    ]
    image = opened(sheet([SheetRow("film", tiles)], width=2))
    assert image.size == (GAP + 2 * STEP_X, GAP + 2 * STEP_Y), "three tiles, two a line"
    top = GAP + HEADER_HEIGHT
    assert image.getpixel((GAP, top)) == RED
    assert image.getpixel((GAP + STEP_X, top)) == BLUE
    assert image.getpixel((GAP + MARK_WIDTH + 5, top + 5)) == (10, 20, 30)
    assert image.getpixel((GAP + STEP_X + MARK_WIDTH + 5, top + 5)) == (40, 50, 60)
    assert image.getpixel((GAP + MARK_WIDTH + 5, top + STEP_Y + 5)) == (7, 8, 9)


def test_tall_pictures_are_shrunk_to_their_tile() -> None:
    image = opened(sheet([SheetRow("film", [Tile(picture((10, 20, 30), 160, 80), "a")])]))
    top = GAP + HEADER_HEIGHT
    assert image.getpixel((GAP + MARK_WIDTH + 30, top + TILE_HEIGHT - 5)) == (10, 20, 30)
    assert image.getpixel((GAP + MARK_WIDTH + 70, top + 5)) != (10, 20, 30)


def test_the_same_pictures_give_the_same_bytes() -> None:
    rows = [SheetRow("film", [Tile(picture((1, 2, 3)), "caption\nof two lines", "dissolve")])]
    assert sheet(rows) == sheet(rows)


def test_nothing_and_strange_names_can_be_drawn() -> None:
    assert opened(sheet([])).size[1] == GAP + STEP_Y
    strange = SheetRow("Фильм 映画\udcff.mp4", [Tile(picture((1, 2, 3)), "ü\n→\nthird line")])
    assert opened(sheet([strange, SheetRow("empty", [])])).size == (GAP + STEP_X, GAP + 2 * STEP_Y)
