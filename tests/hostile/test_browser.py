"""Names of every sort in a real browser: the report's page and Dagster's UI show them as text and act on nothing.

What a parser says of Markdown and HTML, test_names.py says without a browser; here scripts run.
"""

import html
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from nextvid.report.page import Card, Section, Table, Text, render_html
from tests.hostile.conftest import NAMES

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Each would write this into the page, if it were more than text.
MARK = "42042"
ACTS = "document.body.append(42*1001)"
WANTED_NOWHERE = ("<img", "<iframe", "<details")  # beside scripts and drawings of Dagster's own
EVIL = [
    f"<img src=x onerror=\"{ACTS}\">.mp4",
    f"<svg/onload=\"{ACTS}\">.mp4",
    f"<script>{ACTS}</script>.mp4".replace("</", "<\\/"),
    f"[x](javascript:{ACTS}) <details open ontoggle=\"{ACTS}\">.mp4",
    f"<iframe srcdoc=\"<script>parent.{ACTS}</script>\"></iframe>.mp4",
    f"--><style>@import 'http:{ACTS}'</style><body onload=\"{ACTS}\">",
]  # fmt: skip
EVERY = [*EVIL, *NAMES.values()]


def shown_by_a_browser(url: str, folder: Path, milliseconds: int) -> str:
    """The page's elements after its scripts have run for some time."""
    if CHROMIUM is None:
        pytest.skip("no chromium here")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += ["--disable-background-networking", "--no-first-run", f"--user-data-dir={folder / 'profile'}"]
    command += [f"--virtual-time-budget={milliseconds}", "--dump-dom", url]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout


def test_the_report(tmp_path: Path) -> None:
    def page(names: list[str]) -> str:
        blocks = (
            Text(" ".join(names), "lead"),
            Table(("name", "n"), tuple((one, one) for one in names), "lr", names[0]),
        )
        return render_html(Card(names[0], names[-1], ((names[1], names[1]),), (Section(names[2], blocks),)))

    (tmp_path / "control.html").write_text(f"<body>{EVIL[0]}</body>")
    (tmp_path / "page.html").write_text(page(EVERY))
    assert MARK in shown_by_a_browser((tmp_path / "control.html").as_uri(), tmp_path, 2000)
    shown = shown_by_a_browser((tmp_path / "page.html").as_uri(), tmp_path, 2000)
    assert MARK not in shown
    assert NAMES["letters"] in shown
    assert not [tag for tag in (*WANTED_NOWHERE, "<svg", "<script") if tag in shown]


DEFINITIONS = """
import dagster as dg
import polars as pl
from assets.reporting import preview, result
from nextvid.making.outcome import Check, Outcome
from tests.hostile.test_browser import EVERY

@dg.asset(check_specs=[dg.AssetCheckSpec("spans", asset="media")])
def media():
    numbers = {f"n{n} {name}"[:200]: name for n, name in enumerate(EVERY)}
    checks = (Check("spans", False, {"such_as": " ".join(EVERY)}),)
    made = result(Outcome("media", None, True, 1, 1, 1.0, numbers=numbers, checks=checks))
    return made._replace(metadata={**made.metadata, "preview": preview(pl.DataFrame({"uri": EVERY}))})

defs = dg.Definitions(assets=[media])
"""


@pytest.fixture
def dagster_ui(tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Dagster's UI over an asset whose last materialisation reports names of every sort."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    (tmp_path / "definitions.py").write_text(DEFINITIONS)
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PYTHONPATH", str(repository))
    file = ["-f", str(tmp_path / "definitions.py")]
    subprocess.run([sys.executable, "-m", "dagster", "asset", "materialize", "--select", "media", *file],
                   check=True, capture_output=True, timeout=300)  # fmt: skip
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-m", "dagster_webserver", *file, "-p", str(port)],
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        while True:
            try:
                requests.get(f"http://127.0.0.1:{port}/server_info", timeout=5)
                break
            except requests.ConnectionError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(60)


def test_dagster_shows_it_as_text(tmp_path: Path, dagster_ui: str) -> None:
    """A materialisation's numbers and table, and what a check says."""
    for place in ("assets/media?view=events", "assets/media?view=checks&checkDetail=spans"):
        shown = shown_by_a_browser(f"{dagster_ui}/{place}", tmp_path, 20_000)
        assert MARK not in shown
        assert not [tag for tag in WANTED_NOWHERE if tag in shown]
        for name in (EVIL[0], "Ünïcödé 中文"):
            assert html.escape(name, quote=False) in shown, f"{place} does not show what was reported"
