"""Events of a run: written to events.jsonl, sent to its sinks (nextvid/train/sinks.py), shown, and read back.

events.jsonl has one JSON object per line, with `kind` (start, step, diagnostics, scores, not_scored, stage,
checkpoint, skipped, alarm, end or error), `step` (steps taken so far), `time_s` and the `crc32c` of the line without
it, which release 0.1.0 did not write. A run that was killed and resumed
has written some steps twice; the reader keeps those of the last attempt, and skips a line that a kill cut short. Shown
are events by Dagster Pipes inside Dagster, else as lines, at a terminal with a bar. Rank 0 alone writes events.
dagster_pipes, a small package without dagster, is imported by this module alone, and only in a Pipes session.
"""

import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

from rich.console import Console

from nextvid.making.progress import Progress, shown
from nextvid.train.sinks import Send
from storage.digest import crc32c
from storage.errors import DamagedError, UpstreamError

Event = dict[str, Any]

NAME = "events.jsonl"
_SUMMED = re.compile(r'(.*), "crc32c": ([0-9]{1,10})}')
PIPES_VARIABLE = "DAGSTER_PIPES_CONTEXT"  # set by Dagster's Pipes clients (dagster_pipes.PipesEnvVarParamsLoader)


class EventLog:
    """Appends events; each line is flushed, so that a kill loses none."""

    def __init__(self, folder: Path) -> None:
        self._file = (folder / NAME).open("ab+")
        self._file.seek(0)
        self._file.truncate(self._file.read().rfind(b"\n") + 1)  # removes a line that a kill cut short

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> Event:
        """Append one event and return it. Floats that JSON does not have become text: "nan", "inf"."""
        event = {"kind": kind, "step": step, "time_s": round(time.time(), 3)} | {
            key: _plain(value) for key, value in values.items()
        }
        line = json.dumps(event, allow_nan=False).encode()
        self._file.write(line[:-1] + b', "crc32c": %d}\n' % crc32c(line))
        self._file.flush()
        return event

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def read_events(folder: Path) -> list[Event]:
    """Events of a run in order, each step once. UpstreamError if there is no file, DamagedError if it is not JSON."""
    path = folder / NAME
    if not path.is_file():
        raise UpstreamError(f"{path}: no events; the run has not begun")
    kept: list[Event] = []
    summed = False  # whether a line before has a checksum
    try:
        # a kill cut short what follows the last newline
        whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    except UnicodeDecodeError:
        raise DamagedError(f"{path} is not text; another program changed the file: restore it") from None
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            if (found := _SUMMED.fullmatch(line)) is not None and int(found[2]) != crc32c(f"{found[1]}}}".encode()):
                raise ValueError("its bytes differ from their checksum")
            if found is None and summed:
                raise ValueError("it has no checksum")
            event: Event = json.loads(line if found is None else f"{found[1]}}}")
            kind, at, summed = event["kind"], event["step"], found is not None
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            what = f"{path}, line {number} is no event ({error})"
            raise DamagedError(f"{what}: another program changed the file, restore it") from None
        if kind == "start":  # the attempts before took steps beyond this one in vain
            # an attempt from step 0 does all of it again, what precedes its first step too
            kept = [
                old
                for old in kept
                if old["step"] <= at and (old["kind"] == "start" or (at and old["kind"] not in ("end", "error")))
            ]
        kept.append(event)
    return kept


def newest(events: Sequence[Event], kind: str) -> Event:
    """The newest event of a kind; empty where there is none."""
    return next((event for event in reversed(events) if event["kind"] == kind), {})


def accuracies(events: Sequence[Event]) -> dict[str, float]:
    """The newest accuracies while training by `<benchmark>_<what>`; empty where nothing was scored."""
    return {name.replace("/", "_"): value for name, value in newest(events, "scores").get("accuracy", {}).items()}


def progress_of(folder: Path, name: str) -> Progress | None:
    """How far the last attempt in a folder is, with its last losses; None before it has begun."""
    try:
        events = read_events(folder)
    except UpstreamError:
        return None
    if "steps" not in (start := newest(events, "start")):
        return None
    detail = ""
    match next((event for event in reversed(events) if event["kind"] in ("step", "epoch")), {}):
        case {"kind": "step"} as step:
            losses = " ".join(f"{name} {float(step[name]):.3f}" for name in ("align", "flow"))
            detail = f"{losses}, {step['clips_per_s']:.1f} clips/s"
        case {"kind": "epoch"} as epoch:
            detail = f"{epoch['benchmark']} {epoch['encoder']} loss {epoch['loss']}"
    return Progress(name, events[-1]["step"], start["steps"], detail=detail)


def mean_speeds(events: Iterable[Event]) -> dict[str, float]:
    """Means over the step events of `step_s`, `wait_share` and, where it is known, `mfu`; empty without steps."""
    steps = [event for event in events if event["kind"] == "step"]
    values = {name: [float(e[name]) for e in steps if name in e] for name in ("step_s", "wait_share", "mfu")}
    return {name: sum(some) / len(some) for name, some in values.items() if some}


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


class Reporter:
    """Writes each event to events.jsonl, sends numbers of steps and diagnostics to sinks as curves, and shows it.

    `open_sinks` is called at the event `start`; its sinks are given what events.jsonl has up to there first.
    """

    def __init__(
        self,
        folder: Path,
        steps: int,
        work: str = "training",
        open_sinks: Callable[[ExitStack], list[Send]] = lambda stack: [],
    ) -> None:
        self._folder, self._open_sinks, self._sinks = folder, open_sinks, list[Send]()
        self._stack = ExitStack()
        self._log = self._stack.enter_context(EventLog(folder))
        self._show = self._stack.enter_context(_shown(steps, work))

    def event(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Record one event."""
        event = self._log.write(kind, step, values)
        new = [event]
        if kind == "start":
            self._sinks = self._open_sinks(self._stack)
            new = read_events(self._folder) if self._sinks else []
        for one in new:
            if one["kind"] in ("step", "diagnostics", "scores"):
                scalars = {f"{one['kind']}/{name}": value for name, value in _numbers(one)}
                for send in self._sinks:
                    send(scalars, one["step"])
        self._show(event)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def describe(event: Event, steps: int) -> str:
    """One event as a line of text."""
    head = f"step {event['step']}/{steps}"
    match event["kind"]:
        case "step":
            mfu = f" MFU {event['mfu']:.1%}" if "mfu" in event else ""
            return (
                f"{head} {event['stage']} align {float(event['align']):.4f} flow {float(event['flow']):.4f} "
                f"lr {event['lr']:.2e} {event['clips_per_s']:.1f} clips/s wait {event['wait_share']:.1%}{mfu}"
            )
        case kind:
            rest = " ".join(
                f"{name}={value}" for name, value in event.items() if name not in ("kind", "step", "time_s")
            )
            return f"{head} {kind} {rest}".rstrip()


@contextmanager
def _shown(steps: int, work: str) -> Iterator[Callable[[Event], None]]:
    """Shows events while the block runs: as Pipes messages, which the asset reads, and log lines, or as progress."""
    if PIPES_VARIABLE in os.environ:
        from dagster_pipes import open_dagster_pipes

        with open_dagster_pipes() as context:

            def show(event: Event) -> None:
                context.report_custom_message(event)
                context.log.info(describe(event, steps))

            yield show
        return
    with shown(Console()) as on_progress:
        yield lambda event: on_progress(Progress(work, event["step"], steps, note=describe(event, steps)))


def _numbers(event: Event) -> list[tuple[str, float]]:
    """Numbers of an event by name, one level deep: `align/short`, `norm/encoder`."""
    found: list[tuple[str, float]] = []
    for name, value in event.items():
        items = value.items() if isinstance(value, Mapping) else [("", value)]
        found += [
            (f"{name}/{key}" if key else name, float(item))
            for key, item in items
            if isinstance(item, int | float) and name not in ("step", "time_s")
        ]
    return found
