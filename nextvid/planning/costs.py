"""The cost of encoding each batch: rows, bytes and seconds, before anything is encoded.

Seconds come from the rates that commits of the same store recorded, on whatever device wrote them; where no row of a
clip length was measured, its seconds are unknown.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import polars as pl

from nextvid.config.accepted import Accepted, accepted, pixels_digest
from nextvid.config.project import Project
from nextvid.encode.cap import drawn_rows, settle_cap
from nextvid.encode.plan import BatchPlan, encoding_spec, pixel_spec, plan_batch, plan_encode
from nextvid.graph import GRAPH, Asset
from nextvid.making.batches import VERSIONED, batch_state, dataset_of, made_by_older
from nextvid.making.publishing import existing, publish_notice
from nextvid.planning.acceptance import accept_asked, difference, outdated
from storage import atomic
from storage.digest import digest
from storage.records import publish_record, read_record
from storage.schemas import Shots
from storage.spec import EncodingSpec
from storage.store import LatentStore, PixelStore

RATE_BATCHES = 3  # the latest of each dataset: a plan must not read the whole store


@dataclass(frozen=True)
class Rate:
    """Mean seconds for a row of one clip length, over `rows` committed ones."""

    rows: int
    encode_s: float  # of the device
    decode_s: float  # of a decode process


@dataclass(frozen=True)
class Cost:
    """Cost of one batch under one spec. Seconds are None if a clip length that it needs was never measured."""

    batch: str
    rows: int
    kept: int
    orphaned: int
    why: Mapping[str, int]
    size_bytes: int  # in the store, indexes aside
    encode_s: float | None
    decode_s: float | None
    unmeasured: tuple[int, ...]  # clip lengths in frames without a rate
    curation_changed: bool  # its clips were cut by another curation
    rebuilt: tuple[str, ...]  # reasons, where an older version of a maker made its tables
    first_passes: int  # files that are read and decoded again for that
    without_pixels: int  # rows, where pixels are kept
    pixels_decode_s: float | None  # of rows that lack pixels and not latents
    lengths: Mapping[int, tuple[int, int, int]]  # rows by frames: wanted, stored of these, left out by the cap

    def line(self) -> str:
        """The cost on one line, for people."""
        why = ", ".join(f"{count} {reason}" for reason, count in self.why.items()) or "nothing to do"
        seconds = "no rate is known" if self.encode_s is None else f"{self.encode_s:.1f} device-s"
        if self.decode_s is not None:
            seconds += f" and {self.decode_s:.1f} decode-s"
        if self.unmeasured:
            seconds += f" (none measured at {', '.join(map(str, self.unmeasured))} frames)"
        changed = "; its clips are of another curation" if self.curation_changed else ""
        if self.rebuilt:
            changed += f"; {' and '.join(self.rebuilt)}"
            changed += f": {self.first_passes} files need a new first pass" if self.first_passes else ""
        pixels = f"; {self.without_pixels} rows have no pixels yet" if self.without_pixels else ""
        if pixels and self.pixels_decode_s:
            pixels += f" ({self.pixels_decode_s:.1f} decode-s more)"
        took = f", {self.size_bytes:,} bytes, {seconds}" if self.rows else ""
        return (
            f"{self.batch}: {self.rows} rows ({why}), {self.kept} kept, {self.orphaned} orphaned{took}{changed}{pixels}"
        )


@dataclass(frozen=True)
class Rows:
    """Rows of one dataset and clip length, in the batches whose clips are made."""

    dataset: str
    frames: int
    drawn: int  # at most, by the recipes of corpus.yaml
    wanted: int
    stored: int  # of these
    over_cap: int  # not stored and not wanted

    def line(self) -> str:
        """These numbers on one line, for people."""
        over = f"; {self.over_cap:,} more are over the cap" if self.over_cap else ""
        return (
            f"{self.dataset}, {self.frames} frames: {self.drawn:,} drawn, {self.wanted:,} wanted, {self.stored:,} "
            f"stored{over}"
        )


@dataclass(frozen=True)
class Forecast:
    """Costs of `make latents` now, and once what corpus.yaml asks for is accepted, where that differs."""

    accepted: Accepted | None
    outdated: tuple[str, ...]  # of acceptance.py
    without_clips: tuple[str, ...]  # batches whose clips were never made, so that their rows are unknown
    now: tuple[Cost, ...]
    if_accepted: tuple[Cost, ...]
    rows: tuple["Rows", ...]  # now, of all these batches

    def text(self) -> str:
        """The forecast, for people."""
        lines = [cost.line() for cost in self.now]
        lines += [rows.line() for rows in self.rows]
        lines += [f"{batch}: its clips are not made yet, so its rows are unknown" for batch in self.without_clips]
        if self.outdated and not self.now and self.if_accepted:
            lines.append("nothing can be encoded: corpus.yaml names another autoencoder than the accepted one")
        if self.outdated:
            lines.append(
                f"{difference(self.outdated)}: {len(self._changed)} batches are outdated; 'nextvid plan --accept' "
                "accepts it, at these costs:"
            )
            lines += ["  " + cost.line() for cost in self.if_accepted]
        if any(cost.first_passes for cost in self.now + self.if_accepted):
            lines.append(
                "after a new first pass, only files that come out different or were read wrongly are encoded again"
            )
        return "\n".join(lines) or "there is no batch yet: 'nextvid make clips' lists, reads and cuts the files"

    def summary(self) -> str | None:
        """The cost of accepting corpus.yaml in all, on one line; None if nothing differs."""
        if not self.outdated:
            return None
        costs = self._changed
        known = [cost.encode_s for cost in costs if cost.encode_s is not None]
        seconds = (
            f"{sum(known):.1f} device-s at rates measured in its store" if len(known) == len(costs) else "no rate yet"
        )
        passes = sum(cost.first_passes for cost in costs)
        passed = f", {passes} files need a new first pass" if passes else ""
        bare = sum(cost.without_pixels for cost in costs)
        decoded = [cost.pixels_decode_s for cost in costs if cost.pixels_decode_s is not None]
        pixels = f", {bare} rows without pixels" if bare else ""
        pixels += f" ({sum(decoded):.1f} decode-s)" if bare and len(decoded) == len(costs) else ""
        return (
            f"{difference(self.outdated)}: {len(costs)} batches are outdated, {sum(cost.rows for cost in costs)} rows, "
            f"{sum(cost.size_bytes for cost in costs):,} bytes, {seconds}{pixels}{passed}; 'nextvid plan' lists them, "
            "'nextvid plan --accept' accepts it"
        )

    @property
    def _changed(self) -> list[Cost]:
        """Costs of the batches that accepting corpus.yaml changes."""
        pixels = "pixels" in self.outdated
        return [
            c for c in self.if_accepted if c.rows or c.curation_changed or c.rebuilt or (pixels and c.without_pixels)
        ]


def forecast(project: Project, batch: str | None = None) -> Forecast:
    """The forecast for one batch or all. Raises UpstreamError if the one batch has no clips.

    Writes nothing but which rows a `cap` takes, where more is known than when that was recorded.
    """
    made = set(project.root.batches("clips"))
    listed = sorted({*project.root.batches(), *made})
    ready = [batch] if batch else [key for key in listed if key in made]
    known, asked, changed = accepted(project.root), encoding_spec(project), outdated(project)
    other = known is not None and known.encoding != asked.digest()
    current = LatentStore.open(project.root, known.encoding).spec if known and other else asked
    for one in {dataset_of(key): key for key in ready}.values():
        settle_cap(project, LatentStore(project.root, current), one)
    now = costs(project, ready, current) if current.autoencoder == asked.autoencoder else ()
    return Forecast(
        accepted=known,
        outdated=changed,
        without_clips=() if batch else tuple(key for key in listed if key not in made),
        now=now,
        if_accepted=costs(project.as_asked(), ready, asked) if changed else (),
        rows=_rows(project, now),
    )


def _rows(project: Project, found: Sequence[Cost]) -> tuple[Rows, ...]:
    """What is drawn, wanted and stored; nothing where corpus.yaml names neither recipes nor caps."""
    if not project.asked.recipes and all(config.cap is None for config in project.corpus.datasets.values()):
        return ()
    drawn, sums = drawn_rows(project), Counter[tuple[str, int, int]]()
    for cost in found:
        for frames, counts in cost.lengths.items():
            sums.update({(dataset_of(cost.batch), frames, which): count for which, count in enumerate(counts)})
    keys = sorted({(dataset, frames) for dataset, frames, _ in sums})
    return tuple(Rows(*key, drawn.get(key, 0), *(sums[(*key, which)] for which in range(3))) for key in keys)


def accept_and_tell(project: Project) -> Project:
    """Accept what corpus.yaml asks for, and leave a notice of the rows that are made again for it."""
    names = outdated(project)
    project = accept_asked(project)
    if names:
        now = forecast(project).now
        rows: dict[Asset, int] = {
            "shots": sum(cost.first_passes for cost in now),
            "clips": sum(cost.rows + cost.kept for cost in now if cost.curation_changed),
            "latents": sum(max(cost.rows, cost.without_pixels) for cost in now),
        }
        publish_notice(project.root, f"accepted: {', '.join(names)}", rows)
    return project


def publish_forecast(project: Project) -> str:
    """Write what accepting corpus.yaml costs, for the sensor, which has no time to compute it; returns it as a line."""
    asked, line = question(project), forecast(project).summary() or "nothing differs from what is accepted"
    publish_record(project.root.forecast(), {"question": asked, "summary": line})
    return line


def published_forecast(project: Project) -> str | None:
    """The line that `publish_forecast` wrote; None where it answers another question than corpus.yaml asks now."""
    path = project.root.forecast()
    found = read_record(path) if atomic.exists(path) else {}
    return str(found["summary"]) if found.get("question") == question(project) else None


def question(project: Project) -> str:
    """Digest of what is accepted and of what corpus.yaml and the makers ask for."""
    asked, known = project.asked, accepted(project.root)
    wanted = [encoding_spec(project).digest(), asked.curation_digest(), pixels_digest(asked.encoding.pixels)]
    return digest([wanted, [GRAPH[asset].version for asset in VERSIONED], known.count if known else 0])


def costs(project: Project, batches: Sequence[str], spec: EncodingSpec) -> tuple[Cost, ...]:
    """The cost of each batch under a spec, at the rates of that spec's store."""
    known = rates(LatentStore(project.root, spec))
    return tuple(_cost(project, plan_encode(project, batch, spec), known) for batch in batches)


def rates(store: LatentStore) -> dict[int, Rate]:
    """Measured rates by clip length in frames, over the latest batches of each dataset."""
    found = {}
    recent: dict[str, list[str]] = {}
    for batch in store.batches():
        recent.setdefault(dataset_of(batch), []).append(batch)
    commits = [store.commits(batch) for batches in recent.values() for batch in batches[-RATE_BATCHES:]]
    good = pl.concat([*commits, store.commits("none")]).filter(pl.col("status") == "ok")
    means = good.group_by("frames").agg(pl.len(), pl.col("encode_s").mean(), pl.col("decode_s").mean())
    for frames, rows, encode_s, decode_s in means.sort("frames").iter_rows():
        found[int(frames)] = Rate(int(rows), float(encode_s), float(decode_s))
    return found


def _cost(project: Project, plan: BatchPlan[EncodingSpec], known: Mapping[int, Rate]) -> Cost:
    rows = {frames: table.height for frames, table in plan.by_frames.items()}
    pixels = pixel_spec(project, plan.spec)
    bare = plan_batch(project, plan.batch, PixelStore(project.root, pixels)).rows if pixels else plan.rows.clear()
    alone = bare.join(plan.rows, on="row_id", how="anti").group_by("frames").len()
    encode_s = {frames: rate.encode_s for frames, rate in known.items()}
    decode_s = {frames: rate.decode_s for frames, rate in known.items()}
    state = batch_state(project.root, plan.batch, *VERSIONED)
    older, first_passes = made_by_older(project, state), 0
    if "shots" in older:
        first_passes = existing(project.root, "shots", plan.batch, Shots)["media_id"].n_unique()
    missing, stored, over = (
        dict(table.group_by("frames").len().iter_rows()) for table in (plan.rows, plan.good, plan.over_cap)
    )
    lengths = ((length, missing.get(length, 0), stored.get(length, 0)) for length in sorted({*missing, *stored, *over}))
    return Cost(
        batch=plan.batch,
        rows=plan.rows.height,
        kept=plan.kept,
        orphaned=len(plan.orphaned),
        why=plan.reasons,
        size_bytes=sum(count * plan.spec.row_bytes(frames) for frames, count in rows.items()),
        encode_s=_seconds(rows, encode_s),
        decode_s=_seconds(rows, decode_s),
        unmeasured=tuple(frames for frames in rows if frames not in known),
        curation_changed=state.made_from("clips", "curation") != project.corpus.curation_digest(dataset_of(plan.batch)),
        rebuilt=tuple(older.values()),
        first_passes=first_passes,
        without_pixels=bare.height,
        pixels_decode_s=_seconds(dict(alone.rows()), decode_s),
        lengths={length: (new + kept, kept, over.get(length, 0)) for length, new, kept in lengths},
    )


def _seconds(rows: Mapping[int, int], row_s: Mapping[int, float]) -> float | None:
    """Seconds of so many rows of each clip length; None if a length has no rate."""
    return sum(count * row_s[frames] for frames, count in rows.items()) if rows.keys() <= row_s.keys() else None
