"""How far making an asset is: bars on a terminal, plain lines elsewhere, always on stderr."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from rich import progress as rich
from rich.console import Console

from nextvid.plain_text import printable

LOG_EVERY_S = 15.0  # our choice: a line that a person can read before the next one


@dataclass(frozen=True)
class Progress:
    """How much of an asset, or of one batch of it, is made. `note` is something to say once, such as a halved batch."""

    name: str  # asset and batch
    done: int  # files, shots, batches or rows; failed ones too
    total: int
    seconds: float = 0.0  # since the first row was asked for; 0 where no rate is measured
    busy_s: float = 0.0  # of the devices, all together
    devices: int = 1
    note: str = ""
    detail: str = ""  # what else is measured, such as losses

    @property
    def rows_per_s(self) -> float:
        """Rows a second since the first was asked for."""
        return self.done / self.seconds if self.seconds > 0 else 0.0

    @property
    def busy_share(self) -> float:
        """Share of the time in which a device worked."""
        return min(1.0, self.busy_s / (self.seconds * self.devices)) if self.seconds > 0 else 0.0

    @property
    def rate(self) -> str:
        """What is measured, in words; empty where nothing is."""
        return f"{self.rows_per_s:.2f} rows/s, device busy {self.busy_share:.0%}" if self.seconds > 0 else ""

    def line(self, per_s: float = 0.0) -> str:
        """One line for a log; `per_s` is the rate where none is measured here."""
        if self.note:
            return f"{self.name}: {self.note}"
        line = f"{self.name}: {self.done} of {self.total}" + (f", {self.detail}" if self.detail else "")
        if not self.rate:
            left = f", {per_s:.3g}/s, {(self.total - self.done) / per_s:.0f} s to go" if per_s else ""
            return line + left
        left = f", {(self.total - self.done) / self.rows_per_s:.0f} s to go" if self.done else ""
        return f"{line} rows, {self.rate}{left}"


OnProgress = Callable[[Progress], None]


def silent(_: Progress) -> None:
    """Show nothing."""


def noting(on_progress: OnProgress, name: str) -> Callable[[str], None]:
    """A function that reports a line as a note about the asset of this name."""
    return lambda line: on_progress(Progress(name, 0, 0, note=line))


class Pace:
    """Rates by name, for what measures none itself: since it was first told of."""

    def __init__(self) -> None:
        self._first: dict[str, tuple[float, int]] = {}

    def per_s(self, progress: Progress) -> float:
        """How many a second; 0 until there is something to count."""
        now = time.monotonic()
        began, before = self._first.setdefault(progress.name, (now, progress.done))
        return (progress.done - before) / (now - began) if now > began else 0.0


class Lines:
    """Writes progress as lines: every note, the end of what has a rate, and between them one a name in LOG_EVERY_S."""

    def __init__(self, write: Callable[[str], None], every_s: float = LOG_EVERY_S) -> None:
        self._write, self._every_s, self._newest_s = write, every_s, time.monotonic()
        self._pace = Pace()
        self._last_s: dict[str, float] = {}  # by name: batches that are made at once have a line each

    def __call__(self, progress: Progress) -> None:
        now, per_s = time.monotonic(), self._pace.per_s(progress)
        ended = bool(progress.rate) and progress.done == progress.total
        if progress.note or ended or now - self._last_s.setdefault(progress.name, self._newest_s) >= self._every_s:
            self._write(printable(progress.line(per_s)))
            if not progress.note:
                self._last_s[progress.name] = self._newest_s = now


SHOWING: ContextVar[OnProgress] = ContextVar(
    "showing", default=silent
)  # what `shown` shows now, for Dagster's steps here


@contextmanager
def shown(console: Console | None = None) -> Iterator[OnProgress]:
    """Show what is reported while the block runs: a bar for each name until it is full, or lines without a terminal."""
    with _shown(console or Console(stderr=True)) as on_progress:
        before = SHOWING.set(on_progress)
        try:
            yield on_progress
        finally:
            SHOWING.reset(before)


@contextmanager
def _shown(console: Console) -> Iterator[OnProgress]:
    if not console.is_terminal:
        yield Lines(lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True))
        return
    names, rates = (rich.TextColumn(f"{{task.{field}}}", markup=False) for field in ("description", "fields[rate]"))
    columns = (names, rich.BarColumn(), rich.MofNCompleteColumn(), rates)
    with rich.Progress(*columns, rich.TimeRemainingColumn(), console=console, transient=True) as bars:
        tasks: dict[str, rich.TaskID] = {}
        pace = Pace()

        def show(progress: Progress) -> None:
            name = progress.name
            if name not in tasks:
                tasks[name] = bars.add_task(printable(name), rate="")
            rate = progress.rate or (f"{per_s:.3g}/s" if (per_s := pace.per_s(progress)) else "")
            words = printable(", ".join(part for part in (progress.detail, rate) if part))
            bars.update(tasks[name], completed=progress.done, total=progress.total, rate=words)
            if progress.note:
                bars.console.print(printable(progress.line()), highlight=False, markup=False)
            if progress.done >= progress.total:
                bars.remove_task(tasks.pop(name))  # the line of the outcome follows

        yield show
