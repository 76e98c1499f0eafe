"""What whoever typed the command sees of work that goes on: bars at a terminal, lines elsewhere."""

import io
from collections.abc import Callable

from rich.console import Console

from nextvid.making.bars import Shown, shown
from nextvid.making.progress import Pace

HALF = Pace("films.000000", done=50, total=100, seconds=10.0, busy_s=9.0)
FULL = Pace("films.000000", 100, 100, 20.0, 19.0)


def said(terminal: bool, tell: Callable[[Shown], None]) -> str:
    """What is written while a block tells something."""
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
    with shown(console) as bars:
        tell(bars)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_terminal_gets_a_bar_that_moves() -> None:
    text = said(True, lambda bars: bars.on_pace(HALF))
    assert "latents films.000000" in text
    assert "50/100" in text
    assert "5.00 rows/s, device busy 90%" in text


def test_counts_have_bars_too_one_a_name() -> None:
    def tell(bars: Shown) -> None:
        bars.on_count("media films.000000", 3, 7)
        bars.on_count("shots films.000000", 1, 2)

    last = said(True, tell).split("media")[-1]
    assert "3/7" in last
    assert "shots films.000000" in last
    assert "1/2" in last


def test_a_full_bar_goes_and_a_note_stays() -> None:
    def tell(bars: Shown) -> None:
        bars.on_pace(HALF)
        bars.on_pace(Pace("films.000000", 60, 100, 20.0, 19.0, note="a note"))
        bars.on_pace(FULL)
        bars.on_count("media films.000000", 1, 2)

    last = said(True, tell).split("a note")[-1]
    assert "1/2" in last
    assert "100/100" not in last


def test_elsewhere_there_are_plain_lines_for_paces_alone() -> None:
    def tell(bars: Shown) -> None:
        bars.on_count("media films.000000", 1, 2)
        bars.on_pace(FULL)

    wanted = "latents films.000000: 100 of 100 rows, 5.00 rows/s, device busy 95%, 0 s to go\n"
    assert said(False, tell) == wanted
