"""The maker of `latents`: rows that a batch's store lacks are decoded, encoded, checked and committed, shard by shard.

Holds the order of events only; plan.py decides what, pipeline.py does it on one device and processes.py on several,
checks.py reports, and the store keeps. Killed anywhere, the next call finishes the part that was begun, row for row
the same.
"""

import time
from collections.abc import Collection

from nextvid.config.accepted import standing
from nextvid.config.project import Project
from nextvid.encode.checks import Trips, outcome_of, publish_refused
from nextvid.encode.pipeline import Telling, shares
from nextvid.encode.pixels import PixelWriter
from nextvid.encode.plan import EncodePlan, pixel_spec, plan_encode
from nextvid.encode.preview import preview_png
from nextvid.encode.processes import Share, devices, encoding_on
from nextvid.encode.shard import Batch, RefusedShardError
from nextvid.making.outcome import Outcome
from nextvid.making.progress import OnPace, Pace
from storage.atomic import publish_bytes
from storage.errors import ConflictError
from storage.latents import LatentPart, LatentStore
from storage.tables import require_checks


def make_latents(project: Project, batch: str, on_pace: OnPace = lambda pace: None) -> Outcome:
    """Encode what a batch lacks in the spec in force, with its pixels if asked for; publish its checks and a picture.

    Raises UpstreamError without checked clips, RefusedShardError where a shard is refused: then nothing of it is
    committed, and the published checks say so.
    """
    began = time.perf_counter()
    project = standing(project)
    require_checks(project.root.checks("clips", batch), "clips")
    plan = plan_encode(project, batch)
    store = LatentStore(project.root, plan.spec)
    store.create()
    trips, names = Trips(), devices(project.corpus.encoding)
    if plan.rows.height or any(store.unfinished(batch, frames) for frames in store.frames_of(batch)):
        try:
            _encode(project, plan, store, names, trips, on_pace)
        except RefusedShardError as error:
            publish_refused(project, plan, trips, error)
            raise
        if trips.pictures:
            publish_bytes(project.root.preview("latents", batch), preview_png(trips.pictures))
    with PixelWriter(project, batch, pixel_spec(project, plan.spec), shares(names[0], 1)[0]) as pixels:
        pixels.rest()  # what was asked for later, or has lost its writer
        written = trips.pixels + pixels.written
        return outcome_of(project, plan, trips, pixels.plan(), written, time.perf_counter() - began)


def _encode(
    project: Project, plan: EncodePlan, store: LatentStore, names: list[str], trips: Trips, on_pace: OnPace
) -> None:
    """Every clip length: its unfinished part, then parts for what is still missing."""
    with encoding_on(
        names, Share(project, plan.batch, plan.spec), trips, _telling(plan, len(names), on_pace)
    ) as encode:
        for frames in sorted({*plan.by_frames, *store.frames_of(plan.batch)}):
            while (part := _next_part(project, plan, store, frames, trips.failed)) is not None:
                encode(part)


def _next_part(
    project: Project, plan: EncodePlan, store: LatentStore, frames: int, failed: Collection[bytes]
) -> LatentPart | None:
    """The part that was begun and not finished, else a new one for what is missing and has not failed, else None."""
    part = store.unfinished(plan.batch, frames)
    if part is not None:
        return part
    missing = plan_encode(project, plan.batch, plan.spec).by_frames.get(frames)
    ids = [] if missing is None else [row for row in missing["row_id"].to_list() if row not in failed]
    if not ids:
        return None
    try:
        return store.plan_part(plan.batch, frames, ids)
    except ConflictError:  # somebody planned it first: help with theirs
        return _next_part(project, plan, store, frames, failed)


def _telling(plan: EncodePlan, count: int, on_pace: OnPace) -> Telling:
    """Turn what pipelines tell into a pace."""
    began = time.perf_counter()
    done, busy_s = 0, 0.0

    def batch(one: Batch) -> None:
        nonlocal done, busy_s
        done, busy_s = done + one.rows, busy_s + one.encode_s
        tell()

    def tell(note: str = "") -> None:
        seconds = time.perf_counter() - began
        on_pace(Pace(plan.batch, done, max(done, plan.rows.height), seconds, busy_s, count, note))

    return Telling(batch, tell)
