"""The page of a report: nothing is lost, nothing that strangers wrote is executed, every number has a source."""

import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextvid.plain_text import printable
from nextvid.report.page import Card, Picture, Section, Table, Text, render_html

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


def test_sources_that_differ_in_case_are_two() -> None:
    page = render_html(Card("t", "", (), (Section("s", (Text("x", sources=("/A", "/a", "/A")),)),)))
    assert re.findall(r'<a href="#source-(\d)">', page) == ["1", "2"]


def test_cells_are_aligned_and_strong_rows_marked() -> None:
    table = Table(("", "value"), (("one", "1.5"), ("two", "2.5")), "lr", strong=frozenset({1}))
    page = render_html(Card("t", "", (), (Section("s", (table,)),)))
    assert '<tr><td>one</td><td class="r">1.5</td></tr>' in page
    assert '<tr class="strong"><td>two</td><td class="r">2.5</td></tr>' in page


@given(st.text(max_size=60))
def test_any_text_survives_in_html(words: str) -> None:
    page = read(render_html(Card("t", words, (), (Section("s", (Text(words),)),))))
    assert printable(words) in "".join(page.said)


def test_a_crooked_table_is_a_programmers_mistake() -> None:
    with pytest.raises(AssertionError):
        Table(("a", "b"), (("1",),), "lr")
    with pytest.raises(AssertionError):
        Table(("a", "b"), (), "l")
