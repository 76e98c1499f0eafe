"""The asset `media`: one row for each listed file with its id, properties, decoder and status; and its labels.

Every file is read in the sandbox, once per revision; a file that fails is a row that the next call tries again. Labels
are joined at each call, so a changed label file costs no reading. A withdrawn file, one with contradictory labels, or
one of a licence that is not used, is rejected for as long as the cause lasts.
"""

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import polars as pl

from nextvid.config.datasets import DatasetConfig
from nextvid.config.project import Project
from nextvid.corpus.assignment import latest
from nextvid.corpus.labels import contradictions, doubled, label_checks, read_labels
from nextvid.corpus.members import DAMAGED, DOUBLED
from nextvid.corpus.sources import NOT_UTF8, batch_fingerprint, is_below, known_sources
from nextvid.machine import taken_cores
from nextvid.making.batches import batch_state, config_of, dataset_of, made_by_older
from nextvid.making.outcome import Check, Outcome
from nextvid.making.progress import OnProgress, Progress, silent
from nextvid.making.publishing import counts, existing, publish_table, publish_verdict, table_digest
from nextvid.video.archives import split_uri
from nextvid.video.fetch import by_uri, map_files
from nextvid.video.probe import Inspection, identify, inspect_file
from nextvid.video.sandbox import Sandbox
from storage import tables
from storage.errors import MediaError
from storage.remote import is_local
from storage.schemas import Labels, Media, Sources
from storage.withdrawn import withdrawn_media

MediaRow = dict[str, Any]  # a row of Media or Sources

# Our measurement: a process starts in 0.6 s (nextvid/video/sandbox.py), in which another probes 500 pictures or hashes
# 750 MB.
FILES_A_WORKER, BYTES_A_WORKER = 500, 750_000_000
TIMEOUT_S = 60.0  # our choice: a probe takes milliseconds; the rest is for reading the file, below
READ_BYTES_PER_S = 10_000_000  # our choice: a slow network disk
LIFTABLE = ("contradictory", "ambiguous_name", "withdrawn", "outside", "licence")  # reasons that end with their cause


def make_media(project: Project, batch: str, on_progress: OnProgress = silent) -> Outcome:
    """Probe the batch's new files, join labels, publish both tables and their checks.

    Raises UpstreamError where the batch is unknown and CorpusError for its label file.
    """
    started_s = time.perf_counter()
    root, config = project.root, config_of(project, batch)
    # before the tables are read: a file that is listed later asks for a new run
    listing, state = batch_fingerprint(project, batch), batch_state(root, batch, "media")
    sources = tables.read_table(root.table("sources", batch), Sources).sort("uri", "revision")
    before = _placed(existing(root, "media", batch, Media), sources)
    unread = _unread(before.clear() if made_by_older(project, state) else before, sources)
    kept = _kept(before, unread)
    made_from = {"listing": listing, "version": state.version_now("media", kept=kept.height > 0)}
    rows = _never_read(sources, before, config.licence) + _inspect(
        unread,
        config,
        project.corpus.execution.cores,
        lambda done: on_progress(Progress(f"media {batch}", done, unread.height)),
    )
    media = pl.concat([kept, pl.DataFrame(rows, before.schema, orient="row")]).sort("uri", "revision")
    media, labels = _labelled(media, read_labels(config, media["path"].to_list()), config)
    every = (
        known_sources(project, dataset_of(batch)) if config.labels.every_file() or config.labels.by_name else sources
    )
    present = latest(every).filter(pl.col("gone_at").is_null())  # labels by name need those of the whole dataset
    media = _judge(media, labels, withdrawn_media(root), doubled(config, present["path"].to_list()), config.licences)
    good = media.filter(pl.col("status") == "ok")
    bare = good.filter(~pl.col("media_id").is_in(labels["media_id"].implode()))["path"].to_list()
    checks = (
        *_checks(sources, media, config.quarantine_budget),
        *label_checks(dataset_of(batch), config, every["path"].to_list(), good["path"].to_list(), bare),
        _spans_inside(media, labels),
    )
    written = publish_table(root, "media", batch, media, Media)
    written |= publish_table(root, "labels", batch, labels, Labels)
    written |= publish_verdict(root.checks("media", batch), "media", checks, made_from)
    named = media.filter(pl.col("media_id").is_in(labels["media_id"].implode()))
    return Outcome(
        asset="media",
        partition=batch,
        made=written,
        rows=media.height,
        rows_made=unread.height,
        size_bytes=int(media["size_bytes"].sum()),
        seconds=time.perf_counter() - started_s,
        quarantined=media.filter(pl.col("status") == "quarantined").height,
        digest=table_digest(root, "media", batch),
        numbers={
            **counts(media),
            "read": unread.height,
            "video_s": int(media["duration_us"].fill_null(0).sum()) / 1e6,
            "labels": labels.height,
            "labelled_files": named.height,
        },
        made_from=made_from,
        checks=checks,
    )


def _placed(before: pl.DataFrame, sources: pl.DataFrame) -> pl.DataFrame:
    """Rows under the URIs of now, where the dataset's folder is a copy elsewhere (`assignment.placed`)."""
    lost = before.join(sources, on=["uri", "revision"], how="anti")
    now = sources.select("path", "revision", now="uri").unique(["path", "revision"], keep="none")
    moved = lost.join(now, on=["path", "revision"], how="left", maintain_order="left")
    moved = moved.with_columns(uri=pl.coalesce("now", "uri")).drop("now")
    return pl.concat([before.join(sources, on=["uri", "revision"], how="semi"), moved])


def _kept(before: pl.DataFrame, unread: pl.DataFrame) -> pl.DataFrame:
    """Rows of files that are not read again. Reasons for rejection that may have ended are removed."""
    lift = pl.col("reason").is_in(LIFTABLE) & pl.col("decoder").is_not_null()
    status = pl.when(lift).then(pl.lit("ok")).otherwise(pl.col("status").cast(pl.String))
    empty = pl.lit(None, pl.String)
    rows = before.with_columns(
        status.cast(before.schema["status"]).alias("status"),
        pl.when(lift).then(empty).otherwise(pl.col("reason")).alias("reason"),
        pl.when(lift).then(empty).otherwise(pl.col("error")).alias("error"),
    )
    return tables.missing_rows(rows, unread, ["uri", "revision"])


def _unread(before: pl.DataFrame, sources: pl.DataFrame) -> pl.DataFrame:
    """Listed files to read: present, of the newest revision, and not read without error yet."""
    readable = latest(sources).filter(pl.col("gone_at").is_null())
    failed = (pl.col("status") == "quarantined") | (pl.col("reason") == "gone").fill_null(False)
    lost = pl.col("reason").is_in(LIFTABLE).fill_null(False) & pl.col("decoder").is_null()
    return tables.missing_rows(readable, before.filter(~(failed | lost)), ["uri", "revision"])


def _never_read(sources: pl.DataFrame, before: pl.DataFrame, licence: str) -> list[MediaRow]:
    """Rows of revisions that were replaced or removed before they were read."""
    never = tables.missing_rows(sources, before, ["uri", "revision"])
    newest = latest(sources).select("uri", newest=pl.col("revision"))
    rows = []
    for row in never.join(newest, on="uri").iter_rows(named=True):
        if row["revision"] < row["newest"]:
            rows.append(_row(row, licence, reason="replaced", error="a newer revision was listed", rejected=True))
        elif row["gone_at"] is not None:
            rows.append(
                _row(row, licence, reason="gone", error="the file was removed before it was read", rejected=True)
            )
    return rows


def _inspect(
    unread: pl.DataFrame, config: DatasetConfig, cores: int | None, on_count: Callable[[int], None]
) -> list[MediaRow]:
    """One row per file, read in the sandbox, on at most so many cores."""
    rows: list[MediaRow] = []
    licence = config.licence
    files: dict[str, MediaRow] = {}
    for source in unread.iter_rows(named=True):
        if (why := _refused(source, config.follow_links)) is None:
            files[source["uri"]] = source
        else:
            reason, error = why
            rows.append(_row(source, licence, reason=reason, error=error, rejected=reason != "damaged_archive"))
    if not files:
        return rows
    sizes_bytes = [source["size_bytes"] for source in files.values()]
    timeout_s = TIMEOUT_S + max(sizes_bytes) / READ_BYTES_PER_S
    worth = max(len(files) // FILES_A_WORKER, sum(sizes_bytes) // BYTES_A_WORKER)
    with (
        taken_cores(worth, cores) as workers,
        tempfile.TemporaryDirectory(prefix="nextvid-") as folder,
        Sandbox(workers) as sandbox,
    ):
        tasks = ((uri, ()) for uri in files)
        for uri, path, result in map_files(sandbox, inspect_file, tasks, Path(folder), timeout_s):
            if isinstance(result, MediaError) and path is not None:
                with suppress(MediaError):  # it still gets an id, so that it can be withdrawn or recognised
                    media, size_bytes = sandbox.call(identify, path, timeout_s=timeout_s)
                    result = Inspection(media, size_bytes, None, result.reason, str(result))
            row = _inspected(files[uri], licence, result)
            if path is not None and row["error"] is not None:
                row["error"] = by_uri(row["error"], path, uri)
            rows.append(row)
            on_count(len(rows))
    return rows


def _refused(source: MediaRow, followed: Sequence[str]) -> tuple[str, str] | None:
    """(reason, error) of a file that is not opened, by its listing."""
    mark = source["fingerprint"]
    if mark == NOT_UTF8:
        return "bad_name", "its name is not UTF-8 and shown with escapes; rename the file"
    if mark.startswith(DAMAGED):
        damage, _, _ = mark.removeprefix(DAMAGED).rpartition("; ")
        return "damaged_archive", f"{damage}; what can be read before is listed. Fetch or write it again"
    if mark.startswith(DOUBLED):
        return "doubled_member", "two members of its archive have this name; rename one"
    if is_local(source["uri"]):
        path = source["uri"].removeprefix("file://")
        archive = split_uri(path)
        real = os.path.realpath(archive[0] if archive else path)
        if not is_below(real, (path.removesuffix(source["path"]), *followed)):
            return (
                "outside",
                f"a link to {real}, outside of the dataset's folder; name the folder there under 'follow_links'",
            )
    return None


def _inspected(source: MediaRow, licence: str, result: Inspection | MediaError) -> MediaRow:
    if isinstance(result, MediaError):
        return _row(source, licence, reason=result.reason, error=str(result))
    media_id = bytes.fromhex(result.media)
    if result.size_bytes != source["size_bytes"]:
        error = f"{result.size_bytes} bytes were read, {source['size_bytes']} were listed: list the dataset again"
        return _row(source, licence, media_id, reason="changed", error=error)
    if result.facts is None:
        return _row(source, licence, media_id, reason=result.reason, error=result.error)
    facts = result.facts
    row = _row(source, licence, media_id)
    row.update({name: getattr(facts, name) for name in row if hasattr(facts, name)})
    return row | {"hazards": list(facts.hazards), "status": "ok"}


def _row(
    source: MediaRow,
    licence: str,
    media_id: bytes | None = None,
    *,
    reason: str | None = None,
    error: str | None = None,
    rejected: bool = False,
) -> MediaRow:
    """A row of Media without properties, quarantined unless `rejected`."""
    row = dict.fromkeys(Media.column_names())
    row.update({name: source[name] for name in ("uri", "revision", "dataset", "batch", "path", "kind", "size_bytes")})
    status = "rejected" if rejected else "quarantined"
    return row | {
        "media_id": media_id,
        "hazards": [],
        "licence": licence,
        "status": status,
        "reason": reason,
        "error": error,
    }


def _labelled(media: pl.DataFrame, by_path: pl.DataFrame, config: DatasetConfig) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Files with the licence of their label file, else of their dataset, and labels by media id.

    Spans are on the file's own clock. A file has the labels of all its copies.
    """
    newest = latest(media).filter(pl.col("media_id").is_not_null())
    newest = newest.select("path", "media_id", begin=pl.col("start_us").fill_null(0))
    rows = newest.join(by_path, on="path")
    if config.labels.clock == "first_frame":
        rows = rows.with_columns(pl.col("start_us", "end_us") + pl.col("begin"))
    labels = rows.select(Labels.column_names()).unique().sort("media_id", "target", "start_us", "end_us", "value")
    named = labels.filter(pl.col("target") == "licence").unique("media_id").select("media_id", named="value")
    joined = media.join(named, on="media_id", how="left", maintain_order="left")
    return joined.with_columns(licence=pl.coalesce("named", pl.lit(config.licence))).drop("named"), labels


def _judge(
    media: pl.DataFrame,
    labels: pl.DataFrame,
    withdrawn: frozenset[bytes],
    twice: Mapping[str, str],
    licences: Sequence[str],
) -> pl.DataFrame:
    """Reject withdrawn files, those that share the name that labels go by, with contradictory labels or other licences.

    Without `licences` all are used.
    """
    against = dict(contradictions(labels, "media_id").iter_rows())
    rows = []
    judged = media.select("path", "media_id", "status", "reason", "error", "licence")
    for path, media_id, status, reason, error, licence in judged.iter_rows():
        if media_id in withdrawn:
            rows.append(("rejected", "withdrawn", "withdrawn by request; its latents are zeroed"))
        elif path in twice and status == "ok":
            error = f"its labels go by name, and {twice[path]} has the same one: rename one, or label by path in a csv"
            rows.append(("rejected", "ambiguous_name", error))
        elif media_id in against and status == "ok":
            rows.append(("rejected", "contradictory", f"its labels contradict each other: {against[media_id]}"))
        elif licences and licence not in licences and status == "ok":
            rows.append(("rejected", "licence", f"its licence is '{licence}', which 'licences' does not name"))
        else:
            rows.append((status, reason, error))
    schema = {"status": media.schema["status"], "reason": pl.String(), "error": pl.String()}
    return media.with_columns(pl.DataFrame(rows, schema, orient="row").get_columns())


def _checks(sources: pl.DataFrame, media: pl.DataFrame, budget: float) -> tuple[Check, ...]:
    present = latest(sources).filter(pl.col("gone_at").is_null()).select("uri", "revision")
    current = media.join(present, on=["uri", "revision"], how="semi")  # not files that were repaired or removed
    quarantined = current.filter(pl.col("status") == "quarantined").height
    share = quarantined / max(1, current.height)
    return (
        Check(
            "rows_are_files_listed",
            media.height == sources.height,
            {"rows": media.height, "files": sources.height},
        ),
        Check(
            "quarantined_within_budget",
            share <= budget,
            {"share": share, "quarantined": quarantined, "budget": budget},
        ),
    )


def _spans_inside(media: pl.DataFrame, labels: pl.DataFrame) -> Check:
    """Spans outside of their video label nothing; they are reported here, since labels have no status."""
    files = media.filter(pl.col("status") == "ok").unique("media_id")
    spans = labels.join(files.select("media_id", "path", "duration_us", begin="start_us"), on="media_id")
    outside = spans.filter(
        (pl.col("start_us") >= pl.col("begin") + pl.col("duration_us")) | (pl.col("end_us") <= pl.col("begin"))
    ).sort("path", "start_us")
    numbers: dict[str, int | float | str] = {"outside": outside.height, "labels": labels.height}
    if outside.height:
        first = outside.row(0, named=True)
        numbers["such_as"] = f"{first['path']}: {first['start_us']} to {first['end_us']} us"
    return Check(
        "spans_inside_video",
        outside.is_empty(),
        numbers,
    )
