"""Files dropped under a live Dagster become latents, and the trainset follows: sensor, queue, runs and automation."""

import csv
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from nextvid.corpus.pointers import read_latest
from nextvid.encode.plan import spec_in_force
from storage.atomic import read_json
from storage.latents import LatentStore
from storage.schemas import Clips, Media, Sources
from storage.tables import read_table
from tests.services.conftest import DEFINITIONS, Live, wait_for

pytestmark = [pytest.mark.services, pytest.mark.timeout(1500)]

FREE_BOX = b"\x00\x00\x00\x10free"  # and eight bytes of anything: MP4 readers skip it
VIDEOS = "demo_videos.000000"
UNWANTED = {"CANCELED", "FAILURE"}
TICKS = """query($schedule: ScheduleSelector!) { scheduleOrError(scheduleSelector: $schedule) {
  ... on Schedule { scheduleState { ticks { status runIds } } } } }"""


def encoded(live: Live) -> pl.DataFrame:
    """Committed rows that are ok."""
    store = LatentStore(live.project.root, spec_in_force(live.project))
    commits = [store.commits("none"), *(store.commits(batch) for batch in live.project.root.batches("clips"))]
    return pl.concat(commits).filter(pl.col("status") == "ok")


def partitions(live: Live, *statuses: str) -> list[str]:
    """Batches of the runs of `ingest` that ended so."""
    found = []
    for run in live.runs():
        tags = {tag["key"]: tag["value"] for tag in run["tags"]}
        if run["status"] in statuses and run["jobName"] == "ingest":
            found.append(tags["dagster/partition"])
    return sorted(found)


def trainset(live: Live) -> dict[str, Any]:
    """What the latest trainset says of itself."""
    digest = read_latest(live.project.root, "trainset")
    assert digest is not None
    found: dict[str, Any] = read_json(f"{live.project.root.pointed('trainset', digest)}/trainset.json")
    return found


def media(live: Live, batch: str) -> pl.DataFrame:
    """The newest row of each file of a batch."""
    table = read_table(live.project.root.table("media", batch), Media)
    return table.filter(pl.col("revision") == pl.col("revision").max().over("uri"))


def test_the_corpus_follows_its_folders(live: Live) -> None:
    root = live.project.root
    folder = Path(root.url) / "corpus" / "videos"
    with (folder.parent / "videos.csv").open() as file:
        train = [line["path"] for line in csv.DictReader(file) if line["split"] == "train"]
    scenes = sorted(path for path in folder.rglob("scene_*.mp4") if str(path.relative_to(folder)) in train)
    assert live.runs() == []
    live.command("sensor", "start", "new_sources")
    wait_for(lambda: read_latest(root, "trainset") is not None, 300)
    first, before = trainset(live), encoded(live)
    assert before.height > 20

    # dropped in: its latents appear and the trainset follows
    shutil.copy(scenes[0], folder / "added.mp4")
    append(folder / "added.mp4", 1)
    wait_for(lambda: encoded(live).height > before.height, 400)
    wait_for(lambda: trainset(live)["digest"] != first["digest"], 400)
    assert trainset(live)["parent"] == first["digest"]

    # changed: only it is encoded again; poisoned in the same moment: only that one's rows are quarantined
    before = encoded(live)
    append(scenes[0], 2)
    scenes[1].write_bytes(b"no film any more")
    wait_for(lambda: encoded(live).height > before.height, 400)
    new = encoded(live).join(before, on="row_id", how="anti")
    clips = read_table(root.table("clips", VIDEOS), Clips).filter(pl.col("row_id").is_in(new["row_id"].implode()))
    assert set(clips["uri"]) == {str(scenes[0])}
    bad = media(live, VIDEOS).filter(pl.col("status") == "quarantined")["uri"].to_list()
    assert str(scenes[1]) in bad
    assert all(name == str(scenes[1]) or "broken" in name for name in bad), bad
    assert before.join(encoded(live), on="row_id", how="anti").is_empty(), "no row is lost"
    assert not UNWANTED & {run["status"] for run in live.runs()}

    # a night: what is quarantined is tried again, and stays a row with its reason
    live.command("schedule", "start", "nightly")

    # over its dataset's budget: that batch stops before the trainset, everything else goes on
    for number in range(2):
        (Path(root.url) / "extra" / f"broken_{number}.mp4").write_bytes(b"no film at all")
    scenes[2].unlink()
    wait_for(lambda: "extra.000000" in partitions(live, "FAILURE"), 400)
    last = trainset(live)["digest"]
    append(scenes[0], 3)
    wait_for(lambda: trainset(live)["digest"] != last and "extra.000000" in trainset(live)["left_out"], 400)
    assert trainset(live)["left_out"]["extra.000000"] == "its media did not pass their checks"
    assert set(partitions(live, *UNWANTED)) == {"extra.000000"}

    # deleted: marked, and its rows stay
    sources = read_table(root.table("sources", VIDEOS), Sources)
    assert sources.filter(pl.col("gone_at").is_not_null())["uri"].to_list() == [str(scenes[2])]

    wait_for(lambda: any(tick["status"] == "SUCCESS" and tick["runIds"] for tick in ticks(live)), 400)


def append(path: Path, number: int) -> None:
    """Another digest for each number, the same pictures."""
    with path.open("ab") as file:
        file.write(FREE_BOX + number.to_bytes(8, "little"))


def ticks(live: Live) -> list[dict[str, Any]]:
    """Ticks of the schedule `nightly` so far."""
    selector = {
        "repositoryName": "__repository__", "repositoryLocationName": DEFINITIONS, "scheduleName": "nightly"
    }  # fmt: skip
    found: list[dict[str, Any]] = live.ask(TICKS, schedule=selector)["scheduleOrError"]["scheduleState"]["ticks"]
    return found
