"""`duplicates`: groups over all batches, the rules of what gives way, and the contamination table."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextvid.config.project import Project
from nextvid.graph import GRAPH
from nextvid.making.publishing import read_latest
from nextvid.trainset import duplicates
from nextvid.trainset.duplicates import make_duplicates
from storage import tables
from storage.errors import UpstreamError
from storage.schemas import Duplicates, Shots
from tests.factories import make_corpus, passed, publish_clips, table, write_project
from tests.nextvid.corpus.conftest import Made
from tests.nextvid.corpus.small_media import FPS, scene, write_film, write_picture


@dataclass(frozen=True)
class Shot:
    """One shot of a hand-written corpus."""

    media: str
    batch: str
    look: int  # shots of one look have one hash
    split: str = "train"
    uses: tuple[str, ...] = ("pretrain",)
    index: int = 0
    quality: int = 100
    bits: int = 0  # flipped in the hash of its look
    side: int = 64


def id_of(*parts: object) -> bytes:
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()


def hash_of(shot: Shot) -> bytes:
    """Random hashes differ in about 128 bits."""
    bits = np.random.default_rng(shot.look).integers(0, 2, 256).astype(np.uint8)
    bits[: shot.bits] ^= 1
    return np.packbits(bits).tobytes()


def common(shot: Shot) -> dict[str, Any]:
    return {
        "media_id": id_of(shot.media),
        "shot_id": id_of(shot.media, shot.index),
        "dataset": shot.batch.split(".")[0],
        "batch": shot.batch,
        "uri": f"/{shot.batch}/{shot.media}",
        "kind": "video",
        "status": "ok",
        "crop_x": 0,
        "crop_y": 0,
        "crop_w": shot.side,
        "crop_h": shot.side,
    }


def write_tables(project: Project, shots: list[Shot]) -> None:
    for batch in sorted({shot.batch for shot in shots}):
        mine = sorted((s for s in shots if s.batch == batch), key=lambda s: (s.media, s.index))
        rows = [
            common(s)
            | {
                "shot_index": s.index,
                "start_us": s.index * 10,
                "end_us": s.index * 10 + 10,
                "hashes": [hash_of(s)],
                "hash_quality": [s.quality],
            }
            for s in mine
        ]
        shot_table = table(Shots, rows, cut_in="edge", cut_out="edge", hash_times_us=[0])
        tables.write_table(project.root.table("shots", batch), shot_table, Shots)
        passed(project.root.checks("shots", batch), "shots")
        clips = [
            common(s) | {"row_id": id_of(s, use), "clip_id": id_of(s), "uses": [use], "split": s.split}
            for s in mine
            for use in s.uses
        ]
        same = {"decoder": "pyav", "frames": 1, "times_us": [0], "view_index": 0, "flip": False}
        publish_clips(project, batch, [same | row for row in clips])


def searched(tmp_path: Path, shots: list[Shot]) -> tuple[dict[tuple[str, int, str], tuple[list[str], str | None]], Any]:
    """(what each grouped shot is dropped from and why, duplicates.json)."""
    project = write_project(tmp_path, {"d": {"uri": "d"}})
    shutil.rmtree(project.root.url, ignore_errors=True)
    write_tables(project, shots)
    outcome = make_duplicates(project)
    folder = Path(project.root.pointed("duplicates", str(outcome.digest)))
    grouped = tables.read_table(str(folder / "duplicates.parquet"), Duplicates)
    names = {(id_of(s.media, s.index), s.batch): (s.media, s.index, s.batch) for s in shots}
    rows = grouped.iter_rows(named=True)
    found = {names[row["shot_id"], row["batch"]]: (row["dropped_from"], row["reason"]) for row in rows}
    return found, json.loads((folder / "duplicates.json").read_text())


A, B, C = "a.000000", "a.000001", "c.000000"


def test_copies_keep_one_file_a_dataset(tmp_path: Path) -> None:
    shots = [Shot("x", A, 1), Shot("y", B, 1), Shot("z", C, 1), Shot("alone", A, 2)]
    found, _ = searched(tmp_path, shots)
    assert found == {("x", 0, A): ([], None), ("y", 0, B): (["pretrain"], "copy"), ("z", 0, C): ([], None)}


def test_the_larger_picture_is_kept(tmp_path: Path) -> None:
    found, _ = searched(tmp_path, [Shot("x", A, 1), Shot("y", A, 1, side=128)])
    assert found == {("x", 0, A): (["pretrain"], "copy"), ("y", 0, A): ([], None)}


def test_the_same_bytes_in_two_batches_share_ids_and_one_stays(tmp_path: Path) -> None:
    found, _ = searched(tmp_path, [Shot("x", A, 1, quality=0), Shot("x", B, 1, quality=0)])
    assert found == {("x", 0, A): ([], None), ("x", 0, B): (["pretrain"], "copy")}


def test_a_test_set_makes_pretraining_and_probe_training_give_way(tmp_path: Path) -> None:
    shots = [
        Shot("test", A, 1, split="test", uses=("acts",)),
        Shot("train", A, 1, uses=("acts", "pretrain")),
        Shot("val", A, 1, split="val", uses=("acts",)),
        Shot("far", C, 1, bits=31),
        Shot("farther", C, 1, bits=70),
    ]
    found, said = searched(tmp_path, shots)
    assert found == {
        ("test", 0, A): ([], None),
        ("train", 0, A): (["pretrain", "probe_train"], "test_duplicate"),
        ("val", 0, A): ([], None),
        ("far", 0, C): (["pretrain"], "test_duplicate"),
    }
    assert said["contamination"] == [
        {
            "benchmark": "acts",
            "test_files": 1,
            "test_files_seen_in_pretraining": 1,
            "dropped_from_pretrain_shots": {"a": 1, "c": 1},
            "dropped_from_probe_train_shots": 1,
            "train_files": 1,
            "train_files_in_pretraining": 1,
        }
    ]


def test_test_files_without_a_benchmark_hold_nothing_back(tmp_path: Path) -> None:
    found, said = searched(tmp_path, [Shot("x", A, 1), Shot("y", C, 1, split="test", uses=())])
    assert found == {}, "a shot without a use is in no clip table"
    assert said["contamination"] == []


def test_shots_of_one_file_are_no_duplicates_of_each_other(tmp_path: Path) -> None:
    shots = [Shot("x", A, 1), Shot("x", A, 1, index=1), Shot("y", A, 2), Shot("z", A, 2)]
    found, _ = searched(tmp_path, shots)
    assert set(found) == {("y", 0, A), ("z", 0, A)}
    shots = [Shot("x", A, 1), Shot("x", A, 1, index=1), Shot("y", A, 1)]
    found, _ = searched(tmp_path, shots)
    assert [dropped for (media, _, _), (dropped, _) in sorted(found.items()) if media == "x"] == [[], []]


def test_flat_frames_join_nothing(tmp_path: Path) -> None:
    found, _ = searched(tmp_path, [Shot("x", A, 1, quality=49), Shot("y", A, 1, quality=100)])
    assert found == {}
    found, _ = searched(tmp_path, [Shot("x", A, 1, quality=50), Shot("y", A, 1, quality=100)])
    assert len(found) == 2


SHOTS = st.lists(
    st.builds(
        Shot,
        media=st.sampled_from("uvwxyz"),
        batch=st.sampled_from([A, B, C]),
        look=st.integers(0, 3),
        split=st.sampled_from(["train", "train", "val", "test"]),
        uses=st.sampled_from([("pretrain",), ("acts",), ("acts", "pretrain")]),
        index=st.integers(0, 1),
        side=st.sampled_from([32, 64]),
    ),
    min_size=1,
    max_size=10,
    unique_by=lambda shot: (shot.media, shot.batch, shot.index),
)


def reference(shots: list[Shot]) -> dict[tuple[str, int, str], tuple[list[str], str | None]]:
    """The rules by brute force: grow groups until nothing joins, then judge each."""
    group = {shot: {shot} for shot in shots}
    for _ in shots:
        for one in shots:
            for other in shots:
                if one.look == other.look or (one.media, one.index) == (other.media, other.index):
                    group[one] |= group[other]
                    group[other] |= group[one]
    found: dict[tuple[str, int, str], tuple[list[str], str | None]] = {}
    for shot, members in group.items():
        if len({(m.batch, m.media) for m in members}) < 2:
            continue
        touched = any(m.split == "test" and "acts" in m.uses for m in members)
        dropped, reason = [], None
        if touched and shot.split != "test":
            dropped += ["pretrain"] if "pretrain" in shot.uses else []
            dropped += ["probe_train"] if "acts" in shot.uses and shot.split == "train" else []
            reason = "test_duplicate" if dropped else None
        elif not touched and "pretrain" in shot.uses:
            files: dict[tuple[str, str], list[Shot]] = {}
            for m in members:
                if "pretrain" in m.uses and m.batch[0] == shot.batch[0]:
                    files.setdefault((m.batch, m.media), []).append(m)
            best = min(files, key=lambda f: (-max(m.side for m in files[f]), -len(files[f]), f[0], id_of(f[1])))
            if best != (shot.batch, shot.media):
                dropped, reason = ["pretrain"], "copy"
        found[shot.media, shot.index, shot.batch] = (dropped, reason)
    return found


@given(SHOTS)
def test_the_rules_agree_with_a_brute_force_reading(tmp_path: Path, shots: list[Shot]) -> None:
    assert searched(tmp_path, pretrained_in_train(shots))[0] == reference(pretrained_in_train(shots))


def pretrained_in_train(shots: list[Shot]) -> list[Shot]:
    """Clips never pretrain on other splits, and equal bytes of one look have one hash."""
    looks = {(shot.media, shot.index): shot.look for shot in shots}
    return [replace(s, look=looks[s.media, s.index], uses=s.uses if s.split == "train" else ("acts",)) for s in shots]


def test_searching_again_does_nothing_until_something_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = write_project(tmp_path, {"d": {"uri": "d"}})
    write_tables(project, [Shot("x", A, 1), Shot("y", B, 1)])
    first = make_duplicates(project)
    assert (first.made, first.passed, read_latest(project.root, "duplicates")) == (True, True, first.digest)
    assert first.numbers["dropped_from_pretrain_copy"] == 1
    again = make_duplicates(project)
    assert (again.made, again.digest, again.rows) == (False, first.digest, 2)
    write_tables(project, [Shot("x", A, 1), Shot("y", B, 2)])
    other = make_duplicates(project)
    assert (other.made, other.rows, read_latest(project.root, "duplicates")) == (True, 0, other.digest)
    monkeypatch.setitem(GRAPH, "duplicates", replace(GRAPH["duplicates"], version=2))
    assert make_duplicates(project).made
    stricter = write_project(tmp_path, {"d": {"uri": "d"}}, curation={"duplicates": {"distance": 20}})
    assert make_duplicates(stricter).digest not in (first.digest, other.digest)


def test_batches_that_did_not_pass_are_not_known_to_it(tmp_path: Path) -> None:
    project = write_project(tmp_path, {"d": {"uri": "d"}})
    with pytest.raises(UpstreamError, match="no batch has shots and clips"):
        make_duplicates(project)
    write_tables(project, [Shot("x", A, 1), Shot("y", B, 1)])
    passed(project.root.checks("clips", B), "clips", False)
    outcome = make_duplicates(project)
    said = json.loads(Path(project.root.pointed("duplicates", str(outcome.digest)), "duplicates.json").read_text())
    assert (said["batches"], said["shots"], outcome.rows) == ([A], 1, 0)


def test_a_huge_group_fails_and_the_pointer_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = write_project(tmp_path, {"d": {"uri": "d"}})
    write_tables(project, [Shot("x", A, 1)])
    good = make_duplicates(project)
    monkeypatch.setattr(duplicates, "LARGEST_GROUP", 2)
    write_tables(project, [Shot(name, A, 1) for name in "xyz"])
    bad = make_duplicates(project)
    assert not bad.passed
    assert bad.checks[0].numbers == {"largest_files": 3, "limit_files": 2}
    assert read_latest(project.root, "duplicates") == good.digest
    with pytest.raises(UpstreamError, match="groups_are_small"):
        tables.require_checks(f"{project.root.pointed('duplicates', str(bad.digest))}/checks.json", "duplicates")


def test_files_encoded_again_and_copied_are_found(tmp_path: Path) -> None:
    """From real files: a test film encoded again at lower quality in another dataset, and a picture copied there."""
    write_film(tmp_path / "bench" / "test.mp4", [scene("forest", 2 * FPS)])
    write_film(tmp_path / "web" / "leak.mp4", [scene("forest", 2 * FPS)], crf=30)
    write_film(tmp_path / "web" / "other.mp4", [scene("street", 2 * FPS)])
    write_picture(tmp_path / "web" / "p.jpg", "apple")
    shutil.copy(tmp_path / "web" / "p.jpg", tmp_path / "web" / "q.jpg")
    (tmp_path / "bench.csv").write_text("path,label,split\ntest.mp4,run,test\n")
    labels = {"layout": "csv", "file": "bench.csv", "targets": {"action": "label"}, "split_column": "split"}
    policy = {"frames": 4, "fps": 4, "crop": "whole"}
    project = write_project(
        tmp_path,
        {
            "bench": {"uri": "bench", "labels": labels},
            "web": {"uri": "web", "weight": 1.0, "clips": [policy], "split": {"test": 0.0}, "max_batch_images": 1},
        },
        benchmarks={"acts": {"datasets": ["bench"], "target": "action", "policy": policy}},
    )
    assert all(outcome.passed for outcome in make_corpus(project).values())
    outcome = make_duplicates(project)
    folder = Path(project.root.pointed("duplicates", str(outcome.digest)))
    grouped = tables.read_table(str(folder / "duplicates.parquet"), Duplicates)
    dropped = grouped.select("batch", pl.col("dropped_from").list.join("+"), "reason").rows()
    assert sorted(dropped, key=str) == [
        ("bench.000000", "", None),
        ("web.000000", "", None),
        ("web.000001", "pretrain", "copy"),
        ("web.000002", "pretrain", "test_duplicate"),
    ]


def test_the_small_corpus_has_no_duplicates(own_copy: Callable[..., Project], small_corpus: Made) -> None:
    project = own_copy()
    outcome = make_duplicates(project)
    assert (outcome.rows, outcome.numbers["batches"]) == (0, len(small_corpus.project.root.batches()))
