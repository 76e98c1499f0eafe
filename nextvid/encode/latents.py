"""The maker of `latents`: rows that a batch's store lacks are decoded, encoded, checked and committed, shard by shard.

plan.py decides which rows, pipeline.py encodes a part on one device, processes.py on several, checks.py reports. Killed
anywhere, the next call finishes the part that was begun, row for row the same.
"""

import time

from nextvid.config.project import Project
from nextvid.encode.checks import Report, publish_outcome, publish_refused
from nextvid.encode.pipeline import Advance, Tell, shares
from nextvid.encode.pixels import PixelWriter
from nextvid.encode.plan import BatchPlan, open_parts, pixel_spec, plan_encode
from nextvid.encode.preview import preview_png
from nextvid.encode.processes import Share, devices, encoding_on
from nextvid.encode.shard import RefusedShardError
from nextvid.making.outcome import Outcome
from nextvid.making.progress import OnPace, Pace
from storage.atomic import publish_bytes
from storage.latents import EncodingSpec, LatentStore
from storage.tables import require_checks


def make_latents(project: Project, batch: str, on_pace: OnPace = lambda pace: None) -> Outcome:
    """Encode what a batch lacks in the accepted spec, with its pixels if asked for; publish its checks and a picture.

    Raises UpstreamError without checked clips, RefusedShardError where a shard is refused: then nothing of it is
    committed, and the published checks name it.
    """
    began = time.perf_counter()
    require_checks(project.root.checks("clips", batch), "clips")
    plan = plan_encode(project, batch)
    store = LatentStore(project.root, plan.spec)
    store.create()
    names, report = devices(project.corpus.execution), Report()
    if plan.rows.height or any(store.unfinished(batch, frames) for frames in store.frames_of(batch)):
        try:
            report = _encode(project, plan, store, names, on_pace)
        except RefusedShardError as error:
            publish_refused(project, plan, error)
            raise
        if report.pictures:
            publish_bytes(project.root.preview("latents", batch), preview_png(report.pictures))
    with PixelWriter(project, batch, pixel_spec(project, plan.spec), shares(names[0], 1)[0]) as pixels:
        report += Report(pixels=pixels.rest(report.failed))
        return publish_outcome(project, plan, report, pixels.plan(), time.perf_counter() - began)


def _encode(
    project: Project, plan: BatchPlan[EncodingSpec], store: LatentStore, names: list[str], on_pace: OnPace
) -> Report:
    """Encode every clip length: its unfinished parts, then parts for rows that are missing and have not failed here."""
    report = Report()

    def missing(frames: int) -> list[bytes]:
        rows = plan_encode(project, plan.batch, plan.spec).by_frames.get(frames)
        return [] if rows is None else [row for row in rows["row_id"].to_list() if row not in report.failed]

    lengths = sorted({*plan.by_frames, *store.frames_of(plan.batch)})
    with encoding_on(names, Share(project, plan.batch, plan.spec), _paced(plan, len(names), on_pace)) as encode:
        for part in open_parts(store, plan.batch, lengths, missing):
            report += encode(part)
    return report


def _paced(plan: BatchPlan[EncodingSpec], count: int, on_pace: OnPace) -> Tell:
    """Turn what the pipelines of `count` devices tell into a pace."""
    began = time.perf_counter()
    done, busy_s = 0, 0.0

    def tell(advance: Advance) -> None:
        nonlocal done, busy_s
        done, busy_s = done + advance.rows, busy_s + advance.encode_s
        seconds = time.perf_counter() - began
        on_pace(Pace(plan.batch, done, max(done, plan.rows.height), seconds, busy_s, count, advance.note))

    return tell
