"""How an encode is getting on: rows, rates and how busy the device is. Numbers and their wording; shows nothing itself.

The command line draws a bar from them (nextvid/making/bars.py), the asset writes lines to Dagster's log.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

LOG_EVERY_S = 15.0  # our choice: a line that a person can read before the next one


@dataclass(frozen=True)
class Pace:
    """Where one batch stands. `note` is something to say once, such as a halved batch."""

    batch: str
    done: int  # rows encoded, failed ones too
    total: int
    seconds: float  # since the first row was asked for
    busy_s: float  # of the devices, all together
    devices: int = 1
    note: str = ""

    @property
    def rows_per_s(self) -> float:
        return self.done / self.seconds if self.seconds > 0 else 0.0

    @property
    def busy_share(self) -> float:
        """Share of the time in which a device worked at rows of this batch."""
        return min(1.0, self.busy_s / (self.seconds * self.devices)) if self.seconds > 0 else 0.0

    @property
    def left_s(self) -> float | None:
        """Seconds to go at this pace; None before the first row."""
        return (self.total - self.done) / self.rows_per_s if self.done else None

    def line(self) -> str:
        """For people."""
        if self.note:
            return f"latents {self.batch}: {self.note}"
        left = "" if self.left_s is None else f", {self.left_s:.0f} s to go"
        return (
            f"latents {self.batch}: {self.done} of {self.total} rows, {self.rows_per_s:.2f} rows/s, device busy "
            f"{self.busy_share:.0%}{left}"
        )


OnPace = Callable[[Pace], None]


class Lines:
    """Says a pace as lines: every note, the end, and in between one in LOG_EVERY_S."""

    def __init__(self, say: Callable[[str], None], every_s: float = LOG_EVERY_S) -> None:
        self._say, self._every_s, self._last_s = say, every_s, time.monotonic()

    def __call__(self, pace: Pace) -> None:
        now = time.monotonic()
        if pace.note or pace.done == pace.total or now - self._last_s >= self._every_s:
            self._say(pace.line())
            self._last_s = now if not pace.note else self._last_s
