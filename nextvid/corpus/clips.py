"""The asset `clips`: the curated clip manifest, one row for each view of a clip.

Computed at every call from `shots`, `media`, `labels` and corpus.yaml, and written only where it differs. Nothing is
decoded, so new thresholds, labels or policies cost seconds.
"""

import time
from collections import Counter
from collections.abc import Mapping

import polars as pl

from nextvid.config.benchmarks import BenchmarkConfig
from nextvid.config.datasets import DatasetConfig, FilterConfig
from nextvid.config.project import Project
from nextvid.corpus.assignment import latest
from nextvid.corpus.cutting import View, clip_id, row_id
from nextvid.corpus.gallery import Histogram, histograms_png, read_pictures, rejected_sheet
from nextvid.corpus.manifest import ClipRow, Label, MediaNow, WholeFile, hold_quota, rows_of, split_of
from nextvid.corpus.shots import facts_of
from nextvid.graph import GRAPH
from nextvid.making.batches import config_of, dataset_of
from nextvid.making.outcome import Check, Outcome
from nextvid.making.progress import OnProgress, Progress, silent
from nextvid.making.publishing import counts, publish_table, publish_verdict, table_digest
from storage import atomic, tables
from storage.errors import TableError
from storage.schemas import Clips, Labels, Media, Shots, Sources


def make_clips(project: Project, batch: str, on_progress: OnProgress = silent) -> Outcome:
    """Cut the batch's shots into clips and views for pretraining and each benchmark; publish table and checks.

    Raises UpstreamError where `media` or `shots` is missing or failed its checks, TableError where they are of two
    batches.
    """
    started_s = time.perf_counter()
    root, config = project.root, config_of(project, batch)
    for noun in ("media", "shots"):
        tables.require_checks(root.checks(noun, batch), noun)
    shots = tables.read_table(root.table("shots", batch), Shots)
    media = _media_now(project, batch, config)
    benchmarks = {n: b for n, b in project.corpus.benchmarks.items() if dataset_of(batch) in b.datasets}
    good = shots.filter(pl.col("status") == "ok")
    if unknown := set(good["media_id"]) - media.keys():
        raise TableError(
            f"{root.table('shots', batch)} has shots of {len(unknown)} files that the table 'media' of the batch does "
            "not have, as another batch's would: remove it and make 'shots' again"
        )
    files = {}
    if any(benchmark.policy.cut_from == "file" for benchmark in benchmarks.values()):
        files = {media_id: WholeFile.of(of.to_dicts()) for (media_id,), of in good.group_by("media_id")}
    rows: list[ClipRow] = []
    unlabelled: Counter[str] = Counter()
    for number, shot in enumerate(good.iter_rows(named=True), 1):
        filters, file = project.corpus.curation.filters, files.get(shot["media_id"])
        made = rows_of(shot, media[shot["media_id"]], config, filters, benchmarks, file)
        rows += made.rows
        unlabelled.update(made.unlabelled)
        on_progress(Progress(f"clips {batch}", number, good.height))
    if config.clips_per_media is not None:
        hold_quota(rows, config.clips_per_media)
    clips = pl.DataFrame(rows, Clips.create_empty().schema, orient="row")
    clips = clips.sort("media_id", "shot_id", "frames", "row_id", "reason")
    curation, version = project.corpus.curation_digest(dataset_of(batch)), str(GRAPH["clips"].version)
    checks, made_from = _checks(clips, shots, media, benchmarks), {"curation": curation, "version": version}
    written = publish_table(root, "clips", batch, clips, Clips)
    written |= publish_verdict(root.checks("clips", batch), "clips", checks, made_from)
    if written or not atomic.exists(root.preview("clips", batch, "scores")):
        _publish_pictures(project, batch, clips, good)
    return _outcome(project, batch, clips, checks, made_from, written, unlabelled, started_s)


def _media_now(project: Project, batch: str, config: DatasetConfig) -> dict[bytes, MediaNow]:
    """What is known of each media file by id; of several copies a present one is read, the first by name."""
    root = project.root
    media = tables.read_table(root.table("media", batch), Media).filter(pl.col("media_id").is_not_null())
    newest = latest(tables.read_table(root.table("sources", batch), Sources))
    labels: dict[bytes, list[Label]] = {}
    table = tables.read_table(root.table("labels", batch), Labels)
    for media_id, start_us, end_us, target, value in table.select(Labels.column_names()).iter_rows():
        labels.setdefault(media_id, []).append(Label(target, value, start_us, end_us))
    ranked = media.join(newest.select("uri", "revision", "gone_at", current=True), on=["uri", "revision"], how="left")
    ranked = ranked.with_columns(
        pl.when(pl.col("status") != "ok")
        .then(pl.col("reason"))
        .when(pl.col("current").is_null())
        .then(pl.lit("replaced"))  # the path has other bytes now: what is encoded stays, nothing more can be
        .alias("refused")
    ).sort(pl.col("refused").is_not_null(), pl.col("gone_at").is_not_null(), "uri", "revision")
    found = {}
    for row in ranked.unique("media_id", keep="first", maintain_order=True).iter_rows(named=True):
        known = labels.get(row["media_id"], [])
        reserved = {label.target: label.value for label in known if label.target in ("split", "group")}
        group = reserved.get("group")
        official = None if row["refused"] == "contradictory" else reserved.get("split")
        found[row["media_id"]] = MediaNow(
            uri=row["uri"],
            decoder=row["decoder"] or "pyav",  # of a file that may not be used
            reading=facts_of(row).reading if row["decoder"] else 1,
            fps_hz=row["fps_hz"] or 0.0,
            split=split_of(config.split, official, group, row["media_id"]),
            group=group,
            labels=tuple(known),
            refused=row["refused"],
        )
    return found


def _checks(
    clips: pl.DataFrame, shots: pl.DataFrame, media: Mapping[bytes, MediaNow], benchmarks: Mapping[str, BenchmarkConfig]
) -> tuple[Check, ...]:
    good = clips.filter(pl.col("status") == "ok")
    spans = shots.select(
        "shot_id",
        own=pl.struct("start_us", "end_us"),
        file=pl.struct(pl.col("start_us").min(), pl.col("end_us").max()).over("media_id"),
    )
    whole = [name for name, benchmark in benchmarks.items() if benchmark.policy.cut_from == "file"]
    of_file = pl.col("uses").list.eval(pl.element().is_in(whole)).list.all()  # others are used by shot as well
    joined = good.join(spans, on="shot_id", how="left")
    joined = joined.with_columns(span=pl.when(of_file).then("file").otherwise("own")).unnest("span")
    first, last, end = pl.col("times_us").list.first(), pl.col("times_us").list.last(), pl.col("end_us")
    moving = pl.col("end_us") > pl.col("start_us")  # an image is one moment, which ends where it starts
    after = pl.when(moving).then(last >= end).otherwise(last > end)
    across = joined.filter(end.is_null() | (first < pl.col("start_us")) | after)
    foreign = 0
    for row in good.iter_rows(named=True):
        clip = clip_id(row["media_id"].hex(), row["times_us"])
        view = View(row["crop_x"], row["crop_y"], row["crop_w"], row["crop_h"], row["flip"])
        ids = clip, row_id(clip, view, media[row["media_id"]].reading)
        foreign += (row["clip_id"].hex(), row["row_id"].hex()) != ids
    without = shots.filter(pl.col("status") == "ok").join(clips, on="shot_id", how="anti")
    return (
        Check(
            "no_clip_crosses_a_cut",
            across.is_empty(),
            {"crossing": across.height, "rows": good.height},
        ),
        Check(
            "ids_derive_from_content",
            foreign == 0 and good["row_id"].n_unique() == good.height,
            {"foreign": foreign, "repeated": good.height - good["row_id"].n_unique()},
        ),
        Check(
            "every_shot_has_a_row",
            without.is_empty(),
            {"shots_without_row": without.height},
        ),
    )


def _publish_pictures(project: Project, batch: str, clips: pl.DataFrame, shots: pl.DataFrame) -> None:
    """Pictures of what pretraining left out, and histograms of the scores with their thresholds."""
    root, filters = project.root, project.corpus.curation.filters
    atomic.publish_bytes(root.preview("clips", batch), rejected_sheet(clips, shots, read_pictures(root, batch)))
    videos = shots.filter(pl.col("kind") == "video")
    seconds = (videos["end_us"] - videos["start_us"]) / 1e6
    files = videos.group_by("media_id").agg((pl.col("end_us").max() - pl.col("start_us").min()) / 1e6)
    scores = (
        Histogram("motion, % of diagonal per 0.25 s", videos["motion_mean"], _limits(filters, "motion"), log=True),
        Histogram("shot length, s", seconds, log=True),
        Histogram("file length, s", files["end_us"], log=True),
        Histogram("frozen share", videos["freeze_share"], (None, filters.freeze_max)),
        Histogram("luma", shots["luma_mean"], _limits(filters, "luma")),
        Histogram("blur", shots["blur"], (filters.blur_min, None), log=True),
    )
    by_shot = clips.group_by("shot_id").agg(
        pl.when((pl.col("status") == "ok").any()).then(pl.lit("kept")).otherwise(pl.col("reason").first()).alias("what")
    )
    counts = {str(what): int(n) for what, n in by_shot.group_by("what").len().iter_rows()}
    atomic.publish_bytes(root.preview("clips", batch, "scores"), histograms_png(scores, counts))


def _limits(filters: FilterConfig, name: str) -> tuple[float | None, float | None]:
    return getattr(filters, f"{name}_min"), getattr(filters, f"{name}_max")


def _outcome(
    project: Project,
    batch: str,
    clips: pl.DataFrame,
    checks: tuple[Check, ...],
    made_from: Mapping[str, str],
    made: bool,
    unlabelled: Mapping[str, int],
    started_s: float,
) -> Outcome:
    good = clips.filter(pl.col("status") == "ok")
    by_use = good.explode("uses").group_by("uses").len()
    pictures = {
        "left out by pretraining": project.root.preview("clips", batch),
        "scores and lengths": project.root.preview("clips", batch, "scores"),
    }
    by_split = good.group_by(pl.col("split").cast(pl.String)).len()
    return Outcome(
        asset="clips",
        partition=batch,
        made=made,
        rows=clips.height,
        size_bytes=int(clips.estimated_size()),
        seconds=time.perf_counter() - started_s,
        digest=table_digest(project.root, "clips", batch),
        numbers={
            **counts(clips),
            "clips": good["clip_id"].n_unique(),
            **{f"for_{name}": int(number) for name, number in sorted(by_use.iter_rows())},
            **{f"split_{name}": int(number) for name, number in sorted(by_split.iter_rows())},
            "unlabelled": sum(unlabelled.values()),
            **{f"unlabelled_{name}": number for name, number in sorted(unlabelled.items())},
        },
        made_from=made_from,
        pictures={title: path for title, path in pictures.items() if atomic.exists(path)},
        checks=checks,
    )
