"""Checks and outcome of `latents`, read back from the commits of a batch; and the report of what one call did.

The names of the checks are those of the asset (nextvid/graph.py).
"""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl

from nextvid.config.project import Project
from nextvid.encode.pixels import pixel_check
from nextvid.encode.plan import BatchPlan, plan_batch
from nextvid.encode.preview import CLIPS, Shown
from nextvid.encode.roundtrip import Trip
from nextvid.encode.shard import EncodedShard, RefusedShardError, UnstorableError
from nextvid.making.batches import dataset_of
from nextvid.making.outcome import Check, Number, Outcome
from nextvid.making.publishing import publish_verdict
from storage.atomic import exists
from storage.digest import digest
from storage.spec import EncodingSpec, PixelSpec
from storage.store import LatentStore
from storage.tables import read_checks

ASSET = "latents"
NAMED = 5  # files that a check names; our choice


@dataclass(frozen=True)
class Report:
    """What was written and judged: of a shard, of a part, of one call. Reports add up."""

    rows: int = 0  # committed, failed ones too
    failed: frozenset[bytes] = frozenset()  # of these; the next call tries them again
    judged: int = 0  # rows that made the round trip
    worst_error: float = 0.0  # of these, in standard deviations of their latents
    undecidable: Counter[str] = field(default_factory=Counter)  # of these, by what they could not be distinguished from
    pixels: int = 0  # rows of the pixel store
    pictures: tuple[Shown, ...] = ()  # the first CLIPS that were judged

    def __add__(self, other: "Report") -> "Report":
        return Report(
            self.rows + other.rows,
            self.failed | other.failed,
            self.judged + other.judged,
            max(self.worst_error, other.worst_error),
            self.undecidable + other.undecidable,
            self.pixels + other.pixels,
            (self.pictures + other.pictures)[:CLIPS],
        )


def reported(shard: EncodedShard, judged: Collection[tuple[Trip, Shown]]) -> Report:
    """The report of a shard that was committed, from the rows of it that made the round trip."""
    trips, pictures = zip(*judged, strict=True) if judged else ((), ())
    return Report(
        rows=len(shard.row_ids),
        failed=frozenset(shard.row_ids) - frozenset(shard.good),
        judged=len(trips),
        worst_error=max((trip.error for trip in trips), default=0.0),
        undecidable=Counter(name for trip in trips for name in set(trip.undecidable)),
        pictures=pictures[:CLIPS],
    )


def publish_outcome(
    project: Project,
    plan: BatchPlan[EncodingSpec],
    report: Report,
    pixels: BatchPlan[PixelSpec] | None,
    seconds: float,
) -> Outcome:
    """Publish the checks of a batch: `plan` is what was planned, `pixels` what is missing now, where they are kept."""
    root, spec = project.root, plan.spec
    now = plan_batch(project, plan.batch, LatentStore(root, spec))
    path = root.latents_checks(spec.digest(), plan.batch)
    checks = (
        _finite(now.good, spec),
        _counts(project, now),
        _round_trip(now, report, read_checks(path)),
        _same_frames(now),
        _no_orphan(now),
        pixel_check(pixels),
    )
    publish_verdict(path, ASSET, checks)
    picture = root.preview("latents", plan.batch)
    stored = now.good.sort("row_id").select("row_id", "crc32c").iter_rows()
    return Outcome(
        asset=ASSET,
        partition=plan.batch,
        made=report.rows + report.pixels > 0,
        rows=now.kept,
        rows_made=report.rows,
        size_bytes=sum(spec.row_bytes(frames) for frames in now.good["frames"].to_list()),
        seconds=seconds,
        quarantined=now.commits.height - now.kept - now.unstable.height,
        digest=digest([spec.digest(), [[row.hex(), crc] for row, crc in stored]]),  # in whatever part a row is
        numbers=_numbers(plan, now, report),
        pictures={"source, reconstruction, difference, channels": picture} if exists(picture) else {},
        checks=checks,
    )


def publish_refused(project: Project, plan: BatchPlan[EncodingSpec], error: RefusedShardError) -> None:
    """Publish that a shard was refused, by which check, so that nothing reads this batch until it passes."""
    now = plan_batch(project, plan.batch, LatentStore(project.root, plan.spec))
    name = "finite" if isinstance(error, UnstorableError) else "round_trip"
    failed = Check(name, False, {"error": str(error)}, description="A shard was refused; nothing of it was committed")
    path = project.root.latents_checks(plan.spec.digest(), plan.batch)
    publish_verdict(path, ASSET, (_counts(project, now), failed, _no_orphan(now)))


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


def _counts(project: Project, plan: BatchPlan[EncodingSpec]) -> Check:
    rejected = plan.unstable.height
    wanted = plan.rows.height + plan.kept + rejected
    failed = plan.commits.height - plan.kept - rejected
    budget = project.corpus.datasets[dataset_of(plan.batch)].quarantine_budget
    share = failed / wanted if wanted else 0.0
    numbers: dict[str, Number] = {
        "wanted": wanted,
        "committed": plan.kept,
        "failed": failed,
        "rejected": rejected,
        "missing": wanted - plan.commits.height,
        "failed_share": share,
        "budget": budget,
    }
    numbers |= _by_reason(plan)
    return Check("counts", plan.commits.height == wanted and share <= budget, numbers)


def _round_trip(plan: BatchPlan[EncodingSpec], report: Report, before: Mapping[str, Any] | None) -> Check:
    """Whether a row of every committed shard made the trip. PSNR is of all such rows, the rest of the last call's."""
    good = pl.concat([plan.commits, plan.orphans]).filter(pl.col("status") == "ok")
    unchecked = good.group_by("frames", "part", "shard").agg(pl.col("psnr_db").is_null().all()).filter("psnr_db").height
    sampled = good["psnr_db"].drop_nulls()
    numbers: dict[str, Number] = {"rows": len(sampled), "unchecked_shards": unchecked}
    seen = sampled.drop_nans()  # NaN where the target has no decoder: the row was encoded again, and that was all
    if len(seen):
        numbers |= {"psnr_mean_db": _real(seen.mean()), "psnr_min_db": _real(seen.min())}
    if report.judged:
        numbers |= {"last_rows": report.judged, "worst_error_std": report.worst_error}
        numbers |= {f"undecidable {name}": count for name, count in sorted(report.undecidable.items())}
    else:
        last = [check for check in (before or {}).get("checks", ()) if check["name"] == "round_trip"]
        numbers = {**(last[0]["numbers"] if last else {}), **numbers}
    return Check("round_trip", unchecked == 0, numbers)


def _same_frames(plan: BatchPlan[EncodingSpec]) -> Check:
    """Files that were decoded twice with different results are named: their rows are no training data."""
    named = plan.unstable["reason"].unique().sort().to_list()
    description = f"decoded twice, these files gave different frames, and so give no rows: {'; '.join(named[:NAMED])}"
    return Check(
        "same_frames",
        not named,
        {"rows": plan.unstable.height, "files": len(named)},
        description=description if named else "",
    )


def _by_reason(plan: BatchPlan[EncodingSpec]) -> dict[str, Number]:
    words = plan.commits.select(pl.col("reason").str.split(":").list.first()).drop_nulls()
    return {f"reason_{word}": int(count) for word, count in words.group_by("reason").len().sort("reason").iter_rows()}


def _no_orphan(plan: BatchPlan[EncodingSpec]) -> Check:
    """Orphans follow from a changed curation and are freed by the sweep: reported, never deleted here."""
    return Check("no_orphan", not plan.orphaned, {"orphaned": len(plan.orphaned)})


def _numbers(plan: BatchPlan[EncodingSpec], now: BatchPlan[EncodingSpec], report: Report) -> Mapping[str, Number]:
    good = now.good
    numbers: dict[str, Number] = {"encoded": report.rows, "kept": plan.kept, "spec": plan.spec.digest()}
    statuses = now.commits.filter(pl.col("status") != "ok").group_by(pl.col("status").cast(pl.String)).len()
    numbers |= {str(status): int(count) for status, count in statuses.sort("status").iter_rows()} | _by_reason(now)
    numbers |= {"over_cap": now.over_cap.height} if now.over_cap.height else {}
    numbers |= {f"encoded because {why}": count for why, count in plan.reasons.items()}
    if good.height:
        spent = shard_costs(good, plan.spec)
        numbers |= {"shards": spent.height, "dearest_shard_s": _real(spent["encode_s"].max())}
        numbers |= {name: _real(spent[name].sum()) for name in ("decode_s", "encode_s", "stored_bytes")}
    if (widths := good["posterior_std"].drop_nulls()).len():
        numbers["posterior_std"] = _real(widths.mean())
    return numbers


def shard_costs(commits: pl.DataFrame, spec: EncodingSpec) -> pl.DataFrame:
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


def _real(value: object) -> float:
    assert isinstance(value, int | float), value
    return float(value)
