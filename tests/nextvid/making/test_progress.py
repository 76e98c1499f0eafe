"""How far an encode is, in numbers and lines; and what is shown while it runs: bars on a terminal, lines elsewhere."""

import io
from collections.abc import Callable

import pytest
from rich.console import Console

from nextvid.making.progress import SHOWING, Lines, OnProgress, Progress, shown, silent

NAME = "latents films.000000"
HALF = Progress(NAME, done=50, total=100, seconds=10.0, busy_s=9.0)
FULL = Progress(NAME, 100, 100, 20.0, 19.0)


def test_numbers_follow_from_rows_and_seconds() -> None:
    assert (HALF.rows_per_s, HALF.busy_share) == (5.0, 0.9)
    assert HALF.line() == "latents films.000000: 50 of 100 rows, 5.00 rows/s, device busy 90%, 10 s to go"


def test_share_is_of_all_devices_together() -> None:
    assert Progress("b", 50, 100, seconds=10.0, busy_s=18.0, devices=2).busy_share == 0.9


def test_before_the_first_row_no_time_is_predicted() -> None:
    start = Progress("b", 0, 100, 0.0, 0.0)
    assert (start.rows_per_s, start.busy_share, start.line()) == (0.0, 0.0, "b: 0 of 100")
    assert "to go" not in Progress("b", 0, 100, 1.0, 0.5).line()


def test_lines_come_at_their_interval_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    written: list[str] = []
    lines = Lines(written.append, every_s=10.0)
    for done in range(0, 101, 10):
        now[0] = 3.0 * done / 10
        lines(Progress("b", done, 100, now[0], 0.0))
    assert [line.split()[1] for line in written] == ["40", "80", "100"]


def test_what_has_no_rate_is_a_line_only_where_it_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    written: list[str] = []
    lines = Lines(written.append, every_s=10.0)
    for done in (1, 2, 3):
        now[0] += 6.0
        lines(Progress("media b", done, 3))
    assert written == ["media b: 2 of 3, 0.167/s, 6 s to go"]


def test_losses_come_with_the_steps_and_the_time_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    written: list[str] = []
    lines = Lines(written.append, every_s=10.0)
    for step in (20, 40):
        now[0] += 10.0
        lines(Progress("pretrain demo", step, 100, detail="align 0.300 flow 0.600"))
    assert written == [
        "pretrain demo: 20 of 100, align 0.300 flow 0.600",
        "pretrain demo: 40 of 100, align 0.300 flow 0.600, 2/s, 30 s to go",
    ]


def test_what_is_shown_is_known_to_steps_in_this_process() -> None:
    assert SHOWING.get() is silent
    with shown(Console(file=io.StringIO(), force_terminal=True)) as on_progress:
        assert SHOWING.get() is on_progress
    assert SHOWING.get() is silent


def test_a_note_is_written_at_once() -> None:
    written: list[str] = []
    Lines(written.append, every_s=1e9)(Progress("b", 1, 100, 1.0, 1.0, note="from now on 32 frames a batch"))
    assert written == ["b: from now on 32 frames a batch"]


def output(terminal: bool, report: Callable[[OnProgress], None]) -> str:
    """What is written while a block reports progress."""
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
    with shown(console) as on_progress:
        report(on_progress)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_terminal_gets_a_bar_that_moves() -> None:
    text = output(True, lambda on_progress: on_progress(HALF))
    assert "latents films.000000" in text
    assert "50/100" in text
    assert "5.00 rows/s, device busy 90%" in text


def test_counts_have_bars_too_one_a_name() -> None:
    def report(on_progress: OnProgress) -> None:
        on_progress(Progress("media films.000000", 3, 7))
        on_progress(Progress("shots films.000000", 1, 2))

    last = output(True, report).split("media")[-1]
    assert "3/7" in last
    assert "shots films.000000" in last
    assert "1/2" in last


def test_a_full_bar_goes_and_a_note_stays() -> None:
    def report(on_progress: OnProgress) -> None:
        on_progress(HALF)
        on_progress(Progress(NAME, 60, 100, 20.0, 19.0, note="a note"))
        on_progress(FULL)
        on_progress(Progress("media films.000000", 1, 2))

    last = output(True, report).split("a note")[-1]
    assert "1/2" in last
    assert "100/100" not in last


def test_elsewhere_there_are_plain_lines_of_encodes_and_of_what_takes_long() -> None:
    def report(on_progress: OnProgress) -> None:
        on_progress(Progress("media films.000000", 1, 2))
        on_progress(FULL)

    wanted = "latents films.000000: 100 of 100 rows, 5.00 rows/s, device busy 95%, 0 s to go\n"
    assert output(False, report) == wanted
