"""Decoding ahead: bounded, in order, never stuck, and each row once; failures are the file's or the row's."""

import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from nextvid.encode import frames as module
from nextvid.encode.decode_task import Task
from nextvid.encode.frames import Decoding, PendingRows
from storage.errors import MediaError
from storage.schemas import Clips
from tests.factories import clip_row
from tests.nextvid.encode.small_corpus import F

SIDE = 8
ROW_BYTES = F * SIDE**2 * 3


def rows(files: int, each: int = 2) -> pl.DataFrame:
    """`each` clips of every one of `files` files, none of which exists."""
    found = [
        clip_row(
            Path(f"/nowhere/{n:04d}.mp4"), i, media_id=n.to_bytes(16, "little"), row_id=(n * each + i).to_bytes(16)
        )
        for n in range(files)
        for i in range(each)
    ]
    return pl.DataFrame(found, schema=Clips.create_empty().schema)


class Asked:
    """In place of the sandbox: remembers what was asked of it, and shows each row its number."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail: dict[str, str] | None = None) -> None:
        self.tasks: list[tuple[str, Task]] = []
        self.fail = fail or {}
        self._lock = threading.Lock()
        monkeypatch.setattr(Decoding, "_run", lambda decoding, uri, task: self.run(uri, task))

    def run(self, uri: str, task: Task) -> Any:
        with self._lock:
            self.tasks.append((uri, task))
        if (reason := self.fail.get(uri)) is not None:
            raise MediaError(reason, "by the test")
        frames = [np.full((F, SIDE, SIDE, 3), int.from_bytes(row.row_id) % 256, np.uint8) for row in task.rows]
        return frames, 0.5 * len(frames)


def ids(table: pl.DataFrame) -> list[bytes]:
    return table["row_id"].to_list()


def numbers(table: pl.DataFrame, started: PendingRows) -> list[int]:
    """Take every row, one by one, in the table's order; what each shows."""
    found = []
    for row in ids(table):
        seen = started.take([row])[row]
        assert seen.frames is not None
        found.append(int(seen.frames[0, 0, 0, 0]))
    return found


@pytest.mark.parametrize("files", [10, 100])
def test_memory_is_bounded_whatever_the_corpus_holds(monkeypatch: pytest.MonkeyPatch, files: int) -> None:
    Asked(monkeypatch)
    bound, peak_bytes, begin = 6 * ROW_BYTES, 0, Decoding.begin

    def watched(self: Decoding, *wanted: Any) -> None:
        nonlocal peak_bytes
        begin(self, *wanted)
        peak_bytes = max(peak_bytes, self._held_bytes)

    monkeypatch.setattr(Decoding, "begin", watched)
    table = rows(files)
    with Decoding(2, bound) as decoding:
        assert numbers(table, decoding.start(table, SIDE)) == [n % 256 for n in range(2 * files)]
        assert 0 < peak_bytes <= bound + 2 * ROW_BYTES  # the job that crossed it
        assert decoding._held_bytes == 0


def test_nothing_begins_beyond_the_bound_before_rows_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(monkeypatch)
    table = rows(10)
    with Decoding(2, 4 * ROW_BYTES) as decoding:
        started = decoding.start(table, SIDE)
        time.sleep(0.1)
        assert len(asked.tasks) == 2
        started.take(ids(table)[:2])
        time.sleep(0.1)
        assert len(asked.tasks) == 3


def test_who_waits_for_the_last_row_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the rows that fill the bound would wait for one that cannot begin because of them."""
    Asked(monkeypatch)
    table = rows(20)
    with Decoding(2, 2 * ROW_BYTES) as decoding:
        started = decoding.start(table, SIDE)
        backwards = [started.take([row])[row] for row in reversed(ids(table))]
        assert all(seen.frames is not None for seen in backwards)


def test_what_was_asked_for_first_begins_first(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(monkeypatch)
    first, second = rows(6), rows(12)[12:]
    with Decoding(1, 2 * ROW_BYTES) as decoding:
        one, other = decoding.start(first, SIDE), decoding.start(second, SIDE)
        numbers(first, one)
        numbers(second, other)
    uris = [uri for uri, _ in asked.tasks]
    assert uris == sorted(uris)


def test_rows_that_nobody_asked_for_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    Asked(monkeypatch)
    table = rows(1)
    with Decoding(1) as decoding:
        started = decoding.start(table, SIDE)
        assert b"x" * 16 not in started
        assert started.take([b"x" * 16]) == {}
        assert set(started.collect()) == set(ids(table))
        assert started.collect() == {}


def test_dropped_rows_free_their_bytes_and_never_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(monkeypatch)
    table, after = rows(10), rows(12)[20:]
    with Decoding(1, 2 * ROW_BYTES) as decoding:
        dropped = decoding.start(table, SIDE)
        left = decoding.start(after, SIDE)
        dropped.take(ids(table)[:1])
        dropped.drop()
        numbers(after, left)
        assert decoding._held_bytes == 0
    assert len(asked.tasks) < 6


def test_a_failed_job_is_tried_row_by_row_and_then_with_the_other_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    table = rows(2).with_columns(decoder=pl.lit("decord", pl.Enum(["decord", "pyav", "pillow"])))
    asked = Asked(monkeypatch, {"/nowhere/0000.mp4": "corrupt"})
    with Decoding(1) as decoding:
        seen = decoding.start(table, SIDE).collect()
    assert [seen[row].reason for row in ids(table)] == ["corrupt", "corrupt", None, None]
    tried = [(task.decoder, len(task.rows)) for uri, task in asked.tasks if uri.endswith("0000.mp4")]
    assert tried == [("decord", 2), ("decord", 1), ("decord", 1), ("pyav", 1), ("pyav", 1)]


@pytest.mark.parametrize("reason", ["missing", "changed", "unreachable"])
def test_a_file_that_is_gone_is_not_asked_again(monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    table = rows(2)
    asked = Asked(monkeypatch, {"/nowhere/0000.mp4": reason})
    with Decoding(1) as decoding:
        seen = decoding.start(table, SIDE).collect()
    assert [seen[row].reason for row in ids(table)] == [reason, reason, None, None]
    assert len(asked.tasks) == 2


def test_a_file_of_many_rows_is_cut_into_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TASK_BYTES", 3 * ROW_BYTES)
    jobs = module.jobs_by_file(rows(2, each=7), SIDE)
    assert [len(job.task.rows) for job in jobs] == [3, 3, 1, 3, 3, 1]
    assert all(job.size_bytes == len(job.task.rows) * ROW_BYTES for job in jobs)


def test_shares_of_the_seconds_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    Asked(monkeypatch)
    table = rows(3)
    with Decoding(1) as decoding:
        seen = decoding.start(table, SIDE).collect()
    assert sum(one.decode_s for one in seen.values()) == pytest.approx(3.0)


def test_a_mistake_of_ours_is_raised_not_quarantined(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(decoding: Decoding, uri: str, task: Task) -> Future[None]:
        raise AssertionError("a mistake")

    monkeypatch.setattr(Decoding, "_run", broken)
    table = rows(1)
    with Decoding(1) as decoding, pytest.raises(AssertionError, match="a mistake"):
        decoding.start(table, SIDE).collect()
