"""The asset `duplicates`: groups of shots that look alike across all batches, and what each shot is left out of.

Shots are in one group if their files are copies or their perceptual hashes are near; a group has several files. No row
moves to another split. Where a group has a probe's test shot, its other shots leave pretraining and probe training; of
other groups, pretraining keeps one file of each dataset. `trainset` leaves out what `dropped_from` names.

`contamination` counts what would have leaked, before anything is dropped: the report prints it.

The search for near hashes (256-bit PDQ) is exact: with 16 bands of 16 bits, two hashes at most 31 bits apart agree in
some band up to one bit (31 < 2 x 16), so looking up each band and its 16 one-bit neighbours finds every pair. Bands are
searched by threads. Flat frames hash to noise: those below a quality floor are in no pair.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Int64, UInt8
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from nextvid.config.project import Project
from nextvid.graph import GRAPH
from nextvid.machine import memory_bytes, taken_cores
from nextvid.making.batches import batch_state
from nextvid.making.outcome import Check, Outcome
from nextvid.making.progress import OnProgress, Progress, silent
from nextvid.making.publishing import addressed, publish_latest
from storage import atomic, tables
from storage.digest import digest, digest_bytes
from storage.errors import ConfigError, UpstreamError
from storage.records import publish_record
from storage.schemas import Clips, Duplicates, Shots

LARGEST_GROUP = 1000  # files, our choice: in a larger group a threshold is wrong or a title card joins unlike videos
HASH_BYTES = 32  # PDQ: 256 bits
BANDS = 16
MAX_DISTANCE = 2 * BANDS - 1  # up to here the search is exact
CHUNK = 1 << 22  # candidate pairs compared at once by all threads: 4 M x 32 bytes
BAND_BYTES = 32  # our measurement: what a thread holds of each hash, sorted, beside its candidates
HASHES_A_THREAD = 5_000  # our choice: below it a search takes less than a second
FILE = pl.struct("batch", "media_id")


def make_duplicates(project: Project, on_progress: OnProgress = silent) -> Outcome:
    """Search all batches whose shots and clips passed their checks; publish table, contamination and checks.

    The same batches are not searched again with the same thresholds. `latest.json` points only to a table that passed.
    Raises UpstreamError where no batch is ready.
    """
    started_s = time.perf_counter()
    root, config = project.root, project.corpus.curation.duplicates
    batches = [batch for batch in root.batches("clips") if batch_state(root, batch, "shots", "clips").usable]
    if not batches:
        raise UpstreamError("no batch has shots and clips that passed their checks: make 'clips' first")
    inputs = {
        batch: [digest_bytes(atomic.read_bytes(root.table(noun, batch))) for noun in ("shots", "clips")]
        for batch in batches
    }
    rules = {"distance": config.distance, "quality": config.quality_min}
    key = digest({"version": GRAPH["duplicates"].version, **rules, "inputs": inputs})
    with addressed(root, "duplicates", key) as made:
        if made.new:
            shots = _members(project, batches, on_progress)
            found = _judged(shots, _grouped(shots, project, on_progress))
            table = found.select(Duplicates.column_names()).sort("group", "batch", "shot_id")
            tables.write_table(f"{made.path}/duplicates.parquet", table, Duplicates)
            facts = {"batches": batches, "inputs": inputs, "shots": shots.height}
            facts["contamination"] = contamination(shots, found)
            publish_record(f"{made.path}/duplicates.json", facts)
            largest = max(table.group_by("group").agg(FILE.n_unique().alias("files"))["files"], default=0)
            sizes = {"largest_files": largest, "limit_files": LARGEST_GROUP}
            made.checks = (Check("groups_are_small", largest <= LARGEST_GROUP, sizes),)
    if made.passed:
        publish_latest(root, "duplicates", key)
    table = tables.read_table(f"{root.pointed('duplicates', key)}/duplicates.parquet", Duplicates)
    dropped = table.explode("dropped_from").group_by("dropped_from", "reason").len().drop_nulls()
    numbers = {"batches": len(batches), "groups": table["group"].n_unique(), "files": _files(table)}
    numbers |= {f"dropped_from_{use}_{reason}": int(n) for use, reason, n in sorted(dropped.iter_rows())}
    return Outcome(
        asset="duplicates",
        partition=None,
        made=made.new,
        rows=table.height,
        size_bytes=int(table.estimated_size()),
        seconds=time.perf_counter() - started_s,
        digest=key,
        numbers=numbers,
        checks=made.checks,
    )


def _members(project: Project, batches: Sequence[str], on_progress: OnProgress) -> pl.DataFrame:
    """One row for each ok shot and batch: ids, hashes, and what its clips are used for.

    A clip of a whole file may show any of its shots: a benchmark that cuts files uses all shots of a file.
    """
    frames = []
    whole = [name for name, b in project.corpus.benchmarks.items() if b.policy.cut_from == "file"]
    for number, batch in enumerate(batches, 1):
        shots = tables.read_table(project.root.table("shots", batch), Shots).filter(pl.col("status") == "ok")
        clips = tables.read_table(project.root.table("clips", batch), Clips)
        used = pl.col("uses").filter(pl.col("status") == "ok").list.explode(keep_nulls=False, empty_as_null=False)
        of_file = clips.group_by("media_id").agg(used.filter(used.is_in(whole)).unique().alias("of_file"))
        uses = clips.group_by("shot_id").agg(
            pl.col("media_id", "split").first(),
            (used == "pretrain").any().alias("pretrain"),
            used.filter(used != "pretrain").alias("benchmarks"),
        )
        uses = uses.join(of_file, on="media_id").with_columns(
            benchmarks=pl.concat_list("benchmarks", "of_file").list.unique().list.sort()
        )
        frames.append(shots.select(_SHOT_COLUMNS).join(uses.drop("media_id", "of_file"), on="shot_id", how="inner"))
        on_progress(Progress("duplicates", number, len(batches)))
    shots = pl.concat(frames).sort("batch", "shot_id").with_row_index("member")
    return shots.with_columns(pl.col("member").cast(pl.Int64))


_SHOT_COLUMNS = (
    *("shot_id", "media_id", "dataset", "batch", "hashes", "hash_quality"),
    *("start_us", "end_us", "crop_w", "crop_h"),
)


def _grouped(shots: pl.DataFrame, project: Project, on_progress: OnProgress) -> pl.DataFrame:
    """Members that share their group with another file's: columns member, group (from 0, by first member).

    Members with one shot id are of the same file in several batches.
    """
    pairs = shots.select(pl.col("member").min().over("shot_id").alias("first"), "member")
    copies = pairs.filter(pl.col("first") != pl.col("member")).to_numpy().astype(np.int64).reshape(-1, 2)
    joined = groups(shots.height, np.concatenate([copies, _look_alikes(shots, project, on_progress)]))
    grouped = shots.select("member", "batch", "media_id").with_columns(group=pl.Series(joined, dtype=pl.Int64))
    several = grouped.filter(FILE.n_unique().over("group") > 1)
    return several.select("member", (pl.col("group").rank("dense") - 1).cast(pl.Int64).alias("group"))


def _look_alikes(shots: pl.DataFrame, project: Project, on_progress: OnProgress) -> np.ndarray:
    """Pairs of members with near hashes; pairs within one file too, since they link what either looks like."""
    hashed = shots.select("member", "hashes", "hash_quality").explode("hashes", "hash_quality").drop_nulls()
    if hashed.is_empty():
        return np.empty((0, 2), np.int64)
    bits = np.frombuffer(b"".join(hashed["hashes"]), np.uint8).reshape(hashed.height, -1)
    quality, config = hashed["hash_quality"].to_numpy().astype(np.int64), project.corpus.curation.duplicates
    room = memory_bytes() // 2 // (BAND_BYTES * len(bits))
    with taken_cores(max(1, min(BANDS, len(bits) // HASHES_A_THREAD, room)), project.corpus.execution.cores) as threads:
        near = near_pairs(
            bits,
            config.distance,
            quality,
            config.quality_min,
            threads,
            lambda done: on_progress(Progress("duplicates hashes", done, BANDS)),
        )
    return np.unique(hashed["member"].to_numpy()[near], axis=0).reshape(-1, 2)


def _judged(shots: pl.DataFrame, grouped: pl.DataFrame) -> pl.DataFrame:
    """Rows of Duplicates: what each member of a group is left out of, and why."""
    rows = shots.join(grouped, on="member").drop("hashes", "hash_quality")
    tested = (pl.col("split") == "test") & (pl.col("benchmarks").list.len() > 0)
    trains = (pl.col("split") == "train") & (pl.col("benchmarks").list.len() > 0)
    rows = rows.with_columns(tested.any().over("group").alias("touched"), trains.alias("trains"))
    rows = rows.join(_kept(rows.filter(pl.col("pretrain") & ~pl.col("touched"))), on="member", how="left")
    leaks = pl.col("touched") & (pl.col("split") != "test") & (pl.col("pretrain") | pl.col("trains"))
    copy = pl.col("pretrain") & ~pl.col("touched") & ~pl.col("kept").fill_null(False)
    nowhere = pl.lit([], pl.List(pl.String))
    from_pretrain = pl.when(pl.col("pretrain") & (leaks | copy)).then(pl.lit(["pretrain"])).otherwise(nowhere)
    from_probes = pl.when(leaks & pl.col("trains")).then(pl.lit(["probe_train"])).otherwise(nowhere)
    return rows.with_columns(
        pl.concat_list(from_pretrain, from_probes).alias("dropped_from"),
        pl.when(leaks).then(pl.lit("test_duplicate")).when(copy).then(pl.lit("copy")).alias("reason"),
    )


def _kept(candidates: pl.DataFrame) -> pl.DataFrame:
    """Members of the one file that pretraining keeps of each group and dataset: largest, longest, first."""
    files = candidates.group_by("group", "dataset", "batch", "media_id").agg(
        (pl.col("crop_w").cast(pl.Int64) * pl.col("crop_h")).max().alias("pixels"),
        (pl.col("end_us") - pl.col("start_us")).sum().alias("length_us"),
    )
    order = ["group", "dataset", "pixels", "length_us", "batch", "media_id"]
    ranked = files.sort(order, descending=[name in ("pixels", "length_us") for name in order])
    best = ranked.unique(["group", "dataset"], keep="first", maintain_order=True)
    kept = candidates.join(best.select("group", "batch", "media_id"), on=["group", "batch", "media_id"], how="semi")
    return kept.select("member", kept=pl.lit(True))


def contamination(shots: pl.DataFrame, found: pl.DataFrame) -> list[dict[str, Any]]:
    """One entry for each benchmark, sorted by name.

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


def near_pairs(
    hashes: UInt8[np.ndarray, "N 32"],
    distance: int,
    quality: Int64[np.ndarray, "N"] | None = None,
    quality_min: int = 0,
    threads: int = 1,
    on_band: Callable[[int], None] = lambda _: None,
) -> Int64[np.ndarray, "M 2"]:
    """Pairs (i, j), i < j, of hashes at most `distance` bits apart, sorted, each once.

    On so many threads; `on_band` is told how many of the 16 bands were searched.

    Equal hashes are paired with the first of them only, and only the first is compared with others: the groups are the
    same, and a still picture of an hour does not make millions of pairs. Raises ConfigError above 31 bits.
    """
    if not 0 <= distance <= MAX_DISTANCE:
        raise ConfigError(f"duplicates.distance is {distance}; the search is exact from 0 to {MAX_DISTANCE} bits")
    assert hashes.shape == (len(hashes), HASH_BYTES), "hashes are [N, 32] bytes"
    usable = np.arange(len(hashes)) if quality is None else np.flatnonzero(quality >= quality_min)
    words = np.ascontiguousarray(hashes[usable])
    if len(words) < 2:
        return np.empty((0, 2), np.int64)
    rows = words.view(f"V{HASH_BYTES}").ravel()
    _, first, inverse = np.unique(rows, return_index=True, return_inverse=True)
    every = np.arange(len(words))
    copies = np.stack([first[inverse], every], axis=1)[first[inverse] != every]
    near = first[_distinct_pairs(words[first], distance, threads, on_band)]
    pairs = usable[np.sort(np.concatenate([copies, near]), axis=1)].astype(np.int64)
    ordered: Int64[np.ndarray, "M 2"] = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    return ordered


def groups(n: int, pairs: Int64[np.ndarray, "M 2"]) -> Int64[np.ndarray, "n"]:
    """For each of n items the smallest member of its group: the connected components of `pairs`."""
    graph = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(n, n))
    _, component = connected_components(graph, directed=False)
    _, first, inverse = np.unique(component, return_index=True, return_inverse=True)
    smallest: Int64[np.ndarray, n] = first[inverse]
    return smallest


def _distinct_pairs(
    words: UInt8[np.ndarray, "n 32"], distance: int, threads: int, on_band: Callable[[int], None]
) -> Int64[np.ndarray, "M 2"]:
    """Pairs of positions among distinct hashes."""
    bits = words.view(np.uint64)
    bands = words.view(np.uint16)

    def search(band: int) -> np.ndarray:
        found = [np.empty((0, 2), np.int64)]
        for left, right in _candidates(bands[:, band], CHUNK // threads, probe=distance >= BANDS):
            near = (
                np.bitwise_count(bits.take(left, axis=0) ^ bits.take(right, axis=0)).sum(axis=1, dtype=np.int64)
                <= distance
            )
            found.append(np.stack([left[near], right[near]], axis=1))
        return np.concatenate(found)

    pairs = []
    with ThreadPoolExecutor(threads, "bands") as pool:  # each of these operations lets others run
        for done, found in enumerate(pool.map(search, range(BANDS)), 1):
            pairs.append(found)
            on_band(done)
    return np.unique(np.concatenate(pairs), axis=0)


def _candidates(
    keys: np.ndarray, chunk: int, *, probe: bool
) -> Iterator[tuple[Int64[np.ndarray, "m"], Int64[np.ndarray, "m"]]]:
    """Positions left < right whose 16-bit keys are equal or, with `probe`, one bit apart; in bounded pieces."""
    order = np.argsort(keys, kind="stable")
    table = keys[order]
    for flip in [0, *(1 << bit for bit in range(16))] if probe else [0]:
        wanted = keys ^ np.uint16(flip)
        start = np.searchsorted(table, wanted, "left")
        count = np.searchsorted(table, wanted, "right") - start
        present = np.flatnonzero(count)
        if not len(present):
            continue
        total = np.cumsum(count[present])
        pieces = np.split(present, np.searchsorted(total, np.arange(chunk, total[-1], chunk)))
        for lefts in filter(len, pieces):  # each of about `chunk` candidates
            sizes = count[lefts]
            left = np.repeat(lefts, sizes)
            within = np.arange(len(left)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
            right = order[np.repeat(start[lefts], sizes) + within]
            ahead = left < right
            yield left[ahead], right[ahead]
