"""`nextvid verify` against plain reading of the same bytes: `python -m benchmarks.verify [--quick] [--json FILE]`.

A store of random latents is checked and, in turns, its files are read from end to end by one thread into a buffer that
is used again, as `cat` does; both with the files in the page cache and with them dropped from it. What is below a
virtual disk may be warm all the same, for both arms alike. The store's own checking only: no trainset, no start-up.
"""

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks.clips import CLIP_BYTES, random_clips, write_store
from benchmarks.measure import evict, machine, median_ratio, show, timed, write
from storage.root import DataRoot
from storage.store import LatentStore

CLIPS, QUICK_CLIPS = 8192, 1024  # 2.1 GB in 32 shards; 268 MB in 4
TURNS, QUICK_TURNS = 5, 3
PIECE_BYTES = 1 << 17  # what coreutils' cat reads at a time
AT_LEAST = 0.9  # our reading of `at disk speed`: of the rate of plain reading, page-cold
ARMS = ("read", "verify")


def main(quick: bool = False, json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None) -> None:
    """Measure, print a table, and with --json write what README.md documents.

    Args:
        quick: 268 MB and 3 turns instead of 2.1 GB and 5, in under a minute.
        json: file for the results.
    """
    clips, turns = (QUICK_CLIPS, QUICK_TURNS) if quick else (CLIPS, TURNS)
    with tempfile.TemporaryDirectory(prefix="nextvid-verify-") as name:
        folder = Path(name)
        write_store(random_clips(clips), folder)
        latents = folder / "latents"
        size_bytes = sum(path.stat().st_size for path in latents.rglob("*") if path.is_file())
        assert size_bytes >= clips * CLIP_BYTES
        work = {"read": lambda: _read(latents), "verify": lambda: _verify(folder)}
        rows = [row for state in ("warm", "cold") for row in _measured(state, work, latents, size_bytes, turns)]
    reached = next(row["of_reading"] for row in rows if row["name"] == "verify, cold")
    target = {"measured": reached, "at_least": AT_LEAST, "met": reached >= AT_LEAST}
    found = {
        "benchmark": "verify",
        "quick": quick,
        "machine": machine(),
        "size_mb": size_bytes / 1e6,
        "turns": turns,
        "rows": rows,
        "targets": {"cold_of_reading": target},
    }
    keys = ("name", "mb_per_s", "cpu_s_per_gb", "of_reading", "still_cached")
    show(f"{size_bytes / 1e9:.2f} GB of latents", keys, [[row[key] for key in keys] for row in rows])
    print(f"cold_of_reading: {reached:.2f}, wanted >= {AT_LEAST}: {'met' if target['met'] else 'MISSED'}")
    write(json, found)


def _measured(
    state: str, work: dict[str, Callable[[], None]], folder: Path, size_bytes: int, turns: int
) -> list[dict[str, Any]]:
    """Both arms in turns, the first of which takes places in pairs of turns."""
    walls, cpus, cached = ({arm: list[float]() for arm in ARMS} for _ in range(3))
    for turn in range(turns):
        for arm in ARMS if turn % 2 == 0 else ARMS[::-1]:
            if state == "cold":
                cached[arm].append(evict(folder))
            else:
                _read(folder)
                cached[arm].append(1.0)
            took = timed(work[arm])
            walls[arm].append(took.wall_s)
            cpus[arm].append(took.cpu_s)
    return [
        {
            "name": f"{arm}, {state}",
            "mb_per_s": size_bytes / 1e6 / statistics.median(walls[arm]),
            "cpu_s_per_gb": statistics.median(cpus[arm]) / (size_bytes / 1e9),
            "of_reading": median_ratio(walls["read"], walls[arm]),
            "still_cached": statistics.median(cached[arm]),
        }
        for arm in ARMS
    ]


def _read(folder: Path) -> None:
    place = bytearray(PIECE_BYTES)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.readinto(place):
                    pass


def _verify(folder: Path) -> None:
    (store,) = LatentStore.every(DataRoot.open(str(folder)))
    assert store.verify() == []


if __name__ == "__main__":
    tyro.cli(main)
