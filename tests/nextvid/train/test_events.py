"""events.jsonl: what was written comes back, each step once, whatever a kill did to the last line."""

import json
import math
from pathlib import Path

import pytest

from nextvid.train.events import NAME, Event, EventLog, mean_speeds, read_events
from storage.errors import DamagedError, UpstreamError


def _steps(folder: Path) -> list[tuple[str, int]]:
    return [(event["kind"], event["step"]) for event in read_events(folder)]


def test_round_trip(tmp_path: Path) -> None:
    with EventLog(tmp_path) as log:
        log.write("start", 0, {})
        log.write("step", 1, {"align": 0.5, "norm": {"encoder": math.inf}, "flow": math.nan})
    last = read_events(tmp_path)[-1]
    assert (last["align"], last["norm"], last["flow"]) == (0.5, {"encoder": "inf"}, "nan")
    assert last["time_s"] > 1.6e9


def test_each_line_is_there_before_the_log_is_closed(tmp_path: Path) -> None:
    with EventLog(tmp_path) as log:
        log.write("step", 1, {})
        assert _steps(tmp_path) == [("step", 1)]


def test_a_resumed_attempt_replaces_what_it_repeats(tmp_path: Path) -> None:
    with EventLog(tmp_path) as log:
        for kind, step in [("start", 0), ("step", 1), ("step", 2), ("checkpoint", 2), ("step", 3), ("error", 3)]:
            log.write(kind, step, {"attempt": 1})
    with EventLog(tmp_path) as log:
        for kind, step in [("start", 2), ("step", 3), ("step", 4), ("end", 4)]:
            log.write(kind, step, {"attempt": 2})
    assert _steps(tmp_path) == [
        ("start", 0), ("step", 1), ("step", 2), ("checkpoint", 2), ("start", 2), ("step", 3), ("step", 4), ("end", 4),
    ]  # fmt: skip
    assert [event["attempt"] for event in read_events(tmp_path) if event["step"] == 3] == [2]


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_line_cut_short_is_passed_over_and_ended(tmp_path: Path, cut: int) -> None:
    with EventLog(tmp_path) as log:
        log.write("step", 1, {})
        log.write("step", 2, {"norm": {"encoder": 1.5}})
    data = (tmp_path / NAME).read_bytes()
    (tmp_path / NAME).write_bytes(data[:-cut])
    assert _steps(tmp_path) == [("step", 1)]
    with EventLog(tmp_path) as log:
        log.write("step", 3, {})
    assert _steps(tmp_path) == [("step", 1), ("step", 3)]


def test_foreign_text_is_named(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text(json.dumps({"kind": "step", "step": 1}) + "\nnot json}\n")
    with pytest.raises(DamagedError, match="line 2"):
        read_events(tmp_path)


def test_no_run_no_events(tmp_path: Path) -> None:
    with pytest.raises(UpstreamError, match="not begun"):
        read_events(tmp_path)


def test_mean_speeds_are_of_step_events_and_of_mfu_where_it_is_known() -> None:
    events: list[Event] = [
        {"kind": "start", "step_s": 9.0},
        {"kind": "step", "step_s": 1.0, "wait_share": 0.0},
        {"kind": "step", "step_s": 3.0, "wait_share": 0.5, "mfu": 0.25},
    ]
    assert mean_speeds(events) == {"step_s": 2.0, "wait_share": 0.25, "mfu": 0.25}
    assert mean_speeds(events[:1]) == {}
