"""Names of files, classes and licences with control codes, HTML, Markdown, formulas and bytes that are no text.

They are shown as text, on a terminal, in the report, in Dagster's Markdown, in a drafted corpus.yaml and in plots, and
nothing in them is acted on.
"""

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import dagster as dg
import numpy as np
import polars as pl
import pytest
from PIL import Image
from rich.console import Console

from assets.reporting import preview, result
from nextvid.commands import main
from nextvid.config.corpus import load_corpus
from nextvid.corpus.draft import draft_corpus
from nextvid.corpus.sources import make_sources, update_sources
from nextvid.features.card import TrainedOn, card
from nextvid.lineage.shown import Shown
from nextvid.lineage.trace import MediaFacts, Trace
from nextvid.making.outcome import Check, Outcome, line, to_look_at
from nextvid.making.progress import Progress, shown
from nextvid.pictures import plot_text
from nextvid.plain_text import in_markdown, printable
from nextvid.report.page import Card, Picture, Section, Table, Text, render_html
from nextvid.report.scores import scatter_png
from tests.factories import write_project
from tests.hostile.conftest import NAMES

EVERY = pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)


def shows(text: str) -> bool:
    """Whether a terminal shows all of a text and acts on nothing in it."""
    return all(c == "\n" or c.isprintable() or c == "\xa0" for c in text)


@EVERY
def test_a_terminal_is_told_nothing(name: str) -> None:
    assert printable(name).isprintable()
    assert printable("plain é 中 text") == "plain é 中 text"
    outcome = Outcome("sources", None, True, 1, 1, 1.0, numbers={"ignored": 1, f"ignored_{name}": 1},
                      checks=(Check("spans_inside_video", False, {"such_as": name}),))  # fmt: skip
    facts = MediaFacts(name, None, "ok", None, 1, 1, None)
    for text in (
        line(outcome),
        to_look_at([outcome]),
        Trace(name, "file", media=(facts,)).text(),
        Shown(name, "file", (f"file {name}: ok",), f"/{name}.png").text(),
    ):
        assert shows(text)
        assert not [one for one in text.splitlines() if one.startswith("warning: all is lost")]


@EVERY
@pytest.mark.parametrize("terminal", [True, False])
def test_progress_tells_it_nothing(name: str, terminal: bool) -> None:
    written = io.StringIO()
    with shown(Console(file=written, force_terminal=terminal, width=400)) as on_progress:
        on_progress(Progress(f"shots {name} [red]", 0, 0, note=name))
        on_progress(Progress(f"shots {name} [/]", 1, 2, detail=name))
    for part in (name, name.split("\x1b")[-1] if "\x1b" in name else "\u202e"):
        assert part not in written.getvalue() or part.isprintable()


@pytest.mark.parametrize("name", ["caf\udce9.mp4", "\x1b[31m.mp4", "a\u202eb.mp4", "a\tb.mp4"])
def test_errors_name_arguments_safely(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    project = write_project(tmp_path, {"d": {"uri": "d"}})
    for command in ("lineage", "show", "withdraw"):
        monkeypatch.setattr("sys.argv", ["nextvid", command, name, "--corpus", str(project.path)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        assert capsys.readouterr().err.removesuffix("\n").isprintable()


def test_bytes_that_are_no_text_as_an_argument(repository: Path) -> None:
    command: list[str | bytes] = [
        sys.executable,
        "-m",
        "nextvid",
        "features",
        b"caf\xe9.mp4",
        "--encoder",
        "e",
        "--out",
        "o.npz",
    ]
    done = subprocess.run(command, capture_output=True, check=False, cwd=repository)
    assert done.stderr == b"config: caf\\udce9.mp4 is not UTF-8: rename the file or folder\n"


def test_folders_and_extensions_that_are_no_text_are_listed(tmp_path: Path) -> None:
    """Empty folders and files that are none of ours were compared as they are, which no table can."""
    folder = tmp_path / "d"
    folder.mkdir()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(folder / "a.png")
    (folder / "gone").mkdir()
    for name in (b"empty\xff", b"caf\xe9\x1b[2J"):
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).mkdir()
    for name in (b"a.\xff\xfe", b"b.\x1b[2J", b"c.x\ny", b"d\xff.png"):
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(b"x")
    for number in range(60):
        (folder / f"z.e{number}").write_bytes(b"x")
    project = write_project(tmp_path, {"d": {"uri": "d"}})
    made = make_sources(project)
    update_sources(project)
    assert made.rows == 2, "the picture, and the one with a bad name"
    assert shows(line(made))
    assert len([key for key in made.numbers if key.startswith("ignored_")]) <= 50
    assert all(key.isascii() or key.encode() for key in made.numbers)
    result(made)


@pytest.mark.parametrize(
    "ignored", ["x.\non_failure: [touch, owned]", "x.\r\nroot: elsewhere", "x.\u2028protocols: [github]", "x.a: #b"]
)
def test_a_drafted_corpus_yaml_has_no_keys_of_others(tmp_path: Path, ignored: str) -> None:
    """An extension with a line end was a line of corpus.yaml, whose `on_failure` is a command that Dagster runs."""
    folder = tmp_path / "my\nroot: there"
    folder.mkdir()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(folder / "a.png")
    (folder / ignored).write_bytes(b"x")
    draft = draft_corpus(str(folder), str(tmp_path / "corpus.yaml"))
    corpus = load_corpus(tmp_path / "corpus.yaml")
    assert corpus.on_failure is None
    assert corpus.root == str(tmp_path / "my_root_there_nextvid")
    assert list(corpus.datasets) == [draft.dataset]
    assert shows(draft.text())


class Page(HTMLParser):
    """Elements, attributes and texts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def page_with(name: str) -> Page:
    blocks = (
        Text(name, "lead", (name,)),
        Table((name, "n"), ((name, name),), "lr", name, (name,)),
        Picture("p", b"png", name, (name,)),
    )
    return Page(render_html(Card(name, name, ((name, name),), (Section(name, blocks),))))


@EVERY
def test_a_report_shows_it_as_text(name: str) -> None:
    plain, page = page_with("plain"), page_with(name)
    assert page.tags == plain.tags
    assert page.attributes == plain.attributes
    assert sum(printable(name) in text for text in page.texts) == sum(text.strip() == "plain" for text in plain.texts)
    assert shows("".join(page.texts))


def rendered(text: str) -> Iterator[str]:
    """Tokens of Markdown, by the parser that rich brings along."""
    from markdown_it import MarkdownIt

    for token in MarkdownIt("commonmark", {"html": True}).enable("table").parse(text):
        yield from ([one.type for one in token.children or ()] if token.type == "inline" else [token.type])


PLAIN = {"text", "softbreak", "text_special"}


@EVERY
def test_markdown_shows_it_as_text(name: str) -> None:
    assert set(rendered(f"the file {in_markdown(name)} and more")) <= {"paragraph_open", "paragraph_close", *PLAIN}


@EVERY
def test_dagster_and_the_hub_show_it_as_text(name: str) -> None:
    table = preview(pl.DataFrame({"uri": [name, name[-9:]], "uses": [[name[:20]], []]})).value
    assert table is not None
    data = [TrainedOn("d", name, 1.0, 1, 1)]
    readme = card(
        {"recipe": "demo", "run": "r", "trainset": "t", "encoding": {"resolution": 64},
         "model": {"encoder": {"depth": 1, "width": 1, "input": "latents"}}}, data,
    ).split("---\n", 2)[2]  # fmt: skip
    traced = Trace("0123456789ab", "run", every_file=f"/{name}").markdown()
    allowed = {*rendered("| a | b |\n|---|---|\n| c | d |\n\nplain"), *PLAIN}
    assert set(rendered(table)) <= allowed
    assert set(rendered(traced)) <= allowed
    assert not {"html_inline", "html_block", "image"} & set(rendered(readme))
    assert len([one for one in rendered(readme) if one == "tr_open"]) == 2, "one row below the head"
    assert isinstance(result(Outcome("media", "d.000000", True, 1, 1, 1.0, numbers={name: name})), dg.MaterializeResult)


def test_plots_show_it_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    names = [*NAMES.values(), "_private", "$", "$$", "a_{b}^{c} $\\alpha$"]
    monkeypatch.setattr("nextvid.report.scores.tsne", lambda features: features[:, :2])
    found = scatter_png({"EMA": rng.normal(size=(2, 4))}, np.array([0, 1]), names)
    assert found.startswith(b"\x89PNG")
    assert all(plot_text(name).lstrip().replace(r"\$", "").isprintable() for name in names)
    assert not plot_text("_private").startswith("_")
