"""How far pretraining and probe training overlap with what probes are tested on: the table that the report prints.

Counted before anything is dropped, so that it says what would have leaked. Holds no search and no rule (duplicates.py).
"""

from typing import Any

import polars as pl

FILE = pl.struct("batch", "media_id")


def contamination(shots: pl.DataFrame, found: pl.DataFrame) -> list[dict[str, Any]]:
    """One entry a benchmark, sorted by name.

    `shots` has every shot, `found` those in groups, with columns batch, media_id, dataset, group, split, pretrain,
    benchmarks, dropped_from. Counts are of files, except `dropped_*`, which are of shots.
    """
    names = sorted(set(shots["benchmarks"].explode(keep_nulls=False, empty_as_null=False)))
    return [_entry(name, shots, found) for name in names]


def _entry(name: str, shots: pl.DataFrame, found: pl.DataFrame) -> dict[str, Any]:
    mine = pl.col("benchmarks").list.contains(name)
    test, train = mine & (pl.col("split") == "test"), mine & (pl.col("split") == "train")
    near = found.filter(test.any().over("group"))
    leaks = near.filter(pl.col("reason") == "test_duplicate")
    leaked = near.filter((pl.col("pretrain") & (pl.col("split") != "test")).any().over("group"))
    pretrained = leaks.filter(pl.col("dropped_from").list.contains("pretrain"))
    by_dataset = pretrained.group_by("dataset").len().sort("dataset")
    return {
        "benchmark": name,
        "test_files": _files(shots.filter(test)),
        "test_files_seen_in_pretraining": _files(leaked.filter(test)),
        "dropped_from_pretrain_shots": {dataset: int(n) for dataset, n in by_dataset.iter_rows()},
        "dropped_from_probe_train_shots": leaks.filter(pl.col("dropped_from").list.contains("probe_train")).height,
        "train_files": _files(shots.filter(train)),
        "train_files_in_pretraining": _files(shots.filter(train & pl.col("pretrain"))),
    }


def _files(rows: pl.DataFrame) -> int:
    return rows.select(FILE).n_unique() if rows.height else 0
