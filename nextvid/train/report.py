"""Where events of a run go besides events.jsonl: TensorBoard always, and one of Dagster Pipes, a bar, or plain lines.

The only module of nextvid that knows dagster_pipes, a small package without dagster; it is imported when the variables
of a Pipes session are set and not otherwise. Rank 0 alone reports. Holds no training.
"""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from nextvid.train.events import Event, EventLog

if TYPE_CHECKING:
    from dagster_pipes import PipesContext
    from rich.progress import Progress
    from torch.utils.tensorboard import SummaryWriter

PIPES_VARIABLE = "DAGSTER_PIPES_CONTEXT"  # set by Dagster's Pipes clients (dagster_pipes: env var params loader)


class Display(Protocol):
    """Shows one event to whoever watches."""

    def show(self, event: Event) -> None: ...


class Reporter:
    """Writes each event to events.jsonl, to TensorBoard and to the display."""

    def __init__(self, folder: Path, steps: int) -> None:
        self._stack = ExitStack()
        self._log = self._stack.enter_context(EventLog(folder))
        self._board = _tensorboard(folder / "tensorboard")
        self._stack.callback(self._board.close)
        self._display = self._stack.enter_context(_display(steps))

    def event(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Record one event; numbers of steps and diagnostics become curves."""
        event = self._log.write(kind, step, values)
        if kind in ("step", "diagnostics"):
            for name, value in _numbers(event):
                self._board.add_scalar(f"{kind}/{name}", value, step)
        self._display.show(event)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


class Lines:
    """One plain line an event, for logs."""

    def __init__(self, steps: int) -> None:
        self._steps = steps

    def show(self, event: Event) -> None:
        sys.stdout.write(describe(event, self._steps) + "\n")
        sys.stdout.flush()


class Pipes:
    """Events as custom messages, so that the asset sees them while the run goes on, and as log lines in the UI."""

    def __init__(self, context: "PipesContext", steps: int) -> None:
        self._context = context
        self._steps = steps

    def show(self, event: Event) -> None:
        self._context.report_custom_message(event)
        self._context.log.info(describe(event, self._steps))


class Bar:
    """A progress bar at a terminal; events other than steps stand above it."""

    def __init__(self, progress: "Progress", steps: int) -> None:
        self._progress = progress
        self._steps = steps
        self._task = progress.add_task("training", total=steps)

    def show(self, event: Event) -> None:
        if event["kind"] == "step":
            self._progress.update(self._task, completed=event["step"], description=describe(event, self._steps))
        else:
            self._progress.console.print(describe(event, self._steps))


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
def _display(steps: int) -> Iterator[Display]:
    if PIPES_VARIABLE in os.environ:
        from dagster_pipes import open_dagster_pipes

        with open_dagster_pipes() as context:
            yield Pipes(context, steps)
    elif sys.stdout.isatty():
        from rich.progress import Progress

        with Progress() as progress:
            yield Bar(progress, steps)
    else:
        yield Lines(steps)


def _tensorboard(folder: Path) -> "SummaryWriter":
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder))


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
