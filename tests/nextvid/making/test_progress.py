"""The pace of an encode: its numbers and its lines."""

import pytest

from nextvid.making.progress import Lines, Pace

HALF = Pace("films.000000", done=50, total=100, seconds=10.0, busy_s=9.0)


def test_numbers_follow_from_rows_and_seconds() -> None:
    assert (HALF.rows_per_s, HALF.busy_share, HALF.left_s) == (5.0, 0.9, 10.0)
    assert HALF.line() == "latents films.000000: 50 of 100 rows, 5.00 rows/s, device busy 90%, 10 s to go"


def test_share_is_of_all_devices_together() -> None:
    assert Pace("b", 50, 100, seconds=10.0, busy_s=18.0, devices=2).busy_share == 0.9


def test_before_the_first_row_nothing_is_foretold() -> None:
    start = Pace("b", 0, 100, 0.0, 0.0)
    assert (start.rows_per_s, start.busy_share, start.left_s) == (0.0, 0.0, None)
    assert "to go" not in start.line()


def test_lines_come_at_their_interval_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    said: list[str] = []
    lines = Lines(said.append, every_s=10.0)
    for done in range(0, 101, 10):
        now[0] = 3.0 * done / 10
        lines(Pace("b", done, 100, now[0], 0.0))
    assert [line.split()[2] for line in said] == ["40", "80", "100"]


def test_a_note_is_said_at_once() -> None:
    said: list[str] = []
    Lines(said.append, every_s=1e9)(Pace("b", 1, 100, 1.0, 1.0, note="from now on 32 frames a batch"))
    assert said == ["latents b: from now on 32 frames a batch"]
