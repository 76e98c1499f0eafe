"""What a maker returns: counts, digests and checks, as Dagster's metadata, the command line and demo.json show them.

Here too is how the command line words it: a line an outcome, below it what was left out and why, and at the end what a
person should look at.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from nextvid.graph import NON_BLOCKING
from nextvid.plain_text import printable

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

    @property
    def warns(self) -> bool:
        """Whether it failed and stops nothing."""
        return not self.passed and not self.blocking


@dataclass(frozen=True)
class Outcome:
    """What making an asset, or one partition of it, came to. `made` is False where nothing had to be written."""

    asset: str
    partition: str | None
    made: bool
    rows: int
    size_bytes: int
    seconds: float
    rows_made: int | None = None  # by this call; None where it made all of them, or none if not `made`
    quarantined: int = 0
    digest: str | None = None
    run: str | None = None  # id of the run that it is, or is about
    numbers: Mapping[str, Number] = field(default_factory=dict)
    made_from: Mapping[str, str] = field(default_factory=dict)  # digests of what it depends on beside upstream tables
    pictures: Mapping[str, str] = field(default_factory=dict)  # title -> path of a PNG
    checks: tuple[Check, ...] = ()
    unreadable: Mapping[str, str] = field(default_factory=dict)  # of `sources`: dataset left as it was -> why

    @property
    def passed(self) -> bool:
        """Whether no blocking check failed."""
        return all(check.passed for check in self.checks if check.blocking)


# Numbers of an outcome that count what it left out; what that is; the prefix of the numbers that say why.
LEFT_OUT = {
    "rejected": ("rejected", "reason_"),
    "quarantined": ("quarantined", "reason_"),
    "held_out": ("held out of training by their split", None),
    "unlabelled": ("clips without a benchmark's label", "unlabelled_"),
    "ignored": ("files ignored by extension", "ignored_"),
    "labels_without_file": ("labels without a file", "labels_without_file_"),
    "batches_left_out": ("batches", "left_out"),
    "dropped": ("rows dropped", "dropped_"),
}
NAMED = 5  # checks that the last line names; our choice


def line(outcome: Outcome) -> str:
    """One outcome on one line, with lines below it for warnings and for what was left out and why."""
    state = "made" if outcome.made else "not made" if outcome.unreadable and outcome.partition else "up to date"
    bad = f", {outcome.quarantined} quarantined" if outcome.quarantined else ""
    failed = [check for check in outcome.checks if check.blocking and not check.passed]
    verdict = f", failed: {', '.join(check.name for check in failed)}" if failed else ""
    lines = [f"{_name(outcome):38} {state:11} {outcome.rows:>8} rows{bad}  {outcome.seconds:7.1f} s{verdict}"]
    lines += [f"failed: {check.name}: {detail(check)}" for check in failed if detail(check)]
    lines += [f"warning: {check.name}: {detail(check)}" for check in outcome.checks if check.warns]
    lines += [f"left as it was: {why}" for why in outcome.unreadable.values()]
    numbers, parts = outcome.numbers, []
    found = [(f"{numbers[name]} {what}", prefix) for name, (what, prefix) in LEFT_OUT.items() if numbers.get(name)]
    for prefix, group in groupby(found, lambda pair: pair[1]):  # what has the same reasons, as one phrase
        named = {k.removeprefix(prefix): v for k, v in numbers.items() if k.startswith(prefix)} if prefix else {}
        why = [f"{name} {value}".replace("such_as", "such as").strip() for name, value in named.items()]
        parts.append(" and ".join(what for what, _ in group) + (f" ({', '.join(why)})" if why else ""))
    if parts:
        lines.append(f"left out: {'; '.join(parts)}")
    return "\n    ".join(map(printable, lines))


def to_look_at(outcomes: Sequence[Outcome]) -> str:
    """One line with what a person should look at once these were made."""
    checks = [(f"{_name(outcome)}: {check.name}", check) for outcome in outcomes for check in outcome.checks]
    parts = []
    for what, names in (
        ("unreadable dataset", [name for outcome in outcomes for name in outcome.unreadable]),
        ("failed check", [name for name, check in checks if check.blocking and not check.passed]),
        ("warning", [name for name, check in checks if check.warns]),
    ):
        if names:
            more = [f"and {len(names) - NAMED} more"] if len(names) > NAMED else []
            parts.append(f"{len(names)} {what}{'s' if len(names) > 1 else ''} ({', '.join([*names[:NAMED], *more])})")
    counts: Counter[str] = Counter()
    for outcome in outcomes:
        counts.update({f"{LEFT_OUT[n][0]} ({outcome.asset})": int(outcome.numbers.get(n, 0)) for n in LEFT_OUT})
    parts += [f"{count} {what}" for what, count in counts.items() if count]
    return (
        printable(f"to look at: {'; '.join(parts)}")
        if parts
        else "nothing to look at: all checks passed, nothing was left out"
    )


def detail(check: Check) -> str:
    """What a check found."""
    return check.description or ", ".join(f"{name}={value}" for name, value in check.numbers.items())


def _name(outcome: Outcome) -> str:
    return outcome.asset if outcome.partition is None else f"{outcome.asset} {outcome.partition}"
