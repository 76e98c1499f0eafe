"""What the loader's benchmark concludes from its rows: targets and the picture, from rows written by hand."""

import json
from pathlib import Path
from typing import Any

from benchmarks.arms import CONVERSION, DECORD, LOADER
from benchmarks.loader import targets
from benchmarks.picture import best_by_name, main
from benchmarks.sources import MEMMAP, VIEW


def _row(
    name: str, ratio: float, group: str = "host", state: str = "warm", workers: int = 0, **more: float
) -> dict[str, Any]:
    row = {"group": group, "state": state, "workers": workers, "name": name, "clips_per_s": 100.0 / ratio}
    return (
        row | {"ours_over_this": ratio, "cpu_this_over_ours": ratio, "still_cached": 0.0, "cpu_s_per_1000": 1.0} | more
    )


ROWS = [
    _row(LOADER, 1.0, workers=2),
    _row(LOADER, 1.1, workers=0),
    _row(MEMMAP, 1.2),
    _row(VIEW, 0.8),
    _row("Lance", 3.0),
    _row("MDS", 2.5, workers=2),
    _row("MDS", 2.2),
    _row("Lance", 1.4, state="cold"),
    _row("litdata", 0.5, state="cold", still_cached=1.0),
    _row(MEMMAP, 0.93, group="read"),
    _row(CONVERSION, 0.9, group="step"),
    _row("Lance", 1.9, group="step"),
    _row(DECORD, 700.0, group="step", workers=2),
    _row(DECORD, 600.0, group="step"),
]


def test_targets_take_the_best_of_the_others_that_count() -> None:
    found = {name: said["measured"] for name, said in targets(ROWS).items()}
    assert found == {
        "random_read_over_memmap": 0.93,
        "host_warm_over_best_other": 2.2,  # whole files are not in the target's list
        "host_warm_over_best_of_2_workers": 2.5,
        "host_warm_over_whole_file": 0.8,
        "host_cold_over_best_other": 1.4,  # pages of litdata's stayed
        "step_warm_over_best_other": 1.9,
        "decord_cpu_over_ours": 600.0,
    }
    missed = {name for name, said in targets(ROWS).items() if not said["met"]}
    assert missed == {"host_warm_over_whole_file", "step_warm_over_best_other"}


def test_a_run_over_part_of_the_formats_has_part_of_the_targets() -> None:
    assert set(targets([_row(MEMMAP, 0.8, group="read")])) == {"random_read_over_memmap"}


def test_the_picture_shows_each_format_at_its_best(tmp_path: Path) -> None:
    chosen = best_by_name([row for row in ROWS if (row["group"], row["state"]) == ("host", "warm")])
    names = [("Lance", 0), ("MDS", 0), (MEMMAP, 0), (LOADER, 2), (VIEW, 0)]
    assert [(row["name"], row["workers"]) for row in chosen] == names
    pieces = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, rows in zip(pieces, (ROWS[:7], ROWS[7:]), strict=True):
        path.write_text(json.dumps({"rows": rows}))
    main(tmp_path / "out.png", tuple(pieces))
    assert (tmp_path / "out.png").read_bytes()[:4] == b"\x89PNG"
