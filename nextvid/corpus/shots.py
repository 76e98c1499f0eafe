"""The asset `shots`: decode each media file once, cut it into shots, score them; and a contact sheet.

A file that is in a batch twice is decoded once. A file that fails is one row without a shot id, which the next call
tries again. Everything is made again when the configuration of this first pass changes, and when its code does.
Thresholds do not belong to it: `clips` applies them, so that changing one decodes nothing.
"""

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl

from nextvid.config.datasets import ShotConfig
from nextvid.config.project import Project
from nextvid.corpus.assignment import latest
from nextvid.corpus.cutting import shot_id
from nextvid.corpus.gallery import KeptPictures, SheetRow, Tile, contact_sheet, publish_pictures
from nextvid.machine import taken_cores
from nextvid.making.batches import batch_state, config_of, made_by_older
from nextvid.making.outcome import Check, Outcome
from nextvid.making.progress import OnProgress, Progress, silent
from nextvid.making.publishing import counts, existing, publish_table, publish_verdict, table_digest
from nextvid.video.fetch import map_files
from nextvid.video.probe import MediaFacts
from nextvid.video.sandbox import Sandbox
from nextvid.video.shots import ShotFacts, first_pass
from storage import atomic, tables
from storage.errors import MediaError
from storage.schemas import Media, Shots, Sources

ShotRow = dict[str, Any]  # a row of Shots or Media

# Our measurements: a process starts in 0.6 s (nextvid/video/sandbox.py), in which another decodes 25 videos of 3 s at
# 64 pixels, or 20 s of video at 360p.
FILES_A_WORKER, SECONDS_A_WORKER = 25, 20
TIMEOUT_S = 120.0  # our choice, for what does not grow with the video
TIMEOUT_A_SECOND = 2.0  # for each second of video; we measured 0.1 at 1080p, the rest is for 4K and a busy machine
LONGEST_S = 6 * 3600.0  # our choice: the duration that a file declares may be wrong
SHEET_FILES, SHEET_SHOTS = 16, 16  # our choice: a sheet that loads at once
NAME_LETTERS = 28  # as many as fit the width of a tile


@dataclass(frozen=True)
class _Seen:
    """A row of Media and the result of its first pass."""

    media: ShotRow
    result: list[ShotFacts] | MediaError


def make_shots(project: Project, batch: str, on_progress: OnProgress = silent) -> Outcome:
    """Decode the batch's files that have no shots yet; publish the table, the contact sheet and the checks.

    Raises UpstreamError where `media` is missing or failed its checks.
    """
    started_s = time.perf_counter()
    root, config = project.root, project.corpus.curation.shots
    config_of(project, batch)
    tables.require_checks(root.checks("media", batch), "media")
    media = tables.read_table(root.table("media", batch), Media)
    sources = tables.read_table(root.table("sources", batch), Sources)
    state = batch_state(root, batch, "media", "shots")
    same = state.made_from("shots", "first_pass") == config.digest() and "shots" not in made_by_older(project, state)
    before = existing(root, "shots", batch, Shots) if same else Shots.create_empty()
    new, lost = _without_shots(media, sources, before)
    rows = [_failed(row, "gone", "the file was removed before it was decoded", "rejected") for row in lost]
    pictured, kept = _Sheet([bytes(row["media_id"]) for row in new]), KeptPictures()
    for number, seen in enumerate(_first_passes(new, config, project.corpus.execution.cores), 1):
        pictured.add(seen)
        match seen.result:
            case MediaError() as error:
                rows.append(_failed(seen.media, error.reason, str(error), "quarantined"))
            case []:
                why = "every run of frames is too short to hold a sample"
                rows.append(_failed(seen.media, "no_shot", why, "rejected"))
            case found:
                for index, shot in enumerate(found):
                    rows.append(row := _row(seen.media, index, shot))
                    kept.add(row["shot_id"], shot)
        on_progress(Progress(f"shots {batch}", number, len(new)))
    redone = pl.Series([row["media_id"] for row in rows], dtype=pl.Binary).unique()
    shots = pl.concat(
        [before.filter(~pl.col("media_id").is_in(redone.implode())), pl.DataFrame(rows, before.schema, orient="row")]
    )
    shots = shots.sort("media_id", "shot_index")
    version = state.version_now("shots", kept=before.height > 0)
    made_from = {"first_pass": config.digest(), "version": version, "media": str(state.version("media"))}
    checks = _checks(shots, media)
    written = publish_table(root, "shots", batch, shots, Shots)
    if pictured.rows:
        atomic.publish_bytes(root.preview("shots", batch), pictured.png())
        written = True
    publish_pictures(root, batch, kept, shots)
    written |= publish_verdict(root.checks("shots", batch), "shots", checks, made_from)
    return _outcome(project, batch, shots, checks, made_from, written, len(rows), len(new), started_s)


def _outcome(
    project: Project,
    batch: str,
    shots: pl.DataFrame,
    checks: tuple[Check, ...],
    made_from: Mapping[str, str],
    made: bool,
    rows_made: int,
    viewed: int,
    started_s: float,
) -> Outcome:
    good = shots.filter(pl.col("status") == "ok")
    preview = project.root.preview("shots", batch)
    return Outcome(
        asset="shots",
        partition=batch,
        made=made,
        rows=shots.height,
        rows_made=rows_made,
        size_bytes=int(shots.estimated_size()),
        seconds=time.perf_counter() - started_s,
        quarantined=shots.filter(pl.col("status") == "quarantined").height,
        digest=table_digest(project.root, "shots", batch),
        numbers={
            **counts(shots),
            "viewed": viewed,
            "files": shots["media_id"].n_unique(),
            "video_s": int((good["end_us"] - good["start_us"]).sum()) / 1e6,
            "hashes": int(good["hashes"].list.len().sum()),
        },
        made_from=made_from,
        pictures={"shots": preview} if atomic.exists(preview) else {},
        checks=checks,
    )


def _without_shots(
    media: pl.DataFrame, sources: pl.DataFrame, before: pl.DataFrame
) -> tuple[list[ShotRow], list[ShotRow]]:
    """Of media without shots, sorted by id: (one file of each that is present, one row of each that is not)."""
    good = media.filter(pl.col("status") == "ok").sort("media_id", "uri", "revision")
    done = before.filter(
        (pl.col("status") != "quarantined") & (pl.col("reason").is_null() | (pl.col("reason") != "gone"))
    )
    missing = tables.missing_rows(good, done, "media_id")
    present = latest(sources).filter(pl.col("gone_at").is_null()).select("uri", "revision")
    here = missing.join(present, on=["uri", "revision"], how="semi", maintain_order="left")
    first = here.unique("media_id", keep="first", maintain_order=True)
    lost = tables.missing_rows(missing, here, "media_id").unique("media_id", keep="first", maintain_order=True)
    return list(first.iter_rows(named=True)), list(lost.iter_rows(named=True))


def _first_passes(new: Sequence[ShotRow], config: ShotConfig, cores: int | None) -> Iterator[_Seen]:
    """Decode and score rows of Media in the sandbox, on at most so many cores; results as they finish."""
    if not new:
        return
    longest_s = min(LONGEST_S, max(row["duration_us"] for row in new) / 1e6)
    timeout_s = TIMEOUT_S + TIMEOUT_A_SECOND * longest_s
    seconds = sum(row["duration_us"] for row in new) / 1e6
    worth = max(len(new) // FILES_A_WORKER, int(seconds / SECONDS_A_WORKER))
    rows = {row["uri"]: row for row in new}
    tasks = ((uri, (facts_of(row), config)) for uri, row in rows.items())
    with (
        taken_cores(worth, cores) as workers,
        tempfile.TemporaryDirectory(prefix="nextvid-") as folder,
        Sandbox(workers) as sandbox,
    ):
        for uri, _, result in map_files(sandbox, first_pass, tasks, Path(folder), timeout_s):
            yield _Seen(rows[uri], result)


def facts_of(media: ShotRow) -> MediaFacts:
    """The properties in a row of Media with status ok."""
    names = MediaFacts.__dataclass_fields__
    return MediaFacts(**{name: media[name] for name in names if name != "hazards"}, hazards=tuple(media["hazards"]))


def _row(media: ShotRow, index: int, shot: ShotFacts) -> ShotRow:
    row = _blank(media)
    row.update({name: getattr(shot, name) for name in row if hasattr(shot, name)})
    return row | {
        "shot_index": index,
        "shot_id": bytes.fromhex(shot_id(media["media_id"].hex(), shot.start_us, shot.end_us)),
        "hashes": list(shot.hashes),
        "hash_quality": list(shot.hash_quality),
        "hash_times_us": list(shot.hash_times_us),
        "status": "ok",
    }


def _failed(media: ShotRow, reason: str, error: str, status: str) -> ShotRow:
    return _blank(media) | {
        "start_us": 0,
        "end_us": 0,
        "cut_in": "edge",
        "cut_out": "edge",
        "shot_index": 0,
        "status": status,
        "reason": reason,
        "error": error,
    }


def _blank(media: ShotRow) -> ShotRow:
    row: ShotRow = dict.fromkeys(Shots.column_names())
    row.update({name: media[name] for name in ("media_id", "dataset", "batch", "uri", "kind")})
    return row | {"hashes": [], "hash_quality": [], "hash_times_us": []}


def _checks(shots: pl.DataFrame, media: pl.DataFrame) -> tuple[Check, ...]:
    """Whether shots are within their file, to one frame, and not in each other."""
    files = (
        media.filter(pl.col("status") == "ok")
        .unique("media_id")
        .select("media_id", "fps_hz", "duration_us", begin="start_us")
    )
    videos = shots.filter((pl.col("status") == "ok") & (pl.col("kind") == "video")).sort("media_id", "start_us")
    joined = videos.join(files, on="media_id")
    frame_us = 1e6 / pl.col("fps_hz")
    outside = joined.filter(
        (pl.col("start_us") < pl.col("begin") - frame_us)
        | (pl.col("end_us") > pl.col("begin") + pl.col("duration_us") + frame_us)
    )
    over = videos.filter(pl.col("start_us") < pl.col("end_us").shift(1).over("media_id"))
    return (
        Check(
            "intervals_inside_file",
            outside.is_empty(),
            {"outside": outside.height, "shots": videos.height},
        ),
        Check("no_overlap", over.is_empty(), {"overlapping": over.height}),
    )


class _Sheet:
    """Pictures of the shots of a few files, chosen evenly from those that are decoded."""

    def __init__(self, media: Sequence[bytes]) -> None:
        step = max(1, len(media) // SHEET_FILES)
        self.chosen = set(media[::step][:SHEET_FILES])
        self.rows: dict[bytes, SheetRow] = {}

    def add(self, seen: _Seen) -> None:
        """Keep the pictures of a chosen file."""
        media_id = seen.media["media_id"]
        if media_id not in self.chosen or isinstance(seen.result, MediaError):
            return
        tiles = []
        for shot in seen.result[:SHEET_SHOTS]:
            times = f"{shot.start_us / 1e6:.2f}-{shot.end_us / 1e6:.2f} s {shot.cut_in} {shot.score:.0f}"
            scores = f"motion {shot.motion_mean:.2f} luma {shot.luma_mean:.0f} blur {shot.blur:.0f}"
            tiles.append(Tile(shot.preview, f"{times}\n{scores}", shot.cut_in))
        left_out = len(seen.result) - len(tiles)
        header = f"{seen.media['path']}" + (f"  (and {left_out} shots more)" if left_out > 0 else "")
        self.rows[media_id] = SheetRow(header, tiles)

    def png(self) -> bytes:
        """The sheet, files sorted by media id; those of one shot share lines, their names cut to a tile's width."""
        rows = [self.rows[key] for key in sorted(self.rows)]
        single = [row for row in rows if len(row.tiles) == 1]
        named = [
            replace(tile, caption=f"{row.header[-NAME_LETTERS:]}\n{tile.caption.splitlines()[-1]}")
            for row in single
            for tile in row.tiles
        ]
        several = [row for row in rows if len(row.tiles) > 1]
        return contact_sheet([*several, SheetRow("files of one shot", named)] if named else several)
