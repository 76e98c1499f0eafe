"""A report as Markdown: the same blocks as the page, pictures as files beside it.

Holds rendering only. Cells and texts are escaped where Markdown would read them as its own.
"""

from nextvid.report.blocks import Block, Card, Picture, Table, Text

FIGURES = "figures"  # folder beside report.md


def render_markdown(card: Card) -> str:
    """The text; pictures are `figures/<name>.png`."""
    numbers = {path: number for number, path in enumerate(card.sources(), start=1)}
    parts = [f"# {_text(card.title)}", _text(card.subtitle)]
    parts.append("\n".join(f"- {_text(name)}: {_text(value)}" for name, value in card.facts))
    for section in card.sections:
        parts.append(f"## {_text(section.title)}")
        parts += [_block(block, numbers) for block in section.blocks]
    listed = "\n".join(f"{number}. `{path}`" for path, number in numbers.items())
    return "\n\n".join([*parts, "## Sources", listed]) + "\n"


def _block(block: Block, numbers: dict[str, int]) -> str:
    marks = "".join(f" [{numbers[path]}]" for path in dict.fromkeys(block.sources))
    match block:
        case Text(text, "caveat", _):
            return f"> {_text(text)}{marks}"
        case Text(text, _, _):
            return f"{_text(text)}{marks}"
        case Picture(name, _, caption, _, _):
            return f"![{_text(caption)}]({FIGURES}/{name}.png)\n\n{_text(caption)}{marks}"
        case Table():
            lines = [_row(block.head), _row(tuple("---:" if a == "r" else "---" for a in block.align), escape=False)]
            lines += [_row(row) for row in block.rows]
            said = f"\n\n{_text(block.caption)}{marks}" if block.caption or marks else ""
            return "\n".join(lines) + said


def _row(cells: tuple[str, ...], escape: bool = True) -> str:
    return "| " + " | ".join(_text(cell) if escape else cell for cell in cells) + " |"


def _text(text: str) -> str:
    for sign in "\\`*_<>|[]":
        text = text.replace(sign, f"\\{sign}")
    return text.replace("\n", " ")
