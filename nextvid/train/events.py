"""events.jsonl: what happened in a run, one JSON object a line, and how it is read back.

Every line has `kind` (start | step | diagnostics | stage | checkpoint | skipped | alarm | end | error), `step` (steps
taken so far) and `time_s`. A run that was killed and resumed has written some steps twice; the reader keeps what the
last attempt says, and passes over a line that a kill cut short. Holds no display (report.py).
"""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from storage.errors import DamagedError, UpstreamError

Event = dict[str, Any]

NAME = "events.jsonl"


class EventLog:
    """Appends events; each line is flushed, so that a killed run has told all it knew."""

    def __init__(self, folder: Path) -> None:
        self._file = (folder / NAME).open("ab+")
        self._file.seek(0)
        self._file.truncate(self._file.read().rfind(b"\n") + 1)  # a line that a kill cut short never counted

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> Event:
        """Append one event and return it. Floats that JSON cannot hold become text: "nan", "inf"."""
        event = {"kind": kind, "step": step, "time_s": round(time.time(), 3)} | {
            key: _plain(value) for key, value in values.items()
        }
        self._file.write(json.dumps(event, allow_nan=False).encode() + b"\n")
        self._file.flush()
        return event

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def read_events(folder: Path) -> list[Event]:
    """Events of a run in order, each step once. Raises UpstreamError where there are none."""
    path = folder / NAME
    if not path.is_file():
        raise UpstreamError(f"{path}: no events; the run has not begun")
    kept: list[Event] = []
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")  # what follows the last newline was cut short
    for number, line in enumerate(whole.splitlines(), start=1):
        event = _parse(line, path, number)
        if event["kind"] == "start":  # what an earlier attempt wrote beyond this point never counted
            kept = [old for old in kept if old["step"] <= event["step"] and old["kind"] not in ("end", "error")]
        kept.append(event)
    return kept


def _parse(line: str, path: Path, number: int) -> Event:
    try:
        event: Event = json.loads(line)
    except json.JSONDecodeError:
        raise DamagedError(f"{path}, line {number}: not JSON; the file was changed by something else") from None
    return event


def _plain(value: Any) -> Any:  # noqa: ANN401 - JSON is Any
    match value:
        case float() if not math.isfinite(value):
            return str(value)
        case Mapping():
            return {key: _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case _:
            return value
