"""Withdrawal: planned without --yes, recorded and zeroed with it, and refused by whatever would train on it."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from nextvid.config.project import Project
from nextvid.lineage.withdraw import withdraw
from nextvid.train.distributed import Ranks
from nextvid.train.loader import open_loader
from nextvid.train.run import find_run
from nextvid.trainset.mask_plan import open_mask_plan
from nextvid.trainset.trainset import Trainset
from storage.errors import ConfigError, RefusedError
from storage.reader import read_row
from storage.records import read_record
from storage.schemas import Clips, Media
from storage.store import LatentStore
from storage.tables import read_table, write_table
from storage.withdrawn import withdrawn_media, withdrawn_rows
from tests.nextvid.tiny_project import CLIPS_A_VIDEO, FRAMES, RECIPE, clip_rows, uri_of
from tests.nextvid.train.pixel_corpus import ask_for_pixels, write_pixels

PETS = "pets.000000"


def rows_of(uri: str) -> list[bytes]:
    return sorted(clip_rows().filter(pl.col("uri") == uri)["row_id"].to_list())


def bytes_of(folder: str) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def stored(project: Project, row: bytes) -> np.ndarray:
    (store,) = LatentStore.every(project.root)
    at = store.commits(PETS).row(by_predicate=pl.col("row_id") == row, named=True)
    return read_row(store, PETS, FRAMES, at["part"], at["slot"])


def test_a_plan_changes_nothing_and_names_what_saw_the_file(own_copy: Project) -> None:
    before = bytes_of(own_copy.root.url)
    found = withdraw(own_copy, uri_of(3))
    assert bytes_of(own_copy.root.url) == before
    assert not found.done
    assert (found.rows, found.stored, found.unexplained) == (CLIPS_A_VIDEO, CLIPS_A_VIDEO, 0)
    (store,) = LatentStore.every(own_copy.root)
    assert found.size_bytes == CLIPS_A_VIDEO * store.spec.row_bytes(FRAMES)
    assert [facts.run for facts in found.affected.runs] == [find_run(own_copy, RECIPE).id]
    assert "without --yes" in found.text()


def test_rows_are_recorded_zeroed_and_nothing_else_moves(own_copy: Project) -> None:
    others = {row: stored(own_copy, row) for row in rows_of(uri_of(4))}
    found = withdraw(own_copy, uri_of(3), yes=True)
    assert found.done
    (notice,) = Path(own_copy.root.notices()).iterdir()
    assert read_record(str(notice)) == {
        "what": f"withdrew {uri_of(3)}",
        "rows": {"media": 1, "latents": CLIPS_A_VIDEO, "trainset": CLIPS_A_VIDEO, "pretrain": 1},
    }
    assert withdrawn_rows(own_copy.root) == frozenset(rows_of(uri_of(3)))
    assert withdrawn_media(own_copy.root) == {bytes.fromhex(found.media[0])}
    assert all(not stored(own_copy, row).any() for row in rows_of(uri_of(3)))
    for row, latents in others.items():
        np.testing.assert_array_equal(stored(own_copy, row), latents)
    (store,) = LatentStore.every(own_copy.root)
    assert store.verify() == []
    assert "would be" not in found.text()


def test_the_loader_refuses_a_trainset_that_holds_such_a_row(own_copy: Project) -> None:
    run = find_run(own_copy, RECIPE)
    trainset = Trainset.open(own_copy.root)
    plan = open_mask_plan(own_copy.root, run.recipe.masks, (run.recipe.model.grid_height, run.recipe.model.grid_width))
    ranks = Ranks(0, 1, torch.device("cpu"))
    with open_loader(own_copy.root, trainset, run.recipe, plan, ranks):
        pass
    withdraw(own_copy, uri_of(3), yes=True)
    with (
        pytest.raises(RefusedError, match=r"holds row [0-9a-f]{32}, which was withdrawn"),
        open_loader(own_copy.root, trainset, run.recipe, plan, ranks),
    ):
        pass


def test_withdrawing_again_finishes_what_was_cut_short(own_copy: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("storage.part.Part.erase", killed)
        with pytest.raises(KeyboardInterrupt):
            withdraw(own_copy, uri_of(3), yes=True)
    assert withdrawn_rows(own_copy.root) == frozenset(rows_of(uri_of(3)))  # the record came first
    (store,) = LatentStore.every(own_copy.root)
    assert len(store.verify()) == CLIPS_A_VIDEO
    withdraw(own_copy, uri_of(3), yes=True)
    assert store.verify() == []


def test_it_waits_for_a_shard_that_is_being_committed(own_copy: Project) -> None:
    (store,) = LatentStore.every(own_copy.root)
    (part,) = store.parts_of(PETS)
    with ThreadPoolExecutor(1) as beside:
        with part.lock():
            done = beside.submit(withdraw, own_copy, uri_of(3), yes=True)
            with pytest.raises(TimeoutError):
                done.result(0.5)
            assert withdrawn_rows(own_copy.root) == frozenset(rows_of(uri_of(3)))  # refused from now on
            assert stored(own_copy, rows_of(uri_of(3))[0]).any()
        assert done.result(10).done
    assert not stored(own_copy, rows_of(uri_of(3))[0]).any()


def test_rows_that_only_a_trainset_still_names_are_found(own_copy: Project) -> None:
    """The curation changed since: clips of the file are others now, the trainset's rows are the old ones."""
    path = own_copy.root.table("clips", PETS)
    write_table(path, read_table(path, Clips).filter(pl.col("uri") != uri_of(3)), Clips)
    assert withdraw(own_copy, uri_of(3)).rows == CLIPS_A_VIDEO


def test_rows_that_nothing_names_are_counted(own_copy: Project) -> None:
    path = own_copy.root.table("clips", PETS)
    gone = [uri_of(25), uri_of(26)]  # of the test split: in no trainset
    write_table(path, read_table(path, Clips).filter(~pl.col("uri").is_in(gone)), Clips)
    found = withdraw(own_copy, uri_of(3))
    assert found.unexplained == 2 * CLIPS_A_VIDEO
    assert "nextvid sweep" in found.text()


def test_every_copy_of_the_bytes_is_withdrawn(own_copy: Project) -> None:
    """A second file of the same bytes in another batch has the same media id."""
    rows = clip_rows().filter(pl.col("uri") == uri_of(3)).drop("animal")
    copied = rows.with_columns(batch=pl.lit("pets.000001"), uri=pl.lit("/nowhere/pets/copy.mp4"))
    write_table(own_copy.root.table("clips", "pets.000001"), copied, Clips)
    (store,) = LatentStore.every(own_copy.root)
    part = store.plan_part("pets.000001", FRAMES, rows["row_id"].to_list())
    original = store.commits(PETS).filter(pl.col("row_id").is_in(rows["row_id"].implode()))
    commits = part.plan.join(original.drop("slot", "batch", "frames", "part", "shard"), on="row_id")
    latents = np.stack([stored(own_copy, row) for row in part.plan["row_id"]])
    part.write_shard(0, latents, commits.select(original.columns[: len(original.columns) - 4]))
    assert withdraw(own_copy, uri_of(3), yes=True).stored == 2 * CLIPS_A_VIDEO
    assert not read_row(store, "pets.000001", FRAMES, 0, 0).any()


def test_a_file_without_rows_is_recorded_all_the_same(own_copy: Project) -> None:
    path = own_copy.root.table("clips", PETS)
    write_table(path, read_table(path, Clips).filter(pl.col("uri") != uri_of(25)), Clips)
    found = withdraw(own_copy, uri_of(25), yes=True)
    assert (found.rows, found.stored) == (0, 0)
    record = read_record(f"{own_copy.root.withdrawn()}/{found.media[0]}.json")
    assert record["row_ids"] == []


def test_only_known_files_with_an_id_can_be_withdrawn(own_copy: Project) -> None:
    with pytest.raises(ConfigError, match="is no run, checkpoint"):
        withdraw(own_copy, "/nowhere/else.mp4", yes=True)
    with pytest.raises(ConfigError, match="is a run: files are withdrawn"):
        withdraw(own_copy, find_run(own_copy, RECIPE).id, yes=True)
    path = own_copy.root.table("media", PETS)
    media = read_table(path, Media)
    unread = pl.when(pl.col("uri") == uri_of(3))
    changed = media.with_columns(
        media_id=unread.then(None).otherwise(pl.col("media_id")),
        status=unread.then(pl.lit("quarantined")).otherwise(pl.col("status").cast(pl.String)),
        reason=unread.then(pl.lit("unreadable")).otherwise(pl.col("reason")),
    )
    write_table(path, changed, Media)
    with pytest.raises(ConfigError, match="has no id"):
        withdraw(own_copy, uri_of(3), yes=True)
    assert not Path(own_copy.root.withdrawn()).exists()


def test_pixels_of_a_withdrawn_file_are_zeroed_too(own_copy: Project) -> None:
    """Whatever quality they were stored at; those of other files stand."""
    project = ask_for_pixels(own_copy)
    store = write_pixels(project)
    before = {row["row_id"]: row for row in store.commits(PETS).iter_rows(named=True)}
    found = withdraw(project, uri_of(3), yes=True)
    assert found.stored == 2 * CLIPS_A_VIDEO
    gone = rows_of(uri_of(3))
    latents = LatentStore.every(project.root)[0].spec.row_bytes(FRAMES)
    assert found.size_bytes == sum(latents + before[row]["size_bytes"] for row in gone)
    assert store.verify() == []
    for row, at in before.items():
        assert read_row(store, PETS, FRAMES, at["part"], at["slot"]).any() == (row not in gone)
