"""Checks and report of `latents`, from the commits of a batch and the round trips of one call.

Holds no encoding: what is claimed of a store is read back from its commits. The names of the checks are those of the
asset (nextvid/graph.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl

from nextvid.config.project import Project
from nextvid.encode.pixels import pixel_check
from nextvid.encode.plan import EncodePlan, PixelPlan, wanted_clips
from nextvid.encode.preview import Shown
from nextvid.encode.roundtrip import Trip
from nextvid.encode.shard import RefusedShardError, UnstorableError
from nextvid.making.outcome import Check, Number, Outcome
from nextvid.making.publishing import publish_verdict
from storage.atomic import exists
from storage.digest import digest
from storage.latents import EncodingSpec, LatentStore
from storage.tables import read_checks

ASSET = "latents"


@dataclass
class Trips:
    """What one call wrote and tried, counted up while it runs."""

    written: int = 0  # rows
    rows: int = 0  # that made the round trip
    worst_error: float = 0.0
    undecidable: dict[str, int] = field(default_factory=dict)  # rows by what they could not be told from
    pixels: int = 0  # rows of the pixel store
    failed: set[bytes] = field(default_factory=set)  # in this call; they wait for the next one
    pictures: list[Shown] = field(default_factory=list)  # of clips that made the round trip

    def clear(self) -> None:
        """Begin anew."""
        self.__init__()  # type: ignore[misc]

    def join(self, other: "Trips") -> None:
        """Count what another process wrote and tried."""
        self.written += other.written
        self.rows += other.rows
        self.worst_error = max(self.worst_error, other.worst_error)
        for name, count in other.undecidable.items():
            self.undecidable[name] = self.undecidable.get(name, 0) + count
        self.pixels += other.pixels
        self.failed |= other.failed
        self.pictures += other.pictures

    def add(self, found: Mapping[bytes, Trip]) -> None:
        """Count the verdicts of a shard."""
        for trip in found.values():
            self.rows += 1
            self.worst_error = max(self.worst_error, trip.error)
            for name in set(trip.undecidable):
                self.undecidable[name] = self.undecidable.get(name, 0) + 1


def outcome_of(
    project: Project, plan: EncodePlan, trips: Trips, pixels: PixelPlan | None, pixels_written: int, seconds: float
) -> Outcome:
    """Publish the checks of a batch and report it; `pixels` is how they stand now, where they are asked for."""
    every = LatentStore(project.root, plan.spec).commits(plan.batch)
    commits = _wanted(project, plan, every)
    good = commits.filter(pl.col("status") == "ok")
    path = project.root.latents_checks(plan.spec.digest(), plan.batch)
    checks = (
        _finite(good, plan.spec),
        _counts(project, plan, commits),
        _round_trip(every, trips, read_checks(path)),
        _no_orphan(plan),
        pixel_check(pixels),
    )
    publish_verdict(path, ASSET, checks)
    picture = project.root.preview("latents", plan.batch)
    lost = commits.height - good.height
    return Outcome(
        asset=ASSET,
        partition=plan.batch,
        made=trips.written + pixels_written > 0,
        rows=good.height,
        size_bytes=sum(plan.spec.row_bytes(frames) for frames in good["frames"].to_list()),
        seconds=seconds,
        quarantined=lost,
        digest=_digest(good, plan.spec),
        numbers=_numbers(plan, good, trips),
        pictures={"source, reconstruction, difference, channels": picture} if exists(picture) else {},
        checks=checks,
    )


def publish_refused(project: Project, plan: EncodePlan, trips: Trips, error: RefusedShardError) -> None:
    """Publish that a shard was refused, by which check, so that nothing reads this batch until it passes."""
    commits = _wanted(project, plan, LatentStore(project.root, plan.spec).commits(plan.batch))
    numbers: dict[str, Number] = {"rows": trips.rows, "error": str(error)}
    name = "finite" if isinstance(error, UnstorableError) else "round_trip"
    failed = Check(name, False, numbers, description="A shard was refused; nothing of it was committed")
    path = project.root.latents_checks(plan.spec.digest(), plan.batch)
    publish_verdict(path, ASSET, (_counts(project, plan, commits), failed, _no_orphan(plan)))


def _wanted(project: Project, plan: EncodePlan, commits: pl.DataFrame) -> pl.DataFrame:
    """Commits of the rows that clips want now."""
    return commits.join(wanted_clips(project, plan.batch).select("row_id"), on="row_id", how="semi")


def _finite(good: pl.DataFrame, spec: EncodingSpec) -> Check:
    """By the sums of each committed row: none is NaN or infinite, and no row is constant in every channel."""
    odd = constant = 0
    for sums, squares, frames in good.select("sums", "sums_squared", "frames").iter_rows():
        total, squared = np.asarray(sums, np.float64), np.asarray(squares, np.float64)
        if not (np.isfinite(total).all() and np.isfinite(squared).all()):
            odd += 1
            continue
        n = spec.latent_frames(frames) * spec.height * spec.width
        # a constant row's variance is zero up to float64's rounding of sums of n values
        constant += bool((squared / n - (total / n) ** 2 <= 1e-12 * np.maximum(squared / n, 1e-300)).all())
    return Check("finite", odd == 0 and constant == 0, {"not_finite": odd, "constant": constant, "rows": good.height})


def _counts(project: Project, plan: EncodePlan, commits: pl.DataFrame) -> Check:
    wanted = wanted_clips(project, plan.batch).height
    failed = commits.filter(pl.col("status") != "ok").height
    budget = project.corpus.datasets[plan.batch.split(".")[0]].quarantine_budget
    share = failed / wanted if wanted else 0.0
    numbers: dict[str, Number] = {
        "wanted": wanted,
        "committed": commits.height - failed,
        "failed": failed,
        "missing": wanted - commits.height,
        "failed_share": share,
        "budget": budget,
    }
    by_reason = commits.filter(pl.col("reason").is_not_null()).group_by("reason").len().sort("reason")
    numbers |= {f"reason_{reason}": int(count) for reason, count in by_reason.iter_rows()}
    return Check("counts", commits.height == wanted and share <= budget, numbers)


def _round_trip(commits: pl.DataFrame, trips: Trips, before: Mapping[str, Any] | None) -> Check:
    """Whether a row of every committed shard made the trip. PSNR is of all such rows, the rest of the last call's."""
    good = commits.filter(pl.col("status") == "ok")
    unchecked = good.group_by("frames", "part", "shard").agg(pl.col("psnr_db").is_null().all()).filter("psnr_db").height
    sampled = good["psnr_db"].drop_nulls()
    numbers: dict[str, Number] = {"rows": len(sampled), "unchecked_shards": unchecked}
    seen = sampled.drop_nans()  # NaN where nothing decodes: the row was encoded again, and that was all
    if len(seen):
        numbers |= {"psnr_mean_db": _real(seen.mean()), "psnr_min_db": _real(seen.min())}
    if trips.rows:
        numbers |= {"last_rows": trips.rows, "worst_error_std": trips.worst_error}
        numbers |= {f"undecidable {name}": count for name, count in sorted(trips.undecidable.items())}
    else:
        last = [check for check in (before or {}).get("checks", ()) if check["name"] == "round_trip"]
        numbers = {**(last[0]["numbers"] if last else {}), **numbers}
    return Check("round_trip", unchecked == 0, numbers)


def _no_orphan(plan: EncodePlan) -> Check:
    """Orphans follow from a changed curation and are freed by the sweep: reported, never deleted here."""
    return Check("no_orphan", not plan.orphaned, {"orphaned": len(plan.orphaned)}, blocking=False)


def _numbers(plan: EncodePlan, good: pl.DataFrame, trips: Trips) -> Mapping[str, Number]:
    numbers: dict[str, Number] = {"encoded": trips.written, "kept": plan.kept, "spec": plan.spec.digest()}
    numbers |= {f"encoded because {why}": count for why, count in plan.reasons.items()}
    if good.height:
        spent = ledger(good, plan.spec)
        numbers |= {"shards": spent.height, "dearest_shard_s": _real(spent["encode_s"].max())}
        numbers |= {name: _real(spent[name].sum()) for name in ("decode_s", "encode_s", "stored_bytes")}
    if (widths := good["posterior_std"].drop_nulls()).len():
        numbers["posterior_std"] = _real(widths.mean())
    return numbers


def ledger(commits: pl.DataFrame, spec: EncodingSpec) -> pl.DataFrame:
    """What each shard cost: frames, part, shard, rows, decode_s, encode_s, stored_bytes; of committed rows."""
    row_bytes = {frames: spec.row_bytes(frames) for frames in commits["frames"].unique()}
    costs = commits.with_columns(
        pl.col("decode_s", "encode_s").cast(pl.Float64),
        stored_bytes=pl.col("frames").replace_strict(row_bytes, return_dtype=pl.Int64),
    )
    names = ("decode_s", "encode_s", "stored_bytes")
    return (
        costs.group_by("frames", "part", "shard")
        .agg(pl.len().alias("rows"), pl.col(*names).sum())
        .sort("frames", "part", "shard")
    )


def _digest(good: pl.DataFrame, spec: EncodingSpec) -> str:
    """Identity of what is stored: the spec and each row with its checksum, wherever it stands."""
    rows = good.sort("row_id").select("row_id", "crc32c").iter_rows()
    return digest([spec.digest(), [[row.hex(), crc] for row, crc in rows]])


def _real(value: object) -> float:
    assert isinstance(value, int | float), value
    return float(value)
