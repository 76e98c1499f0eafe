"""The page of a report: sections of text, tables and pictures, rendered as one HTML file.

Each block names the files its numbers come from; the page numbers them. The file needs nothing else: style and pictures
are inside, there is no script. Names of files and classes come from outside, so every text is escaped, and codes are
shown for what would turn the direction of writing.
"""

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from nextvid.plain_text import printable


@dataclass(frozen=True)
class Text:
    """A paragraph: a `lead` is shown larger, a `caveat` in a box."""

    text: str
    kind: Literal["plain", "lead", "caveat"] = "plain"
    sources: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """Cells as text. `align` has one letter a column: l or r. Rows numbered in `strong` are bold."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    align: str
    caption: str = ""
    sources: tuple[str, ...] = ()
    strong: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        assert len(self.align) == len(self.head), f"{self.align} for {self.head}"
        assert all(len(row) == len(self.head) for row in self.rows), "a row with another number of cells"


@dataclass(frozen=True)
class Picture:
    """PNG bytes; `name` becomes the name of a file beside the page. `plain` pictures have a transparent background."""

    name: str
    png: bytes
    caption: str
    sources: tuple[str, ...] = ()
    plain: bool = False


Block = Text | Table | Picture


@dataclass(frozen=True)
class Section:
    """A heading and the blocks below it."""

    title: str
    blocks: tuple[Block, ...]

    @property
    def anchor(self) -> str:
        """The heading as the target of a link: lower-case words joined by hyphens."""
        return "-".join("".join(c if c.isalnum() else " " for c in self.title.lower()).split())


@dataclass(frozen=True)
class Card:
    """The whole report. `facts` are the (name, value) pairs below its title."""

    title: str
    subtitle: str
    facts: tuple[tuple[str, str], ...]
    sections: tuple[Section, ...]

    def sources(self) -> tuple[str, ...]:
        """Every file that a block names, in the order of first mention: their numbers in the report are 1, 2, ..."""
        named = [path for section in self.sections for block in section.blocks for path in block.sources]
        return tuple(dict.fromkeys(named))


def render_html(card: Card) -> str:
    """The page as HTML."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    environment.tests["text"] = lambda block: isinstance(block, Text)
    environment.tests["table"] = lambda block: isinstance(block, Table)
    numbers = {path: number for number, path in enumerate(card.sources(), start=1)}
    return environment.get_template("page.html.jinja").render(card=card, numbers=numbers)
