"""What a report is made of: sections of text, tables and pictures, each block naming the files its numbers come from.

Holds no layout (html.py and markdown.py render the same blocks) and reads nothing.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Text:
    """A paragraph. `lead` is the sentence to read first, `caveat` what must not be overlooked."""

    text: str
    kind: Literal["plain", "lead", "caveat"] = "plain"
    sources: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """Cells as text. `align` has one letter a column: l or r. Rows in `strong` are set apart."""

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
    """PNG bytes; `name` becomes a file name beside the Markdown. `plain` pictures have a see-through background."""

    name: str
    png: bytes
    caption: str
    sources: tuple[str, ...] = ()
    plain: bool = False


Block = Text | Table | Picture


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    title: str
    blocks: tuple[Block, ...]


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
