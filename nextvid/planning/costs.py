"""What encoding would take: rows, bytes and seconds of each batch, under a spec, before anything is encoded.

Holds arithmetic on plans and on what commits say they took; decodes nothing and imports no torch. Rates are those
measured in the store of the same spec, on whatever device wrote it; a clip length without any measured row has no rate,
and its seconds are unknown rather than guessed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import polars as pl

from nextvid.config.accepted import Accepted, accepted
from nextvid.config.project import Project
from nextvid.encode.plan import BatchPlan, accepted_spec, encoding_spec, pixel_spec, plan_batch, plan_encode
from nextvid.making.batches import dataset_of
from nextvid.planning.acceptance import others, outdated
from nextvid.planning.waiting import curation_of
from storage.latents import EncodingSpec, LatentStore
from storage.pixels import PixelStore

RATE_BATCHES = 3  # of a dataset: every step asks, so that it must not read the whole store


@dataclass(frozen=True)
class Rate:
    """Seconds a row of one clip length, averaged over `rows` committed ones."""

    rows: int
    encode_s: float  # of the device
    decode_s: float  # of a decode process


@dataclass(frozen=True)
class Cost:
    """One batch under one spec. Seconds are None where a clip length that is needed was never measured."""

    batch: str
    rows: int
    kept: int
    orphaned: int
    why: Mapping[str, int]
    size_bytes: int  # in the store, indexes aside
    encode_s: float | None
    decode_s: float | None
    unmeasured: tuple[int, ...]  # clip lengths in frames without a rate
    curation_changed: bool  # its clips were cut by another curation than corpus.yaml asks for
    without_pixels: int  # rows, where pixels are kept; those that are encoded too need no other decoding
    pixels_decode_s: float | None  # of the rows that lack pixels alone; None where a length was never measured

    def line(self) -> str:
        """For people."""
        why = ", ".join(f"{count} {reason}" for reason, count in self.why.items()) or "nothing to do"
        seconds = "no rate is known" if self.encode_s is None else f"{self.encode_s:.1f} device-s"
        if self.decode_s is not None:
            seconds += f" and {self.decode_s:.1f} decode-s"
        if self.unmeasured:
            seconds += f" (none measured at {', '.join(map(str, self.unmeasured))} frames)"
        changed = "; its clips are of another curation" if self.curation_changed else ""
        pixels = f"; {self.without_pixels} rows have no pixels yet" if self.without_pixels else ""
        if pixels and self.pixels_decode_s:
            pixels += f" ({self.pixels_decode_s:.1f} decode-s more)"
        took = f", {self.size_bytes:,} bytes, {seconds}" if self.rows else ""
        return (
            f"{self.batch}: {self.rows} rows ({why}), {self.kept} kept, {self.orphaned} orphaned{took}{changed}{pixels}"
        )


@dataclass(frozen=True)
class Forecast:
    """What `make latents` would do, and, where corpus.yaml asks for something else, what accepting it would cost."""

    in_force: Accepted | None
    outdated: tuple[str, ...]  # `encoding`, `curation`, `pixels`
    without_clips: tuple[str, ...]  # batches whose clips were never made: nobody knows their rows
    now: tuple[Cost, ...]
    if_accepted: tuple[Cost, ...]

    def text(self) -> str:
        """For people."""
        lines = [cost.line() for cost in self.now]
        lines += [f"{batch}: its clips are not made yet, so its rows are not known" for batch in self.without_clips]
        if self.outdated and not self.now and self.if_accepted:
            lines.append("nothing can be encoded as before: the autoencoder in force is not the one of corpus.yaml")
        if self.outdated:
            lines.append(
                f"corpus.yaml asks for {others(self.outdated)} than is in force: {len(self._changed)} batches are "
                "outdated; 'nextvid plan --accept' puts it in force, and this is what it costs:"
            )
            lines += ["  " + cost.line() for cost in self.if_accepted]
        return "\n".join(lines) or "there is no batch yet: 'nextvid make clips' lists, reads and cuts the files"

    def summary(self) -> str | None:
        """What accepting corpus.yaml's encoding and curation would cost in all, on one line; None if they stand."""
        if not self.outdated:
            return None
        costs = self._changed
        known = [cost.encode_s for cost in costs if cost.encode_s is not None]
        seconds = (
            f"{sum(known):.1f} device-s at rates measured in its store" if len(known) == len(costs) else "no rate yet"
        )
        bare = sum(cost.without_pixels for cost in costs)
        decoded = [cost.pixels_decode_s for cost in costs if cost.pixels_decode_s is not None]
        pixels = f", {bare} rows without pixels" if bare else ""
        pixels += f" ({sum(decoded):.1f} decode-s)" if bare and len(decoded) == len(costs) else ""
        return (
            f"corpus.yaml asks for {others(self.outdated)} than is in force: {len(costs)} batches are "
            f"outdated, {sum(cost.rows for cost in costs)} rows, {sum(cost.size_bytes for cost in costs):,} bytes, "
            f"{seconds}{pixels}; 'nextvid plan' names them, 'nextvid plan --accept' puts it in force"
        )

    @property
    def _changed(self) -> list[Cost]:
        """Of the batches that accepting changes."""
        pixels = "pixels" in self.outdated
        return [c for c in self.if_accepted if c.rows or c.curation_changed or (pixels and c.without_pixels)]


def forecast(project: Project, batch: str | None = None) -> Forecast:
    """Plan one batch or all. Nothing is written. Raises UpstreamError where that one batch has no clips."""
    made = set(project.root.batches("clips"))
    listed = sorted({*project.root.batches(), *made})
    ready = [batch] if batch else [key for key in listed if key in made]
    asked, other = encoding_spec(project), outdated(project)
    now: tuple[Cost, ...] = ()
    if "encoding" not in other or asked.autoencoder == _autoencoder_in_force(project):
        now = costs(project, ready, accepted_spec(project))
    return Forecast(
        accepted(project.root),
        other,
        () if batch else tuple(key for key in listed if key not in made),
        now,
        costs(project.as_asked(), ready, asked) if other else (),
    )


def costs(project: Project, batches: Sequence[str], spec: EncodingSpec) -> tuple[Cost, ...]:
    """The cost of each batch under a spec, at the rates of that spec's store."""
    known = rates(LatentStore(project.root, spec))
    return tuple(_cost(project, plan_encode(project, batch, spec), known) for batch in batches)


def rates(store: LatentStore) -> dict[int, Rate]:
    """Measured seconds a row by clip length, in each dataset's latest batches; lengths never measured are missing."""
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
    unmeasured = tuple(frames for frames in rows if frames not in known)
    pixels = pixel_spec(project, plan.spec)
    bare = plan_batch(project, plan.batch, PixelStore(project.root, pixels)).rows if pixels else plan.rows.clear()
    alone = bare.join(plan.rows, on="row_id", how="anti").group_by("frames").len().rows()
    return Cost(
        batch=plan.batch,
        rows=plan.rows.height,
        kept=plan.kept,
        orphaned=len(plan.orphaned),
        why=plan.reasons,
        size_bytes=sum(count * plan.spec.row_bytes(frames) for frames, count in rows.items()),
        encode_s=None if unmeasured else sum(count * known[frames].encode_s for frames, count in rows.items()),
        decode_s=None if unmeasured else sum(count * known[frames].decode_s for frames, count in rows.items()),
        unmeasured=unmeasured,
        curation_changed=curation_of(project, plan.batch) != project.corpus.curation_digest(dataset_of(plan.batch)),
        without_pixels=bare.height,
        pixels_decode_s=(
            sum(count * known[frames].decode_s for frames, count in alone)
            if all(frames in known for frames, _ in alone)
            else None
        ),
    )


def _autoencoder_in_force(project: Project) -> str | None:
    """Digest of the weights that the accepted spec was made with; other weights cannot encode for it."""
    stands = accepted(project.root)
    return None if stands is None else LatentStore.open(project.root, stands.encoding).spec.autoencoder
