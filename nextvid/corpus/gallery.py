"""Pictures of a batch's shots for people: contact sheets, what thresholds reject, and histograms of the scores.

New thresholds decode nothing, so pictures of what they may reject have to be there before: of each score that a filter
reads, the first pass keeps the shots at its ends.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import polars as pl
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from nextvid.pictures import SHEET_BACKGROUND, SHEET_INK, sheet_png
from nextvid.video.shots import ShotFacts
from storage import atomic, tables
from storage.root import DataRoot
from storage.schemas import Pictures

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Sizes in pixels are our choice: a sheet fits the width of a browser window.
TILE_WIDTH, TILE_HEIGHT = 160, 120  # previews are at most 160 a side
CAPTION_HEIGHT = 26  # two lines of the default font
HEADER_HEIGHT = 18
MARK_WIDTH = 4
GAP = 6
TILES_A_ROW = 8
FAINT = (110, 110, 110)
FONT_SIZE = 10

Mark = Literal["none", "edge", "hard", "dissolve", "fade"]
# Scores that filters read (nextvid/corpus/cutting.py), and whether it is low values that they reject.
ENDS = {
    "motion_low": ("motion_mean", True),
    "motion_high": ("motion_mean", False),
    "freeze_high": ("freeze_share", False),
    "luma_low": ("luma_mean", True),
    "luma_high": ("luma_mean", False),
    "blur_low": ("blur", True),
    "short": ("length_us", True),
}
KEPT = 16  # our choice: shots at each end; a batch then keeps at most 112 pictures of about 4 kB
SHOWN = 8  # shots for each reason: one line of the sheet
JPEG_QUALITY = 80
REASONS = ("static", "unsteady", "frozen", "dark", "bright", "blurred", "too_short")
BINS = 40  # of a histogram


@dataclass(frozen=True)
class Tile:
    """One RGB picture [h, w, 3], the kind of cut before it, and up to two short lines of text below."""

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
        (row.header if n == 0 else "", row.tiles[n : n + width])
        for row in rows
        for n in range(0, max(1, len(row.tiles)), width)  # a row without tiles still shows its header
    ]
    columns = max((len(tiles) for _, tiles in lines), default=1)
    step_x, step_y = TILE_WIDTH + MARK_WIDTH + GAP, TILE_HEIGHT + CAPTION_HEIGHT + HEADER_HEIGHT
    sheet = Image.new("RGB", (GAP + columns * step_x, GAP + max(1, len(lines)) * step_y), SHEET_BACKGROUND)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    for line, (header, tiles) in enumerate(lines):
        top = GAP + line * step_y
        draw.text((GAP, top), _ascii(header), SHEET_INK, font)
        for column, tile in enumerate(tiles):
            _draw_tile(sheet, draw, font, tile, GAP + column * step_x, top + HEADER_HEIGHT)
    return sheet_png(sheet)


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
    """The default font has only ASCII; names of files may hold anything."""
    return text.encode("ascii", "replace").decode()


class KeptPictures:
    """Pictures of the shots at the ends of each score; memory is bounded for any number of shots."""

    def __init__(self) -> None:
        self._shots: dict[bytes, tuple[Mapping[str, float], bytes]] = {}

    def add(self, shot_id: bytes, shot: ShotFacts) -> None:
        """Consider a shot."""
        values = scores_of(shot.__dict__)
        if len(self._shots) > 8 * KEPT * len(ENDS):
            self._shots = {key: self._shots[key] for key in extreme({k: v for k, (v, _) in self._shots.items()})}
        buffer = io.BytesIO()
        Image.fromarray(shot.preview).save(buffer, "JPEG", quality=JPEG_QUALITY)
        self._shots[shot_id] = (values, buffer.getvalue())

    def table(self, before: pl.DataFrame, shots: pl.DataFrame) -> pl.DataFrame:
        """Rows of Pictures: pictures kept now or before, of shots that are in the table and at the end of a score."""
        jpegs = dict(before.select("shot_id", "jpeg").iter_rows()) | {
            key: jpeg for key, (_, jpeg) in self._shots.items()
        }
        known = shots.filter(pl.col("shot_id").is_in(pl.Series(list(jpegs), dtype=pl.Binary).implode()))
        chosen = extreme({row["shot_id"]: scores_of(row) for row in known.iter_rows(named=True)})
        rows = [(key, jpegs[key]) for key in sorted(chosen)]
        return pl.DataFrame(rows, Pictures.create_empty().schema, orient="row")


def scores_of(shot: Mapping[str, object]) -> dict[str, float]:
    """Scores by the names in ENDS, from a row of `shots` or the fields of ShotFacts."""
    length_us = int(shot["end_us"]) - int(shot["start_us"])  # type: ignore[call-overload]  # integers in both
    names = {name for name, _ in ENDS.values()} - {"length_us"}
    return {name: float(shot[name]) for name in names} | {"length_us": length_us}  # type: ignore[arg-type]


def extreme(scores: Mapping[bytes, Mapping[str, float]]) -> set[bytes]:
    """The shots at the ends of each score."""
    chosen: set[bytes] = set()
    for name, low in ENDS.values():
        ordered = sorted(scores, key=lambda key: (scores[key][name] if low else -scores[key][name], key))
        chosen.update(ordered[:KEPT])
    return chosen


def publish_pictures(root: DataRoot, batch: str, kept: KeptPictures, shots: pl.DataFrame) -> None:
    """Write the batch's kept pictures where they differ from the file."""
    before = read_pictures(root, batch)
    after = kept.table(before, shots)
    if not after.equals(before):
        tables.write_table(root.pictures(batch), after, Pictures)


def read_pictures(root: DataRoot, batch: str) -> pl.DataFrame:
    """The batch's kept pictures; an empty table where there are none."""
    path = root.pictures(batch)
    return tables.read_table(path, Pictures) if atomic.exists(path) else Pictures.create_empty()


def rejected_sheet(clips: pl.DataFrame, shots: pl.DataFrame, pictures: pl.DataFrame) -> bytes:
    """PNG: for each reason why pretraining left shots out, how many, and up to SHOWN that have a picture."""
    rejected = clips.filter((pl.col("status") == "rejected") & pl.col("reason").is_in(REASONS))
    scores = shots.select("shot_id", "start_us", "end_us", "motion_mean", "freeze_share", "luma_mean", "blur")
    shown = rejected.select("shot_id", "reason", "uri").unique(maintain_order=True).join(scores, on="shot_id")
    counts = dict(shown.group_by("reason").len().iter_rows())
    pictured = shown.join(pictures, on="shot_id").sort("reason", "shot_id")
    rows = []
    for reason in (reason for reason in REASONS if reason in counts):
        some = pictured.filter(pl.col("reason") == reason)
        header = f"{reason}: {counts[reason]} shots" + ("" if some.height else ", none of them with a picture")
        tiles = []
        for row in some.head(SHOWN).iter_rows(named=True):
            name = str(row["uri"]).rsplit("/", 1)[-1]
            motion = f"motion {row['motion_mean']:.2f} frozen {row['freeze_share']:.2f}"
            light = f"luma {row['luma_mean']:.0f} blur {row['blur']:.0f} {name[-10:]}"
            with Image.open(io.BytesIO(row["jpeg"])) as picture:
                tiles.append(Tile(np.asarray(picture.convert("RGB")), f"{motion}\n{light}"))
        rows.append(SheetRow(header, tiles))
    return contact_sheet(rows or [SheetRow("no shot was left out for its scores", [])])


@dataclass(frozen=True)
class Histogram:
    """Values of one score, its thresholds, and whether its axis is logarithmic."""

    title: str
    values: Iterable[float]
    limits: tuple[float | None, float | None] = (None, None)
    log: bool = False


def histograms_png(histograms: Sequence[Histogram], counts: Mapping[str, int]) -> bytes:
    """PNG: one panel for each score, and bars of what became of the shots: `counts` by outcome."""
    from matplotlib.figure import Figure  # half a second, so not with the module

    from nextvid.pictures import COLOURS, png, quiet

    columns = 3
    rows = -(-(len(histograms) + 1) // columns)
    height = 2.5 * rows  # inches
    figure = Figure(figsize=(9.4, height))
    # by hand: matplotlib's layouts draw everything once more to find it
    figure.subplots_adjust(0.07, 0.3 / height, 0.98, 1 - 0.3 / height, wspace=0.25, hspace=0.35)
    panels = list(figure.subplots(rows, columns, squeeze=False).flatten())
    for panel, histogram in zip(panels, histograms, strict=False):
        drawn = _draw(panel, histogram)
        quiet(panel, f"{histogram.title} (n = {drawn:,})")
    outcomes = panels[len(histograms)]
    left, bottom, width, tall = outcomes.get_position().bounds
    outcomes.set_position((left + 0.45 * width, bottom, 0.55 * width, tall))  # beside the names
    names = sorted(counts, key=lambda name: counts[name])
    outcomes.barh(names, [counts[name] for name in names], color=COLOURS[0])
    quiet(outcomes, "shots by outcome\nfor pretraining")
    for panel in panels[len(histograms) + 1 :]:
        panel.set_axis_off()
    return png(figure)


def _draw(axes: "Axes", histogram: Histogram) -> int:
    """Draw bars and thresholds; how many values there are."""
    from nextvid.pictures import COLOURS

    values = np.fromiter(histogram.values, np.float64)
    values = values[np.isfinite(values)]
    if histogram.log and len(values):
        least = max(float(values.max()) * 1e-4, 1e-3)  # smaller values are counted in the first bar
        values = np.maximum(values, least)
        edges = np.geomspace(least, max(float(values.max()), 2 * least), BINS)
        axes.stairs(*np.histogram(values, edges), fill=True, color=COLOURS[0])
        axes.set_xscale("log")
    elif len(values):
        axes.stairs(*np.histogram(values, BINS), fill=True, color=COLOURS[0])
    for limit in histogram.limits:
        if limit is not None:
            axes.axvline(limit, color=COLOURS[4], linewidth=1.2, linestyle="dashed")
    return len(values)
