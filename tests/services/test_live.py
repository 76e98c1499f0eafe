"""Files dropped under a live Dagster become latents, and the trainset follows: sensor, queue, runs and automation."""

import csv
import itertools
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from nextvid.corpus.manifest import split_of
from nextvid.encode.plan import accepted_spec
from nextvid.making.publishing import read_latest
from storage.atomic import read_json
from storage.digest import digest_file
from storage.schemas import Clips, Media
from storage.store import LatentStore
from storage.tables import read_table
from tests.services.conftest import Live, wait_for

pytestmark = [pytest.mark.services, pytest.mark.timeout(1500)]

FREE_BOX = b"\x00\x00\x00\x10free"  # and eight bytes of anything: MP4 readers skip it
VIDEOS, EXTRA_BATCH = "demo_videos.000000", "extra.000000"
UNWANTED = {"CANCELED", "FAILURE"}


def encoded(live: Live) -> pl.DataFrame:
    """Committed rows that are ok."""
    store = LatentStore(live.project.root, accepted_spec(live.project))
    commits = [store.commits("none"), *(store.commits(batch) for batch in live.project.root.batches("clips"))]
    return pl.concat(commits).filter(pl.col("status") == "ok")


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
    for name in ("one", "other"):  # all of a dataset whose budget is half of it
        (Path(root.url) / "extra" / f"{name}.mp4").write_bytes(b"no film")
    live.command("sensor", "start", "new_sources")
    wait_for(lambda: read_latest(root, "trainset") is not None, 300)
    first, before = trainset(live), encoded(live)
    assert before.height > 20
    wait_for(lambda: EXTRA_BATCH in requested(live, "new_sources"), 300)
    stopped = requested(live, "new_sources")[EXTRA_BATCH]
    assert live.ended(stopped["runId"], 300) == "FAILURE"
    assert EXTRA_BATCH not in first["batches"], "its batch stops, all others go on"
    assert "quarantined_within_budget" in Path(root.checks("media", EXTRA_BATCH)).read_text()
    assert not Path(root.checks("shots", EXTRA_BATCH)).exists()
    assert failed_partitions(live, "media", "quarantined_within_budget") == [EXTRA_BATCH], "though others passed later"

    # dropped in: its latents appear
    drop(live, scenes[0], folder / "added.mp4")
    wait_for(lambda: encoded(live).height > before.height, 400)

    # changed: only it is encoded again, and the trainset follows; poisoned in the same moment: only that one's rows are
    # quarantined
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
    live.command("schedule", "start", "nightly")
    wait_for(lambda: trainset(live)["digest"] != first["digest"], 400)
    assert EXTRA_BATCH not in trainset(live)["batches"]

    # the schedule ticks: what failed and what is quarantined is tried again
    wait_for(lambda: {EXTRA_BATCH, VIDEOS} <= requested(live, "nightly").keys(), 400)
    others = [run for run in live.runs() if tags(run).get("dagster/partition") != EXTRA_BATCH]
    assert not UNWANTED & {run["status"] for run in others}


def failed_partitions(live: Live, asset: str, check: str) -> list[str]:
    """The partitions whose check is red in the UI."""
    answer = live.ask(
        """query($key: AssetKeyInput!, $name: String!) { assetNodes(assetKeys: [$key]) {
           assetCheckOrError(checkName: $name) { ... on AssetCheck { partitionStatuses {
             ... on AssetCheckDefaultPartitionStatuses { failedPartitions } } } } } }""",
        key={"path": [asset]},
        name=check,
    )
    failed: list[str] = answer["assetNodes"][0]["assetCheckOrError"]["partitionStatuses"]["failedPartitions"]
    return failed


def tags(run: dict[str, Any]) -> dict[str, str]:
    return {tag["key"]: tag["value"] for tag in run["tags"]}


def requested(live: Live, by: str) -> dict[str, dict[str, Any]]:
    """The newest run of each batch that this sensor or schedule asked for."""
    askers = "dagster/sensor_name", "dagster/schedule_name"
    runs = [run for run in live.runs() if by in (tags(run).get(name) for name in askers)]
    return {tags(run)["dagster/partition"]: run for run in reversed(runs)}


def drop(live: Live, source: Path, target: Path) -> None:
    """A copy with a digest of its own that falls into train: without labels, only that is wanted of it."""
    split = live.project.corpus.datasets["demo_videos"].split
    for number in itertools.count(100):
        candidate = target.with_suffix(".part")
        shutil.copy(source, candidate)
        append(candidate, number)
        if split_of(split, None, None, bytes.fromhex(digest_file(candidate))) == "train":
            candidate.rename(target)
            return


def append(path: Path, number: int) -> None:
    """Another digest for each number, the same pictures."""
    with path.open("ab") as file:
        file.write(FREE_BOX + number.to_bytes(8, "little"))
