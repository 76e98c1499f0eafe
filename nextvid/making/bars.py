"""How far work has come, for whoever typed the command: bars on a terminal, plain lines elsewhere; always on stderr.

Holds the drawing only (rich). What is counted is said by the makers (`Progress`), the numbers of an encode by
nextvid/making/progress.py. Imports no torch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from nextvid.making.outcome import OnCount
from nextvid.making.progress import Lines, OnPace, Pace


@dataclass(frozen=True)
class Shown:
    """What to tell while the block runs."""

    on_pace: OnPace
    on_count: OnCount


@contextmanager
def shown(console: Console | None = None) -> Iterator[Shown]:
    """Show paces and counts while the block runs; where there is no terminal, paces alone."""
    console = console or Console(stderr=True)
    if not console.is_terminal:
        lines = Lines(lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True))
        yield Shown(lines, lambda name, done, total: None)
        return
    with _progress(console) as progress:
        bars = _Bars(progress)
        yield Shown(bars.pace, bars.count)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[said]}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


class _Bars:
    """One bar a name, from when it is first told of until it is full: then the outcome's line says the rest."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def pace(self, pace: Pace) -> None:
        """Rows of a batch that is encoded."""
        rate = f"{pace.rows_per_s:.2f} rows/s, device busy {pace.busy_share:.0%}"
        self._show(f"latents {pace.batch}", pace.done, pace.total, rate)
        if pace.note:
            self._progress.console.print(pace.line(), highlight=False)

    def count(self, name: str, done: int, total: int) -> None:
        """Files, shots or batches of anything else."""
        self._show(name, done, total, "")

    def _show(self, name: str, done: int, total: int, said: str) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, said=said)
        self._progress.update(self._tasks[name], completed=done, total=total, said=said)
        if done >= total:
            self._progress.remove_task(self._tasks.pop(name))
