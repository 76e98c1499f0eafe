"""The picture of a mask plan: the first entries of every strategy, as drawn and as thinned.

Holds no sampling and no numbers; bright cells are kept, grey ones were visible before thinning, dark ones are masked.

Axes: E entries, S cells.
"""

import io
from collections.abc import Mapping

import numpy as np
from einops import rearrange
from jaxtyping import Bool, UInt8
from PIL import Image, ImageDraw

SHOWN = 12  # entries a strategy
CELL = 8  # pixels
GAP = 6  # pixels between pictures
CAPTION = 14  # pixels
MASKED, THINNED, KEPT = (38, 40, 48), (96, 108, 128), (250, 204, 92)
BACKGROUND = (255, 255, 255)
INK = (20, 20, 20)

Bits = Bool[np.ndarray, "E S"]


def gallery(raw: Mapping[str, Bits], kept: Mapping[str, Bits], grid: tuple[int, int]) -> bytes:
    """PNG bytes, one row of pictures a strategy; a plan without entries is one line of text."""
    height, width = grid
    across = SHOWN * (width * CELL + GAP) + GAP
    row_height = CAPTION + height * CELL + 2 * GAP
    sheet = Image.new("RGB", (across, max(1, len(raw)) * row_height), BACKGROUND)
    ink = ImageDraw.Draw(sheet)
    if not raw:
        ink.text((GAP, GAP), "no entries: this configuration draws none beforehand", fill=INK)
    for row, (name, bits) in enumerate(raw.items()):
        top = row * row_height
        shown = kept.get(name, bits)
        text = (
            f"{name}: {bits.sum(axis=1).mean():.1f} of {height * width} cells visible, {shown[0].sum()} kept in entry 0"
        )
        ink.text((GAP, top + 1), text, fill=INK)
        for column, picture in enumerate(_pictures(bits[:SHOWN], shown[:SHOWN], grid)):
            sheet.paste(Image.fromarray(picture), (GAP + column * (width * CELL + GAP), top + CAPTION + GAP))
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    return buffer.getvalue()


def _pictures(raw: Bits, kept: Bits, grid: tuple[int, int]) -> UInt8[np.ndarray, "E H W 3"]:
    colours = np.array([MASKED, THINNED, KEPT], dtype=np.uint8)[raw.astype(int) + (raw & kept)]
    cells = rearrange(colours, "e (h w) c -> e h w c", h=grid[0])
    return cells.repeat(CELL, axis=1).repeat(CELL, axis=2)
