"""One style for all pictures: plots in grey ink without a background, and sheets of small pictures; as PNG bytes."""

import io
import warnings
from typing import TYPE_CHECKING

from PIL import Image

from nextvid.plain_text import printable

if TYPE_CHECKING:  # half a second, and sheets need none of it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#808893"  # of plots, grey: readable on white and on black
COLOURS = ("#3b82c4", "#d9822b", "#2f9e77", "#a866c9", "#c9504f", "#8a8f2d")
DPI = 110
SHEET_BACKGROUND, SHEET_INK = (255, 255, 255), (20, 20, 20)
PLOT_TEXT = 40  # our choice: characters of a name in a plot


def png(figure: "Figure") -> bytes:
    """PNG bytes of a figure, with a transparent background."""
    buffer = io.BytesIO()
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # boxes stand for letters the font lacks
        figure.savefig(buffer, format="png", dpi=DPI, transparent=True)
    return buffer.getvalue()


def plot_text(name: str) -> str:
    """A name from outside for a plot, where `$` would begin a formula and a legend leaves out what begins with `_`."""
    shown = printable(name[:PLOT_TEXT]).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def sheet_png(sheet: Image.Image) -> bytes:
    """PNG bytes of a sheet of small pictures."""
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")  # `optimize` takes a second for a sheet of noise, such as channels of latents
    return buffer.getvalue()


def quiet(axes: "Axes", title: str) -> None:
    """Grey ink, no box, title to the left."""
    axes.set_title(title, loc="left", fontsize=9.5, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(which="both", colors=INK, labelsize=8)
