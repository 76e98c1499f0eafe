"""Contact sheets: rows of small pictures with captions, as PNG bytes. Pictures only.

Holds layout and drawing with Pillow. Holds no choice of pictures and no disk: callers publish the bytes. Sizes are
our choice: a sheet fits a browser window's width.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

TILE_WIDTH, TILE_HEIGHT = 160, 120  # pixels; previews are at most 160 a side
CAPTION_HEIGHT = 26  # two lines of the default font
HEADER_HEIGHT = 18
MARK_WIDTH = 4
GAP = 6
TILES_A_ROW = 8
BACKGROUND, INK, FAINT = (250, 250, 250), (20, 20, 20), (110, 110, 110)
FONT_SIZE = 10  # pixels

Mark = Literal["none", "edge", "hard", "dissolve", "fade"]


@dataclass(frozen=True)
class Tile:
    """One picture, uint8 [h, w, 3] RGB, what began it, and up to two short lines of text below."""

    picture: UInt8[np.ndarray, "h w 3"]
    caption: str
    mark: Mark = "none"


@dataclass(frozen=True)
class SheetRow:
    """A header and its tiles; tiles beyond a line's width go to the next line."""

    header: str
    tiles: Sequence[Tile]


def contact_sheet(rows: Sequence[SheetRow], width: int = TILES_A_ROW) -> bytes:
    """PNG of all rows one under the other, at most `width` tiles a line. Marks are coloured bars left of a tile."""
    lines = [
        (row.header if n == 0 else "", row.tiles[n : n + width]) for row in rows for n in range(0, _count(row), width)
    ]
    columns = max((len(tiles) for _, tiles in lines), default=1)
    step_x, step_y = TILE_WIDTH + MARK_WIDTH + GAP, TILE_HEIGHT + CAPTION_HEIGHT + HEADER_HEIGHT
    sheet = Image.new("RGB", (GAP + columns * step_x, GAP + max(1, len(lines)) * step_y), BACKGROUND)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    for line, (header, tiles) in enumerate(lines):
        top = GAP + line * step_y
        draw.text((GAP, top), _ascii(header), INK, font)
        for column, tile in enumerate(tiles):
            _draw_tile(sheet, draw, font, tile, GAP + column * step_x, top + HEADER_HEIGHT)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _count(row: SheetRow) -> int:
    return max(1, len(row.tiles))  # a row without tiles still shows its header


def _draw_tile(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    tile: Tile,
    x: int,
    y: int,
) -> None:
    picture = Image.fromarray(tile.picture)
    picture.thumbnail((TILE_WIDTH, TILE_HEIGHT))
    if tile.mark != "none":
        draw.rectangle((x, y, x + MARK_WIDTH - 1, y + TILE_HEIGHT - 1), fill=_colour(tile.mark))
    sheet.paste(picture, (x + MARK_WIDTH, y))
    for n, text in enumerate(tile.caption.split("\n")[:2]):
        draw.text((x + MARK_WIDTH, y + TILE_HEIGHT + 1 + 12 * n), _ascii(text), FAINT, font)


def _colour(mark: Mark) -> tuple[int, int, int]:
    match mark:
        case "hard":
            return (200, 40, 40)
        case "dissolve":
            return (220, 150, 30)
        case "fade":
            return (60, 90, 200)
        case _:
            return (190, 190, 190)


def _ascii(text: str) -> str:
    """The default font knows no more; names of files may hold anything."""
    return text.encode("ascii", "replace").decode()
