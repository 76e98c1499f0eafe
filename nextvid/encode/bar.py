"""The pace of an encode for whoever typed the command: a bar on a terminal, plain lines elsewhere; always on stderr.

Holds the drawing only (rich); the numbers are pace.py's. Imports no torch.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from nextvid.encode.pace import Lines, OnPace, Pace


@contextmanager
def shown(console: Console | None = None) -> Iterator[OnPace]:
    """Give a function that shows a pace while the block runs."""
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield Lines(lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True))
        return
    with _progress(console) as progress:
        yield _Bars(progress)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("latents {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rows_per_s]:.2f} rows/s, device busy {task.fields[busy_share]:.0%}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,  # what remains is the outcome's line
    )


class _Bars:
    """One bar a batch, made when its first pace comes."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, pace: Pace) -> None:
        if pace.batch not in self._tasks:
            self._tasks[pace.batch] = self._progress.add_task(pace.batch, rows_per_s=0.0, busy_share=0.0)
        self._progress.update(
            self._tasks[pace.batch],
            completed=pace.done,
            total=pace.total,
            rows_per_s=pace.rows_per_s,
            busy_share=pace.busy_share,
        )
        if pace.note:
            self._progress.console.print(pace.line(), highlight=False)
