"""What is accepted while corpus.yaml asks for other things: `reencode: ask` and `auto` (docs/decisions/0031)."""

import shutil
from pathlib import Path

import dagster as dg
import polars as pl
import pytest

from nextvid.config.accepted import accepted
from nextvid.config.project import Project
from nextvid.encode.plan import accepted_spec
from nextvid.making.batches import batch_state
from nextvid.planning.acceptance import accept_asked, outdated
from nextvid.planning.costs import publish_forecast
from storage.schemas import Clips
from storage.store import LatentStore, PixelStore
from storage.tables import read_table
from tests.orchestration.ticks import committed, edit, look, run, tick

pytestmark = pytest.mark.slow

VIDEOS, IMAGES = "demo_videos.000000", "demo_images.000000"
ASK = ("reencode: auto", "reencode: ask")
SHORTER = (
    "- {frames: 8, fps: 4, crop: whole, flip: false, pad: skip}",
    "- {frames: 4, fps: 4, crop: whole, pad: skip}",
)
PIXELS = ("  storage: float16", "  storage: float16\n  pixels: {quality: 80}")


def said(project: Project, instance: dg.DagsterInstance) -> str:
    """Why the sensor asked for nothing, once the job `forecast` has run."""
    publish_forecast(project)
    result = look(project, instance)
    assert result.run_requests == []
    assert result.skip_reason is not None
    return str(result.skip_reason.skip_message)


def drop(project: Project) -> str:
    """One more film among the videos: a copy with a digest of its own; its URI."""
    videos = Path(project.root.url) / "corpus" / "videos"
    added = videos / "added.mp4"
    shutil.copy(next(path for path in sorted(videos.rglob("scene_*.mp4"))), added)
    with added.open("ab") as file:
        file.write(b"\x00\x00\x00\x10free" + bytes(8))
    return str(added)


def pixels(project: Project) -> int:
    """How many rows have pixels."""
    stores = PixelStore.every(project.root)
    return sum(
        store.commits(batch).filter(pl.col("status") == "ok").height for store in stores for batch in (VIDEOS, IMAGES)
    )


def test_asked_before_encoding_anew_and_not_when_told_so(made: tuple[Project, dg.DagsterInstance]) -> None:
    project, instance = made
    other = edit(project, ("resolution: 64", "resolution: 32"), ("reencode: auto", "reencode: ask"))
    message = said(other, instance)
    assert "the accepted encoding: 2 batches are outdated" in message
    assert f"{committed(project).height} rows" in message
    assert "nextvid plan --accept" in message
    assert tick(edit(other, ("trim_s: 0.25", "trim_s: 0.5")), instance) == [], "nor for another curation"

    auto = edit(other, ("reencode: ask", "reencode: auto"))
    asked = {request.partition_key for request in tick(auto, instance)}
    assert asked == {"demo_images.000000", "demo_videos.000000"}
    assert len(LatentStore.every(project.root)) == 2, "a new spec grows a new store beside the old one"


def test_a_new_file_keeps_the_accepted_curation(made: tuple[Project, dg.DagsterInstance]) -> None:
    project, instance = made
    stands = accepted(project.root)
    before = committed(project)
    other = edit(project, ASK, SHORTER)
    assert outdated(other) == ("curation",)
    message = said(other, instance)
    assert "the accepted curation: 1 batches are outdated" in message
    uri = drop(other)
    tick(other, instance)
    asked = tick(other, instance)
    assert [request.partition_key for request in asked] == [VIDEOS]
    assert run(other, instance, asked) == [True]
    assert accepted(other.root) == stands
    assert batch_state(other.root, VIDEOS, "clips").made_from("clips", "curation") == project.corpus.curation_digest(
        "demo_videos"
    )
    clips = read_table(other.root.table("clips", VIDEOS), Clips)
    new = committed(other).join(before, on="row_id", how="anti")
    assert set(clips.filter(pl.col("row_id").is_in(new["row_id"].implode()))["uri"]) == {uri}
    assert set(new["frames"]) == {8}, "the new file's clips are as long as those of the others"
    assert tick(other, instance) == []

    accept_asked(other)
    (request,) = tick(other, instance)
    assert request.partition_key == VIDEOS
    assert run(other, instance, [request]) == [True]
    assert set(committed(other).filter(pl.col("batch") == VIDEOS)["frames"]) == {4, 8}, "what benchmarks use is of 8"
    assert tick(other, instance) == []


def test_a_new_file_keeps_the_accepted_encoding(made: tuple[Project, dg.DagsterInstance]) -> None:
    project, instance = made
    before = committed(project)
    other = edit(project, ASK, ("resolution: 64", "resolution: 32"))
    drop(other)
    tick(other, instance)
    assert run(other, instance, tick(other, instance)) == [True]
    assert accepted_spec(other).resolution == 64
    assert committed(other).height > before.height
    assert [store.spec.resolution for store in LatentStore.every(other.root)] == [64]


def test_pixels_wait_for_a_person_or_are_asked_for(project: Project, instance: dg.DagsterInstance) -> None:
    first = tick(project, instance) + tick(project, instance)
    assert run(project, instance, first) == [True, True]
    other = edit(project, ASK, PIXELS)
    rows = committed(project).height
    message = said(other, instance)
    assert "the accepted pixels: 2 batches are outdated, 0 rows, 0 bytes" in message
    assert f"{rows} rows without pixels (" in message
    assert "decode-s" in message
    drop(other)
    tick(other, instance)
    assert run(other, instance, tick(other, instance)) == [True]
    assert pixels(other) == 0, "not silently for new files either"

    auto = edit(other, (ASK[1], ASK[0]))
    asked = tick(auto, instance)
    assert sorted(str(request.partition_key) for request in asked) == [IMAGES, VIDEOS]
    assert not {request.run_key for request in asked} & {request.run_key for request in first}, "Dagster repeats none"
    assert run(auto, instance, asked) == [True, True]
    assert pixels(auto) == committed(auto).height
    assert tick(auto, instance) == []
