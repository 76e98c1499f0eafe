"""What a maker returns: counts, digests and checks, as Dagster's metadata, the command line and demo.json show them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from nextvid.graph import NON_BLOCKING

Number = int | float | str


@dataclass(frozen=True)
class Check:
    """The result of one check and its numbers; a blocking one that failed stops what reads this asset."""

    name: str
    passed: bool
    numbers: Mapping[str, Number] = field(default_factory=dict)
    blocking: bool = field(init=False)  # whether its failure does: graph.py says it of each name
    description: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocking", self.name not in NON_BLOCKING)


@dataclass(frozen=True)
class Outcome:
    """What making an asset, or one partition of it, came to. `made` is False where nothing had to be written."""

    asset: str
    partition: str | None
    made: bool
    rows: int
    size_bytes: int
    seconds: float
    quarantined: int = 0
    digest: str | None = None
    run: str | None = None  # id of the run that it is, or is about
    numbers: Mapping[str, Number] = field(default_factory=dict)
    made_from: Mapping[str, str] = field(default_factory=dict)  # digests of what it depends on beside upstream tables
    pictures: Mapping[str, str] = field(default_factory=dict)  # title -> path of a PNG
    checks: tuple[Check, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether no blocking check failed."""
        return all(check.passed for check in self.checks if check.blocking)
