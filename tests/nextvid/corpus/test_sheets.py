"""Contact sheets: size, marks, wrapping, and names that no font knows."""

import io

import numpy as np
from PIL import Image

from nextvid.corpus.gallery import (
    CAPTION_HEIGHT,
    GAP,
    HEADER_HEIGHT,
    MARK_WIDTH,
    TILE_HEIGHT,
    TILE_WIDTH,
    SheetRow,
    Tile,
)
from nextvid.corpus.gallery import contact_sheet as sheet

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
