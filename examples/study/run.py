"""`make study`: the runs of tables.py that have no result yet, most valuable first, then the page of all results.

    python -m examples.study.run [--quick] [--root data/study] [--results examples/study/results] [--page docs]

Each run is one result file, so the command can be killed at any moment and goes on when it is called again, here or on
another machine: results are kept in the repository. A run is made again where its file was removed. Workers are
processes of one thread that end with the command. `--page` names the folder of study.md and study.png; data sets whose
media are not here are left out and named.
"""

import argparse
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path

from examples.study.page import write_page
from examples.study.projects import available, make_project
from examples.study.runs import carry_out, result_file
from examples.study.tables import FULL, QUICK, TABLES, Cell, Size, cells
from nextvid.machine import die_with
from nextvid.stopping import stoppable


def main(given: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Run the study and write its page.")
    parser.add_argument("--quick", action="store_true", help="every part at the smallest size; scores mean nothing")
    parser.add_argument("--root", type=Path, help="folder of data")
    parser.add_argument("--results", type=Path, help="folder of results")
    parser.add_argument("--page", type=Path, help="folder of study.md and study.png")
    parser.add_argument("--workers", type=int, default=2, help="runs at once, a thread each")
    parser.add_argument("--table", choices=sorted(TABLES), action="append", help="only these tables")
    parser.add_argument("--page-only", action="store_true", help="run nothing: write the page of what there is")
    asked = parser.parse_args(given)
    size = QUICK if asked.quick else FULL
    root = (asked.root or Path("data/study_quick" if asked.quick else "data/study")).resolve()
    results = (asked.results or (root / "results" if asked.quick else Path(__file__).with_name("results"))).resolve()
    page = asked.page or (root if asked.quick else Path("docs"))
    tables = {name: TABLES[name] for name in asked.table or TABLES}
    wanted = [cell for cell in cells(size, tables) if available(cell.data)]
    if gone := sorted({cell.data for cell in cells(size, tables)} - {cell.data for cell in wanted}):
        print(f"left out, since their media are not here: {', '.join(gone)}; NEXTVID_REALDATA names their folder")
    try:
        if not asked.page_only:
            run_all(root, results, wanted, size, asked.workers)
    finally:
        write_page(results, page, size)
    print(f"page {page / 'study.md'}")


def run_all(root: Path, results: Path, wanted: Sequence[Cell], size: Size, workers: int) -> None:
    """Make the runs that have no result, data set by data set in their order; print a line for each."""
    left = [cell for cell in wanted if not result_file(results, cell, size).is_file()]
    print(f"{len(wanted) - len(left)} of {len(wanted)} runs are there", flush=True)
    with ProcessPoolExecutor(workers, get_context("spawn"), _begin, (os.getpid(),)) as pool:
        while left:
            data, following = next(groupby(left, lambda cell: cell.data))
            together = list(following)
            began = time.monotonic()
            make_project(root, data, size)
            print(f"{data}: clips to trainset {time.monotonic() - began:.0f} s", flush=True)
            running = {pool.submit(carry_out, root, results, cell, size): cell for cell in together}
            for done in as_completed(running):
                cell, result = running[done], done.result()
                right = ", ".join(f"{name} {found['accuracy']:.3f}" for name, found in result["scores"].items())
                print(f"{cell.data:12} {cell.arm:12} {cell.seed} {right}  {result['cpu_s']:.0f} cpu-s", flush=True)
            left = left[len(together) :]


def _begin(parent: int) -> None:
    """A worker's start: one thread, and an end with the command."""
    die_with(parent)
    import torch

    torch.set_num_threads(1)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    stoppable("results are kept: `make study` goes on from there")
    main()
