"""Pixels for the rows of a project whose latents were written by hand: a store of smooth clips, in milliseconds."""

from collections.abc import Collection

import polars as pl
import yaml

from nextvid.config.project import Project, open_project
from nextvid.encode.plan import pixel_spec
from nextvid.trainset.trainset import Trainset
from storage.jpeg import encode_clip
from storage.latents import LatentStore
from storage.pixels import PixelPart, PixelSpec, PixelStore
from storage.schemas import PixelCommits
from tests.storage.pixel_stores import clip


def ask_for_pixels(project: Project, quality: int = 90) -> Project:
    """The same project with `encoding.pixels` in its corpus.yaml."""
    said = yaml.safe_load(project.path.read_text())
    said["encoding"]["pixels"] = {"quality": quality}
    project.path.write_text(yaml.safe_dump(said))
    return open_project(project.path)


def spec_of(project: Project) -> PixelSpec:
    found = pixel_spec(project, Trainset.open(project.root).spec)
    assert found is not None
    return found


def write_pixels(project: Project, without: Collection[bytes] = ()) -> PixelStore:
    """Pixels of every row of the trainset's encoding, except those in `without`, which fail."""
    store = PixelStore(project.root, spec_of(project))
    store.create()
    latents = LatentStore(project.root, Trainset.open(project.root).spec)
    for batch in latents.batches():
        for frames in latents.frames_of(batch):
            rows = latents.commits(batch, frames).filter(pl.col("status") == "ok")["row_id"].to_list()
            part = store.plan_part(batch, frames, sorted(rows))  # in another order than the latents
            for shard in range(part.shards):
                write_shard(part, shard, without)
    return store


def write_shard(part: PixelPart, shard: int, without: Collection[bytes] = ()) -> None:
    planned, spec = part.rows_of(shard), part.spec
    rows = planned["row_id"].to_list()
    lost = [row in without for row in rows]
    commits = planned.with_columns(
        status=pl.Series(["quarantined" if gone else "ok" for gone in lost]),
        reason=pl.Series(["timeout" if gone else None for gone in lost], dtype=pl.String),
        offset=pl.lit(None, pl.UInt64),
        size_bytes=pl.lit(None, pl.UInt32),
        crc32c=pl.lit(None, pl.UInt32),
        psnr_db=pl.Series([None if gone or n % 2 else 40.0 + n for n, gone in enumerate(lost)], dtype=pl.Float32),
        encode_s=pl.lit(0.0, pl.Float32),
    ).select(PixelCommits.column_names())
    clips = [clip(row, part.frames, spec.resolution) for row in rows]
    chunks = [encode_clip(frames, spec.quality, spec.subsampling) for frames in clips]
    part.write_shard(shard, [None if gone else chunk for chunk, gone in zip(chunks, lost, strict=True)], commits)
