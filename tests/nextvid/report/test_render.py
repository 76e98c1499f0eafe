"""Both renderings of the same blocks: nothing lost, nothing that strangers wrote is executed, every number cited."""

import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextvid.report.blocks import Card, Picture, Section, Table, Text
from nextvid.report.html import render_html
from nextvid.report.markdown import render_markdown

EVIL = '<script>alert("x")</script> & | `'
PNG = b"\x89PNG not really"


class Reader(HTMLParser):
    """Tags and the text between them; fails on tags that do not close."""

    VOID = ("meta", "img", "br")

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.said: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.said.append(data)


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    return reader


def card() -> Card:
    return Card(
        "Card of <x>",
        "below",
        (("steps", "1,000"),),
        (
            Section(
                "First part",
                (
                    Text(EVIL, "caveat", ("/a/score.json",)),
                    Table(
                        ("", "value"), (("one", "1.5"), (EVIL, "2.5")), "lr", "numbers", ("/b/x.json", "/a/score.json")
                    ),
                ),
            ),
            Section("Second", (Picture("curves", PNG, "how it went", ("/b/x.json",)), Text("no source"))),
        ),
    )


def test_sources_are_numbered_by_first_mention() -> None:
    assert card().sources() == ("/a/score.json", "/b/x.json")


def test_html_is_whole_and_stands_for_itself() -> None:
    page = read(render_html(card()))
    assert "script" not in page.tags
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    said = " ".join(page.said)
    for text in ("Card of <x>", EVIL, "1.5", "2.5", "how it went", "/a/score.json", "/b/x.json"):
        assert text in said


def test_html_links_lead_somewhere() -> None:
    page = render_html(card())
    for target in re.findall(r'href="#([^"]+)"', page):
        assert f'id="{target}"' in page
    assert page.count('href="#source-2"') == 2


def test_markdown_holds_the_same() -> None:
    text = render_markdown(card())
    assert "![how it went](figures/curves.png)" in text
    assert "| one | 1.5 |" in text
    assert "| --- | ---: |" in text
    assert "<script>" not in text.replace("\\<", "")
    assert "1. `/a/score.json`" in text
    assert "[2] [1]" in text


@given(st.text(max_size=60))
def test_any_text_survives_in_html(words: str) -> None:
    page = read(render_html(Card("t", words, (), (Section("s", (Text(words),)),))))
    wanted = words.replace("\r\n", "\n").replace("\r", "\n").replace("\x00", "\ufffd")
    assert wanted in "".join(page.said).replace("\r\n", "\n").replace("\r", "\n").replace("\x00", "\ufffd")


def test_a_crooked_table_is_a_programmers_mistake() -> None:
    with pytest.raises(AssertionError):
        Table(("a", "b"), (("1",),), "lr")
    with pytest.raises(AssertionError):
        Table(("a", "b"), (), "l")
