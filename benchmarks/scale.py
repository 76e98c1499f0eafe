"""Start-up and memory of sampler and loader for trainsets of 10^4 to 10^8 rows: `python -m benchmarks.scale [--quick]`.

Each size is opened in a process of its own, with its imports done: sampler (trainset, order, the first draws and some
far out), then loader (withdrawn rows looked up, plan, reader, the first batch with masks). Row tables are sparse files:
only the rows that are drawn have addresses, of one shard of real clips. Memory is what the process has for itself
(RssAnon), not pages of files. The same command times `import orchestration.definitions` in fresh processes.
"""

import json as jsonlib
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro

from benchmarks.clips import BATCH, BATCH_KEY, FRAMES, TRAINSET, random_clips, training_recipe, write_store
from benchmarks.measure import machine, show, write
from nextvid.train.distributed import Ranks
from nextvid.train.loader import open_loader
from nextvid.trainset.files import RECORD, read_sealed
from nextvid.trainset.mask_plan import grid_of, make_plan, open_mask_plan
from nextvid.trainset.order import Order
from nextvid.trainset.trainset import Trainset
from storage import atomic
from storage.reader import ADDRESS
from storage.records import publish_record
from storage.root import DataRoot
from storage.withdrawn import record_withdrawal

SIZES = (10**4, 10**6, 10**8)  # rows
CLIPS = 256  # one shard
STEPS = 8
WEIGHTS = {"large": 0.7, "middle": 0.2, "small": 0.1}
SHARES = {"large": 0.9, "middle": 0.09, "small": 0.01}  # of the rows
WITHDRAWN = 64  # row ids to look for, each by bisection
FAR = 5 * 10**9  # a draw late in a long run
FLAT, MEMORY_MB = 2.0, 16.0  # our reading of `flat`: largest over smallest in time; megabytes more than the smallest
DEFINITIONS_S = 2.0  # our aim
QUICK_TURNS, TURNS = 2, 5


def main(quick: bool = False, json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None) -> None:
    """Measure, print a table, and with --json write what README.md documents.

    Args:
        quick: 2 turns instead of 5, in under a minute.
        json: file for the results.
    """
    turns = QUICK_TURNS if quick else TURNS
    with tempfile.TemporaryDirectory(prefix="nextvid-scale-") as folder:
        digests = _write(Path(folder))
        found: dict[int, list[dict[str, float]]] = {size: [] for size in SIZES}
        for turn in range(turns):
            for size in SIZES if turn % 2 == 0 else SIZES[::-1]:
                found[size].append(_run(f"from benchmarks.scale import child; child({folder!r}, {digests[size]!r})"))
    definitions = [_run(DEFINITIONS)["seconds"] for _ in range(turns)]
    rows: list[dict[str, Any]] = []
    for size, measured in found.items():
        medians = {key: statistics.median(one[key] for one in measured) for key in measured[0]}
        rows.append({"name": f"{size:.0e} rows", "rows": size, **medians})
    results: dict[str, Any] = {
        "benchmark": "scale",
        "quick": quick,
        "machine": machine(),
        "turns": turns,
        "definitions_s": statistics.median(definitions),
        "rows": rows,
        "targets": _targets(rows, statistics.median(definitions)),
    }
    keys = ("sampler_s", "far_draws_s", "loader_s", "first_batch_s", "memory_mb")
    show("start-up by rows of the trainset", ("", *keys), [[row["name"], *(row[key] for key in keys)] for row in rows])
    for name, target in results["targets"].items():
        print(
            f"{name}: {target['measured']:.2f}, wanted <= {target['at_most']}: {'met' if target['met'] else 'MISSED'}"
        )
    write(json, results)


DEFINITIONS = """
import json, time
began = time.perf_counter()
import orchestration.definitions
print(json.dumps({"seconds": time.perf_counter() - began}))
"""


def child(folder: str, digest: str) -> None:
    """One opening; prints seconds and megabytes as JSON."""
    root, recipe = DataRoot.open(folder), training_recipe(STEPS)
    before_mb, began = _private_mb(), time.perf_counter()
    trainset = Trainset.open(root, digest)
    order = Order(trainset, recipe)
    order.drawn(FRAMES, 0, STEPS * BATCH)
    sampled = time.perf_counter()
    order.drawn(FRAMES, FAR, STEPS * BATCH)
    far = time.perf_counter()
    plan = open_mask_plan(root, recipe.masks, grid_of(recipe.model))
    opening = time.perf_counter()
    with open_loader(root, trainset, recipe, plan, Ranks(0, 1, torch.device("cpu"))) as loader:
        batches = loader.batches(0, threads=2)
        opened = time.perf_counter()
        next(batches)
        read = time.perf_counter()
        memory_mb = _private_mb() - before_mb
    said = {"sampler_s": sampled - began, "far_draws_s": far - sampled, "loader_s": opened - opening}
    print(jsonlib.dumps(said | {"first_batch_s": read - opened, "memory_mb": memory_mb}))


def _write(folder: Path) -> dict[int, str]:
    """A store, and a trainset of each size over it: digests by size."""
    write_store(random_clips(CLIPS), folder)
    root, recipe = DataRoot.open(str(folder)), training_recipe(STEPS)
    make_plan(root, recipe)
    record_withdrawal(root, "0" * 32, [n.to_bytes(16, "big") for n in range(1, WITHDRAWN + 1)])
    original = Trainset.open(root, TRAINSET)
    stored = np.array(original.rows(FRAMES))
    stored["row_id"] = 0  # as in the rest of the sparse table, which must be sorted
    said = read_sealed(f"{root.pointed('trainset', TRAINSET)}/{RECORD}", "write the store again")
    digests = {}
    for size in SIZES:
        counts = {name: int(share * size) for name, share in SHARES.items()}
        firsts = np.cumsum([0, *counts.values()]).tolist()
        offsets = {name: [first, count] for (name, count), first in zip(counts.items(), firsts, strict=False)}
        digests[size] = f"{size:032d}"
        changed = {
            "digest": digests[size],
            "weights": WEIGHTS,
            "batches": [BATCH_KEY],
            "offsets": {f"f{FRAMES}": offsets},
        }
        with atomic.staged_folder(root.pointed("trainset", digests[size])) as staged:
            shape = (sum(counts.values()),)
            np.lib.format.open_memmap(staged / f"rows.f{FRAMES}.npy", "w+", ADDRESS, shape).flush()
            publish_record(str(staged / RECORD), said | changed | {"files": {}})  # checksums would read 3.2 GB
        path = f"{root.pointed('trainset', digests[size])}/rows.f{FRAMES}.npy"
        table = np.load(path, mmap_mode="r+", allow_pickle=False)
        drawn = Order(Trainset.open(root, digests[size]), recipe).drawn(FRAMES, 0, STEPS * BATCH)
        table[drawn.rows] = stored[np.arange(len(drawn)) % CLIPS]
        table.flush()
    return digests


def _run(code: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found: dict[str, float] = jsonlib.loads(done.stdout.splitlines()[-1])
    return found


def _private_mb() -> float:
    """Memory of this process that is no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def _targets(rows: list[dict[str, Any]], definitions_s: float) -> dict[str, Any]:
    smallest, largest = rows[0], rows[-1]
    start = [row["sampler_s"] + row["loader_s"] + row["first_batch_s"] for row in (smallest, largest)]
    found = {
        "start_largest_over_smallest": (start[1] / start[0], FLAT),
        "memory_mb_largest_less_smallest": (max(0.0, largest["memory_mb"] - smallest["memory_mb"]), MEMORY_MB),
        "definitions_s": (definitions_s, DEFINITIONS_S),
    }
    return {
        name: {"measured": measured, "at_most": wanted, "met": measured <= wanted}
        for name, (measured, wanted) in found.items()
    }


if __name__ == "__main__":
    tyro.cli(main)
