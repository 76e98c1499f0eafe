"""Files dropped under a live Dagster become latents, and the trainset follows: sensor, queue, runs and automation."""

import shutil
from pathlib import Path

import polars as pl
import pytest

from nextvid.corpus.pointers import read_latest
from nextvid.encode.plan import spec_in_force
from storage.latents import LatentStore
from tests.services.conftest import Live, wait_for

pytestmark = [pytest.mark.services, pytest.mark.timeout(600)]

FREE_BOX = b"\x00\x00\x00\x10free" + bytes(8)  # MP4 readers skip it


def encoded(live: Live) -> int:
    """Committed rows that are ok."""
    store = LatentStore(live.project.root, spec_in_force(live.project))
    batches = live.project.root.batches("clips")
    return sum(store.commits(batch).filter(pl.col("status") == "ok").height for batch in batches)


def statuses(live: Live) -> list[str]:
    """States of all runs so far."""
    return [run["status"] for run in live.runs()]


def test_dropped_files_become_latents_and_the_trainset_follows(live: Live) -> None:
    assert statuses(live) == []
    live.command("sensor", "start", "new_sources")
    wait_for(lambda: read_latest(live.project.root, "trainset") is not None, 300)
    first, rows = read_latest(live.project.root, "trainset"), encoded(live)
    assert rows > 20

    videos = Path(live.project.root.url) / "corpus" / "videos"
    shutil.copy(next(iter(sorted(videos.rglob("scene_*.mp4")))), videos / "added.mp4")
    with (videos / "added.mp4").open("ab") as file:
        file.write(FREE_BOX)  # another digest, the same pictures
    wait_for(lambda: encoded(live) > rows, 200)
    assert first is not None
    assert set(statuses(live)) <= {"SUCCESS", "STARTED", "QUEUED", "STARTING", "NOT_STARTED"}
