"""What a maker reports: one vocabulary for Dagster's metadata, the command line and demo.json.

Every function `make_<asset>` of this package returns an `Outcome`. Holds no knowledge of any asset and writes nothing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

Number = int | float | str
Progress = Callable[[int, int], None]  # told how many of how many are done, while a maker works
OnCount = Callable[[str, int, int], None]  # the same of whatever has that name


@dataclass(frozen=True)
class Check:
    """One verdict with the numbers that led to it; a failed blocking check stops what reads this asset."""

    name: str
    passed: bool
    numbers: Mapping[str, Number] = field(default_factory=dict)
    blocking: bool = True
    description: str = ""


@dataclass(frozen=True)
class Outcome:
    """One materialisation. `made` is False where everything was there already and nothing was written."""

    asset: str
    partition: str | None
    made: bool
    rows: int
    size_bytes: int
    seconds: float
    quarantined: int = 0
    digest: str | None = None
    numbers: Mapping[str, Number] = field(default_factory=dict)
    made_from: Mapping[str, str] = field(default_factory=dict)  # digests of what it depends on beside upstream tables
    pictures: Mapping[str, str] = field(default_factory=dict)  # title -> path of a PNG
    checks: tuple[Check, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether no blocking check failed."""
        return all(check.passed for check in self.checks if check.blocking)
