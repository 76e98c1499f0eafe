"""`make faults`: try every promise about crashes, damage and hostile input, and write docs/reliability.md.

A promise is a line below and the tests that try it. A test is one try; one that tries more, such as 200 kills, records
the property `tries`, and of a property test each example is one. NEXTVID_TRIES sets the number of kills at random
moments (200 by default), HYPOTHESIS_PROFILE=thorough the examples. What fails is counted, what is skipped is named.
"""

import argparse
import os
import platform
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pytest

from storage.atomic import publish_bytes

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reliability.md"
EXAMPLES = re.compile(r"(\d+) passing examples")  # hypothesis' own statistics
S, N = "tests/storage", "tests/nextvid"


@dataclass(frozen=True)
class Promise:
    """What is promised, how it is tried, and by which tests (files, or functions in them)."""

    text: str
    how: str
    tests: tuple[str, ...]

    def has(self, name: str) -> bool:
        """Whether a test of pytest is one of these."""
        return any(name == test or name.startswith((f"{test}::", f"{test}[", f"{test}/")) for test in self.tests)


PROMISES = (
    Promise(
        "A kill at any moment of writing or encoding loses no committed row; asking again gives the same bytes",
        "SIGKILL at random moments and at each step of a commit; a disk that is full or broken at each call",
        (f"{S}/test_crashes.py", f"{N}/encode/test_killed.py", f"{N}/encode/test_killed_anywhere.py"),
    ),
    Promise(
        "The store does what a dictionary of arrays would",
        "random sequences of plan, write, crash, verify, withdraw, sweep (hypothesis)",
        (f"{S}/test_store_machine.py",),
    ),
    Promise(
        "Two makers at once, with sweep, withdrawal and verify beside them, commit each row once",
        "processes started together on one part, one batch, one root",
        (
            f"{S}/test_crashes.py::test_two_writers_on_one_part",
            f"{S}/test_crashes.py::test_two_writers_on_different_shards",
            f"{N}/encode/test_processes.py",
            f"{N}/encode/test_makers_at_once.py",
            "tests/orchestration/test_new_sources.py::test_two_instances_on_one_root_make_each_row_once",
        ),
    ),
    Promise(
        "A changed byte of what is stored is found, named with its remedy, and never used",
        "a bit flipped, files cut, zeroed, removed and exchanged, in each kind of file",
        (
            f"{S}/test_verify.py",
            f"{S}/test_damage.py",
            f"{S}/test_seal.py",
            f"{N}/lineage/test_verify.py",
            f"{N}/test_rot.py",
        ),
    ),
    Promise(
        "The order of samples and masks is the same for any number of ranks, threads and resumptions",
        "all cuts of the draws, ranks and threads, against the order written out",
        (
            f"{S}/test_draws.py",
            f"{N}/trainset/test_order.py",
            f"{N}/train/test_loader.py",
            f"{N}/train/test_batches.py",
            f"{N}/train/test_distributed.py",
            f"{N}/train/test_blocks.py",
        ),
    ),
    Promise(
        "A training that is killed and resumed ends with the bits of one that never stopped",
        "SIGKILL between and within checkpoints; torn, damaged and foreign checkpoints",
        (f"{N}/train/test_loop.py", f"{N}/train/test_checkpoint.py", f"{N}/evaluate/test_probes.py"),
    ),
    Promise(
        "A change of configuration encodes again what it affects, and nothing else",
        "each field alone, against the rows that must change; pinned digests",
        (f"{N}/corpus/test_reencode.py", f"{N}/encode/test_golden.py", f"{N}/planning/test_versions.py"),
    ),
    Promise(
        "A hostile or broken media file ends as a row with a reason, within its limits",
        "crashes, hangs, memory, open files, damaged and lying files",
        (f"{N}/video/test_sandbox.py", f"{N}/video/test_damage.py", f"{N}/corpus/test_bad_input.py"),
    ),
    Promise(
        "Nothing that a file says is executed, and no name leaves the data root",
        "syntax trees of all packages; hostile checkpoints, tables, names and configurations",
        ("tests/test_safety.py", "tests/hostile", f"{S}/test_root.py"),
    ),
    Promise(
        "Dagster retries crashes alone; a stopped step ends what it started; older formats are read",
        "steps that raise, are killed or cancelled; files of release 0.1.0",
        ("tests/assets/test_launcher.py", "tests/assets/test_reporting.py", f"{N}/test_released_formats.py"),
    ),
    Promise(
        "A limit of the machine is one line with what to do; nothing is lost",
        "real full and read-only disks, open files, memory; Ctrl-C and SIGTERM of each command",
        (f"{S}/test_limits.py", f"{S}/test_read_only.py", f"{N}/test_stopping.py", f"{N}/test_stopped_commands.py"),
    ),
    Promise(
        "An object store that refuses, lies, stalls or loses answers costs time or ends in one line",
        "an S3 server (moto) and stand-ins that answer 403, 404, 503, cut, stalled and twice",
        (f"{S}/test_remote.py", f"{S}/test_remote_reader.py", "tests/services/s3/test_s3_store.py"),
    ),
    Promise(
        "A clock that jumps a day forward or back changes no result",
        "the clock of the process and times of files, in each maker",
        (
            f"{N}/test_clocks.py",
            "tests/orchestration/test_new_sources.py::test_a_clock_that_jumps_back_repeats_no_run_and_loses_none",
        ),
    ),
    Promise(
        "A machine of several that is lost ends the others with one line, and the same command resumes",
        "hosts in network namespaces that are killed, unplugged and absent; jobs of Slurm and Ray",
        (
            f"{N}/train/test_nodes.py",
            f"{N}/train/test_job.py",
            f"{N}/train/test_pretrain.py",
            "tests/services/test_scaling.py",
        ),
    ),
    Promise(
        "Features are computed once, however often the command is killed",
        "SIGKILL while parts are kept; two processes against one",
        (f"{N}/features/test_features.py", f"{N}/evaluate/test_finetune.py"),
    ),
    Promise(
        "Each mistake that the method's traps warn of fails a test",
        "the mistakes, made one by one in a copy of the sources",
        ("tests/test_mutations.py",),
    ),
)


@dataclass
class Tried:
    """What the tests of one promise came to."""

    tries: int = 0
    failed: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0


class Recorder:
    """A pytest plugin that counts tries and failures by test.

    After `minutes` no test begins; until then each promise has an equal share, and what those before it left over.
    """

    def __init__(self, minutes: float | None = None) -> None:
        self.by_test: dict[str, Tried] = {}
        self._minutes = minutes
        self._began: float | None = None

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Skip what would begin too late."""
        self._began = self._began or time.monotonic()
        if self._minutes is not None:
            first = next(number for number, promise in enumerate(PROMISES, 1) if promise.has(item.nodeid))
            if time.monotonic() - self._began > 60 * self._minutes * first / len(PROMISES):
                pytest.skip(f"its share of {self._minutes:g} minutes was over")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One phase of one test has ended."""
        found = self.by_test.setdefault(report.nodeid, Tried())
        found.seconds += report.duration
        if report.failed:
            found.failed.append(report.nodeid)
        elif report.skipped and isinstance(report.longrepr, tuple):
            found.skipped[str(report.longrepr[2]).removeprefix("Skipped: ")] += 1
        if report.when != "call" or report.skipped:
            return
        examples = sum(map(int, EXAMPLES.findall(str(getattr(report, "_hypothesis_stats", "")))))
        recorded = [int(str(value)) for name, value in report.user_properties if name == "tries"]
        found.tries += sum(recorded) or examples or 1

    def of(self, promise: Promise) -> Tried:
        """The sum over the tests of a promise."""
        whole = Tried()
        for name, one in self.by_test.items():
            if promise.has(name):
                whole.tries += one.tries
                whole.failed += one.failed
                whole.skipped += one.skipped
                whole.seconds += one.seconds
        return whole


def page(recorder: Recorder, seconds: float) -> str:
    """docs/reliability.md."""
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    lines = [
        "# Reliability",
        "",
        "What is promised, how it was tried, how often, and what was lost. `make faults` writes this page",
        "(`tests/reliability.py`); no number in it is written by hand.",
        "",
        f"Tried on {datetime.now(UTC):%d %B %Y} in {seconds / 60:.0f} minutes on {os.cpu_count()}",
        f"cores and {memory_gb:.0f} GB (Linux {platform.release()}, Python {platform.python_version()}).",
        "",
        "| promise | tried by | tries | lost |",
        "|---|---|---|---|",
    ]
    notes: Counter[str] = Counter()
    for promise in PROMISES:
        found = recorder.of(promise)
        lost = f"**{len(set(found.failed))} tests failed**" if found.failed else "nothing"
        lines.append(f"| {promise.text} | {promise.how} | {found.tries:,} | {lost if found.tries else 'not tried'} |")
        notes += found.skipped
    failed = sorted({name for one in recorder.by_test.values() for name in one.failed})
    lines += ["", *(["Failed: " + ", ".join(f"`{name}`" for name in failed) + ".", ""] if failed else [])]
    if notes:
        lines += ["Not tried there:", ""]
        lines += [f"- {count} {'test' if count == 1 else 'tests'}: {why}" for why, count in sorted(notes.items())]
        lines.append("")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Run the tests and write the page; the exit code of pytest."""
    parser = argparse.ArgumentParser(description="Try every promise and write docs/reliability.md.")
    parser.add_argument("--out", type=Path, default=PAGE)
    parser.add_argument("--without", default="", help="words of tests that are left out, as of pytest's -k")
    parser.add_argument("--minutes", type=float, help="begin no test after so many; by default all are run")
    asked = parser.parse_args(arguments)
    paths = list(dict.fromkeys(test for promise in PROMISES for test in promise.tests))
    whole = [path for path in paths if path.partition("::")[0] not in paths or "::" not in path]
    here = [path for path in whole if Path(path.partition("::")[0]).exists()]
    recorder, began = Recorder(asked.minutes), time.monotonic()
    chosen = ["-k", f"not ({asked.without})"] if asked.without else []
    marked = ["-m", "not benchmarks and not fresh", "--hypothesis-show-statistics"]
    code = pytest.main(["-q", "-n", "0", "-p", "no:cacheprovider", *marked, *chosen, *here], plugins=[recorder])
    publish_bytes(str(asked.out), page(recorder, time.monotonic() - began).encode())
    sys.stdout.write(f"{asked.out}\n")
    return int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
