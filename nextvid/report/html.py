"""A report as one HTML file that stands for itself: inline style, pictures as data, nothing from a network, no script.

Holds the look and nothing else. Readable from a phone to a wide screen, by day and by night; numbers stand under each
other. Every text is escaped: names of files and classes come from outside.
"""

import base64
import html

from nextvid.report.blocks import Block, Card, Picture, Section, Table, Text

STYLE = """
:root { color-scheme: light dark; --ink: #1d2127; --soft: #646c78; --line: #e3e6ea; --paper: #ffffff; --card: #f6f7f9;
  --accent: #2f6fb2; --caveat: #fdf6e3; --caveat-line: #e0b84c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --soft: #99a2ae; --line: #31363d; --paper: #15181c;
  --card: #1d2126; --accent: #7db3ea; --caveat: #2a2517; --caveat-line: #a8842c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.6 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", sans-serif; -webkit-text-size-adjust: 100%; }
main { max-width: 62rem; margin: 0 auto; padding: 3rem 1.25rem 5rem; }
header { border-bottom: 1px solid var(--line); padding-bottom: 1.5rem; margin-bottom: 1rem; }
h1 { font-size: 2rem; line-height: 1.2; letter-spacing: -.015em; margin: 0 0 .3rem; }
h2 { font-size: 1.25rem; letter-spacing: -.01em; margin: 2.8rem 0 .8rem; }
.subtitle { color: var(--soft); margin: 0 0 1.4rem; max-width: 46rem; }
p { max-width: 46rem; margin: .7rem 0; }
p.lead { font-size: 1.1rem; }
p.caveat { background: var(--caveat); border-left: 3px solid var(--caveat-line); padding: .7rem 1rem;
  border-radius: 0 6px 6px 0; }
dl.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .9rem 1.4rem; margin: 0; }
dl.facts dt { font-size: .75rem; color: var(--soft); }
dl.facts dd { margin: 0; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; min-width: 100%; }
caption { caption-side: bottom; text-align: left; color: var(--soft); font-size: .85rem; padding-top: .5rem; }
th, td { padding: .42rem .9rem .42rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { font-weight: 600; color: var(--soft); font-size: .8rem; white-space: nowrap; }
.r { text-align: right; white-space: nowrap; padding-right: 1.1rem; }
tr.strong td { font-weight: 600; }
figure { margin: 1.2rem 0; }
figure img { display: block; max-width: 100%; height: auto; border-radius: 8px; }
figure.sheet { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .8rem; }
figcaption { color: var(--soft); font-size: .85rem; padding-top: .5rem; max-width: 46rem; }
sup { line-height: 0; font-size: .7em; } sup a { color: var(--accent); text-decoration: none; padding-left: .15em; }
ol.sources { font: .82rem/1.7 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; color: var(--soft);
  overflow-wrap: anywhere; padding-left: 2.2rem; }
ol.sources li:target { color: var(--ink); background: var(--card); }
nav { font-size: .85rem; margin-top: 1.4rem; }
nav a { color: var(--accent); text-decoration: none; margin-right: 1.1rem; }
@media print { main { padding: 0; } figure, table { break-inside: avoid; } }
"""


def render_html(card: Card) -> str:
    """The page."""
    numbers = {path: number for number, path in enumerate(card.sources(), start=1)}
    facts = "".join(f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in card.facts)
    links = "".join(f'<a href="#{_anchor(s.title)}">{_text(s.title)}</a>' for s in card.sections)
    body = "\n".join(_section(section, numbers) for section in card.sections)
    listed = "".join(f'<li id="source-{number}">{_text(path)}</li>' for path, number in numbers.items())
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(card.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<header><h1>{_text(card.title)}</h1>\n<p class="subtitle">{_text(card.subtitle)}</p>\n'
        f'<dl class="facts">{facts}</dl>\n<nav>{links}</nav></header>\n{body}\n'
        f'<section id="sources"><h2>Sources</h2>\n<p>Where each number above was read.</p>\n'
        f'<ol class="sources">{listed}</ol></section>\n</main>\n</body>\n</html>\n'
    )


def _section(section: Section, numbers: dict[str, int]) -> str:
    blocks = "\n".join(_block(block, numbers) for block in section.blocks)
    return f'<section id="{_anchor(section.title)}">\n<h2>{_text(section.title)}</h2>\n{blocks}\n</section>'


def _block(block: Block, numbers: dict[str, int]) -> str:
    marks = _marks(block.sources, numbers)
    match block:
        case Text(text, kind, _):
            return f'<p class="{kind}">{_text(text)}{marks}</p>'
        case Table():
            return _table(block, marks)
        case Picture(_, png, caption, _, plain):
            data = base64.b64encode(png).decode()
            return (
                f'<figure class="{"plain" if plain else "sheet"}">'
                f'<img alt="{html.escape(caption, quote=True)}" src="data:image/png;base64,{data}">'
                f"<figcaption>{_text(caption)}{marks}</figcaption></figure>"
            )


def _table(table: Table, marks: str) -> str:
    head = "".join(f"<th{_class(a)}>{_text(name)}</th>" for name, a in zip(table.head, table.align, strict=True))
    rows = "\n".join(
        f"<tr{' class=strong' if number in table.strong else ''}>"
        + "".join(f"<td{_class(a)}>{_text(cell)}</td>" for cell, a in zip(row, table.align, strict=True))
        + "</tr>"
        for number, row in enumerate(table.rows)
    )
    caption = f"<caption>{_text(table.caption)}{marks}</caption>"
    return f'<div class="wide"><table>{caption}<thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table></div>'


def _marks(sources: tuple[str, ...], numbers: dict[str, int]) -> str:
    links = "".join(f'<a href="#source-{numbers[path]}">{numbers[path]}</a>' for path in dict.fromkeys(sources))
    return f"<sup>{links}</sup>" if links else ""


def _class(align: str) -> str:
    return ' class="r"' if align == "r" else ""


def _anchor(title: str) -> str:
    return "-".join(word for word in "".join(c if c.isalnum() else " " for c in title.lower()).split())


def _text(text: str) -> str:
    return html.escape(text, quote=False)
