"""The public reader: the store's own bytes, in any process, however it starts."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import nextvid
from nextvid.config.project import Project
from nextvid.trainset.dataset import LatentDataset
from nextvid.trainset.trainset import Trainset
from storage.errors import ConfigError, DamagedError, RefusedError, UpstreamError
from storage.reader import read_row, row_id
from storage.schemas import Labels
from storage.shard import ROWS_PER_SHARD
from storage.store import LatentStore
from storage.tables import write_table
from storage.withdrawn import record_withdrawal
from tests.factories import clip_row, flip, publish_clips, table
from tests.nextvid.train.corpus import make_project, tiny_spec


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return make_project(tmp_path_factory.mktemp("latents"))


@pytest.fixture
def clips(project: Project) -> LatentDataset:
    """Nine clips of four frames."""
    return nextvid.open_latents(project.path, 4)


def reference(project: Project, frames: int) -> list[np.ndarray]:
    """Rows by zarr-python, in the trainset's order."""
    trainset = Trainset.open(project.root)
    store = LatentStore(project.root, trainset.spec)
    return [
        read_row(store, trainset.batches[batch], frames, part, ROWS_PER_SHARD * shard + slot)
        for _, batch, part, shard, slot, _ in trainset.rows(frames).tolist()
    ]


@pytest.mark.parametrize("frames", [1, 4, 8])
def test_rows_are_those_of_the_store_in_the_trainset_s_order(project: Project, frames: int) -> None:
    found, wanted = nextvid.open_latents(project.path, frames), reference(project, frames)
    assert len(found) == len(wanted)
    for row, one in zip(wanted, found, strict=True):
        assert one.dtype == torch.float16
        assert np.array_equal(one, row)
    assert torch.equal(found[-1], found[len(found) - 1])
    assert torch.equal(found.mean, torch.from_numpy(Trainset.open(project.root).mean))


@pytest.mark.parametrize("where", ["root", "trainset", "named"])
def test_a_root_or_a_trainset_in_it_opens_the_same(project: Project, clips: LatentDataset, where: str) -> None:
    url, digest = project.root.url, clips.digest
    found = {
        "root": lambda: nextvid.open_latents(url, 4),
        "trainset": lambda: nextvid.open_latents(f"{url}/trainset/{digest}/", 4),
        "named": lambda: nextvid.open_latents(Path(url), 4, trainset=digest),
    }[where]()
    assert torch.equal(torch.stack(list(found)), torch.stack(list(clips)))


def test_the_rows_of_a_batch_are_copies(clips: LatentDataset) -> None:
    first, again = clips.__getitems__([3, 3])
    before = clips[3]
    first.zero_()
    assert torch.equal(again, before)
    assert torch.equal(clips[3], before)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_give_what_this_process_gives(clips: LatentDataset, start: str) -> None:
    alone = torch.cat(list(DataLoader(clips, 2)))  # opened here, before the fork
    workers = DataLoader(clips, 2, num_workers=1, multiprocessing_context=start)
    assert torch.equal(torch.cat(list(workers)), alone)


def test_pickled_it_opens_the_store_again(clips: LatentDataset) -> None:
    before = clips[5]
    carried = pickle.dumps(clips)
    assert len(carried) < 10_000, "no rows travel"
    assert torch.equal(pickle.loads(carried)[5], before)


@pytest.mark.parametrize("index", [9, -10])
def test_a_row_beyond_the_end(clips: LatentDataset, index: int) -> None:
    with pytest.raises(IndexError, match=r"of 9: trainset .* clips of 4 frames"):
        clips[index]


def test_a_row_s_facts_and_labels(tmp_path: Path) -> None:
    project = make_project(tmp_path)
    address = Trainset.open(project.root).rows(4)[2]
    changes = {"dataset": "films", "row_id": row_id(address), "times_us": [10, 20, 30, 40], "frames": 4}
    row = clip_row(tmp_path / "one.mp4", 3, view=1, **changes)
    publish_clips(project, "films.000000", [row])
    labels = [(None, None, "verb", "wave"), (0, 11, "hand", "left"), (40, 99, "hand", "right"), (41, 50, "hand", "no")]
    said = [
        {"media_id": row["media_id"], "start_us": a, "end_us": b, "target": target, "value": value}
        for a, b, target, value in labels
    ]
    write_table(project.root.table("labels", "films.000000"), table(Labels, said), Labels)
    clips = nextvid.open_latents(project.path, 4)
    facts = clips.row(2)
    assert (facts.uri, facts.dataset, facts.batch) == ("/nowhere", "films", "films.000000")  # as it was frozen
    assert (facts.times_us, facts.flip, facts.crop) == ((10, 20, 30, 40), True, tuple(row[f"crop_{n}"] for n in "xywh"))
    assert facts.labels == {"verb": ("wave",), "hand": ("left", "right")}
    other = clips.row(3)
    assert (other.uri, other.times_us, other.labels) == ("/nowhere", None, None)  # the new clips table lacks it


def test_without_tables_a_row_still_has_its_file(clips: LatentDataset) -> None:
    assert {(facts.uri, facts.labels) for facts in map(clips.row, range(9))} == {("/nowhere", None)}
    assert [facts.row_id for facts in map(clips.row, range(9))] == sorted(clips.row(n).row_id for n in range(9))


@pytest.mark.parametrize(
    ("asked", "error", "words"),
    [
        ({}, RefusedError, "has clips of 1, 4, 8 frames: name one"),
        ({"frames": 5}, RefusedError, "has no clips of 5 frames; it has 1, 4, 8"),
        ({"frames": 4, "trainset": "0" * 32}, UpstreamError, "is not whole"),
        ({"frames": 4, "trainset": "newest"}, ConfigError, "is not a digest"),
    ],
)
def test_what_it_refuses(project: Project, asked: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        nextvid.open_latents(project.path, **asked)


def test_two_names_of_a_trainset(project: Project, clips: LatentDataset) -> None:
    with pytest.raises(ConfigError, match="names a trainset already"):
        nextvid.open_latents(f"{project.root.url}/trainset/{clips.digest}", 4, trainset=clips.digest)


def test_no_root(tmp_path: Path) -> None:
    with pytest.raises(UpstreamError, match="there is no trainset yet"):
        nextvid.open_latents(tmp_path)


def test_a_withdrawn_row_opens_nothing(tmp_path: Path) -> None:
    project = make_project(tmp_path)
    row = row_id(Trainset.open(project.root).rows(8)[4])
    record_withdrawal(project.root, row.hex(), [row])
    assert len(nextvid.open_latents(project.path, 4)) == 9
    with pytest.raises(RefusedError, match="which was withdrawn"):
        nextvid.open_latents(project.path, 8)


def test_a_flipped_byte_is_an_error(tmp_path: Path) -> None:
    project = make_project(tmp_path)
    store = LatentStore(project.root, tiny_spec())
    flip(store.part("films.000000", 4, 0).shard_path(0), 100)
    found = nextvid.open_latents(project.path, 4)
    with pytest.raises(DamagedError, match="Remedy"):
        list(found)
