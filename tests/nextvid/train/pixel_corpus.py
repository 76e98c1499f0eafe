"""Pixels for the rows of a project whose latents were written by hand: a store of smooth clips, in milliseconds."""

from collections.abc import Collection

import polars as pl

from nextvid.config.project import Project
from nextvid.encode.plan import pixel_spec
from nextvid.trainset.trainset import Trainset
from storage.jpeg import encode_clip
from storage.part import PixelPart
from storage.schemas import PixelCommits
from storage.spec import PixelSpec
from storage.store import LatentStore, PixelStore
from tests.factories import commits, edit_project
from tests.storage.pixel_stores import clip


def ask_for_pixels(project: Project, quality: int = 90) -> Project:
    """The same project with `encoding.pixels` in its corpus.yaml."""
    return edit_project(project.path, lambda said: said["encoding"].update(pixels={"quality": quality}))


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
    psnr = pl.Series([None if row in without or n % 2 else 40.0 + n for n, row in enumerate(rows)], dtype=pl.Float32)
    chunks = [encode_clip(clip(row, part.frames, spec.resolution), spec.quality, spec.subsampling) for row in rows]
    said = commits(planned, without, PixelCommits, psnr_db=psnr)
    part.write_shard(shard, [None if row in without else chunk for row, chunk in zip(rows, chunks, strict=True)], said)
