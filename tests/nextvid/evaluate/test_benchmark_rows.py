"""Which clips a benchmark asks about: labels by span, splits, copies, segments, views, limits, and the digest."""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextvid.config.benchmarks import BenchmarkConfig
from nextvid.config.datasets import ClipPolicy
from nextvid.evaluate.benchmark_rows import BenchmarkRows, benchmark_rows, per_sample, refuse_unlearnable
from storage.errors import UpstreamError
from storage.schemas import Clips, Duplicates, Labels


def key(word: str) -> bytes:
    return word.encode().ljust(16, b"_")


def clip(media: str, shot: str, number: int = 0, view: int = 0, **changes: object) -> dict[str, object]:
    """One row of the clips table: 2 frames a second from second `number`."""
    start = number * 1_000_000
    row: dict[str, object] = {
        "row_id": key(f"{shot}{number}{view}"), "clip_id": key(f"{shot}{number}"), "shot_id": key(shot),
        "media_id": key(media), "dataset": "pets", "batch": "pets.000000", "uri": f"/{media}.mp4", "kind": "video",
        "decoder": "decord", "frames": 2, "times_us": [start, start + 500_000], "view_index": view, "crop_x": 0,
        "crop_y": 0, "crop_w": 8, "crop_h": 8, "flip": False, "uses": ["pretrain", "species"], "split": "train",
        "group": None, "status": "ok", "reason": None, "error": None,
    }  # fmt: skip
    return row | changes


def clips_table(rows: Sequence[Mapping[str, object]]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=Clips.create_empty().schema)


def labels_table(*rows: tuple[str, int | None, int | None, str]) -> pl.DataFrame:
    listed = [(key(media), start, end, "animal", value) for media, start, end, value in rows]
    return pl.DataFrame(listed, schema=Labels.create_empty().schema, orient="row")


def commits_of(clips: pl.DataFrame, **changes: pl.Expr | pl.Series) -> pl.DataFrame:
    """Every clip committed, in order."""
    return clips.select(
        "row_id", "batch", "frames", part=pl.lit(0), shard=pl.lit(0), slot=pl.int_range(pl.len()),
        status=pl.lit("ok"), crc32c=pl.lit(7),
    ).with_columns(**changes)  # fmt: skip


def build(
    clips: pl.DataFrame, labels: pl.DataFrame, segments: int = 1, limit: int | None = None,
    dropped: Sequence[str] = (), commits: pl.DataFrame | None = None, held_out: float = 0.2,
    train_views: Literal["all", "one"] = "all", judged: Literal["shot", "file"] = "shot",
    cut_from: Literal["shot", "file"] = "shot", every_view: bool = False,
) -> BenchmarkRows:  # fmt: skip
    policy = ClipPolicy(frames=2, fps=2, clips_per_shot=segments, cut_from=cut_from)
    config = BenchmarkConfig(
        datasets=("pets",), target="animal", policy=policy, train_views=train_views, judged=judged, limit=limit
    )
    duplicates: pl.DataFrame = Duplicates.create_empty()
    if dropped:
        rows = [
            {"shot_id": key(shot), "media_id": key(f"m{shot}"), "dataset": "pets", "batch": "pets.000000", "group": 0,
             "split": "train", "benchmarks": ["species"], "pretrain": True, "dropped_from": ["probe_train"],
             "reason": "copy"}
            for shot in dropped
        ]  # fmt: skip
        duplicates = pl.DataFrame(rows, schema=duplicates.schema)
    commits = commits_of(clips) if commits is None else commits
    return benchmark_rows("species", config, clips, labels, duplicates, commits, held_out, every_view)


def test_a_plain_task() -> None:
    clips = clips_table([clip("a", "s1"), clip("b", "s2"), clip("c", "s3", split="test")])
    rows = build(clips, labels_table(("a", None, None, "cat"), ("b", None, None, "dog"), ("c", None, None, "dog")))
    assert rows.classes == ("cat", "dog")
    assert [rows.classes[i] for i in per_sample(rows.part("train"), "label")] == ["cat", "dog"]
    assert [rows.classes[i] for i in per_sample(rows.part("test"), "label")] == ["dog"]
    assert set(rows.left_out.values()) == {0}


def test_other_uses_splits_and_statuses_are_not_asked() -> None:
    clips = clips_table(
        [
            clip("a", "s1"),
            clip("a", "s2", uses=["pretrain"]),
            clip("a", "s3", split="val"),
            clip("a", "s4", status="rejected", reason="dark"),
        ]
    )
    rows = build(clips, labels_table(("a", None, None, "cat")))
    assert rows.frame["shot_id"].to_list() == [key("s1")]


def test_a_clip_with_no_value_or_several_is_counted() -> None:
    clips = clips_table([clip("a", "s", 0), clip("b", "t", 1), clip("c", "u", 2)])
    labels = labels_table(("a", 333, 2_000_000, "cat"), ("b", None, None, "cat"), ("b", 0, 3_000_000, "dog"))
    rows = build(clips, labels)
    assert rows.frame["shot_id"].to_list() == [key("s")], "a third of a millisecond before its span, as clips count it"
    assert rows.left_out["unlabelled"] == 2


def test_copies_of_test_clips_leave_probe_train_only() -> None:
    clips = clips_table([clip("a", "s1"), clip("b", "s2"), clip("c", "s3", split="test")])
    labels = labels_table(*[(m, None, None, m) for m in "abc"])
    rows = build(clips, labels, dropped=["s1", "s3"])
    assert rows.part("train")["shot_id"].to_list() == [key("s2")]
    assert rows.part("test")["shot_id"].to_list() == [key("s3")]
    assert rows.left_out["copies_of_test_clips"] == 1


def test_only_committed_rows() -> None:
    clips = clips_table([clip("a", "s1"), clip("b", "s2"), clip("c", "s3")])
    commits = commits_of(clips, status=pl.Series(["ok", "quarantined", "ok"])).head(2)
    rows = build(clips, labels_table(*[(m, None, None, m) for m in "abc"]), commits=commits)
    assert rows.frame["row_id"].to_list() == [key("s100")]
    assert rows.left_out["not_encoded"] == 2


def test_a_row_in_two_batches_counts_once() -> None:
    clips = clips_table([clip("a", "s1"), clip("a", "s1", batch="pets.000001")])
    rows = build(clips, labels_table(("a", None, None, "cat")))
    assert rows.frame["batch"].to_list() == ["pets.000000"]
    assert rows.left_out["not_encoded"] == 0


def test_segments_in_the_order_of_time_and_repeated_where_the_shot_is_short() -> None:
    clips = clips_table([clip("a", "s1", n) for n in (2, 0, 1)] + [clip("b", "s2", 0)])
    rows = build(clips, labels_table(("a", None, None, "cat"), ("b", None, None, "dog")), segments=3).frame
    by_shot = {shot[0]: part["row_id"].to_list() for shot, part in rows.group_by("shot_id")}
    assert by_shot[key("s1")] == [key("s100"), key("s110"), key("s120")]
    assert by_shot[key("s2")] == [key("s200")] * 3
    assert rows.group_by("sample").len()["len"].to_list() == [3, 3]


def test_views_are_samples_of_one_group() -> None:
    clips = clips_table([clip("a", "s1", 0, view) for view in range(3)] + [clip("b", "s2")])
    rows = build(clips, labels_table(("a", None, None, "cat"), ("b", None, None, "dog"))).frame
    assert len(per_sample(rows, "label")) == 4
    groups = per_sample(rows, "clip_group").tolist()
    assert sorted(groups.count(g) for g in set(groups)) == [1, 3]


@given(st.integers(1, 30), st.integers(1, 30))
def test_limits_keep_whole_shots_and_count_the_rest(shots: int, limit: int) -> None:
    clips = clips_table([clip(f"m{n}", f"s{n:03d}", 0, view) for n in range(shots) for view in range(2)])
    labels = labels_table(*[(f"m{n}", None, None, "cat") for n in range(shots)])
    rows = build(clips, labels, limit=limit)
    assert rows.frame.height == 2 * min(shots, limit)
    assert rows.left_out["over_the_limit"] == 2 * max(0, shots - limit)


def test_held_out_rows_are_a_share_of_groups_and_never_split_one() -> None:
    clips = clips_table([clip(f"m{n}", f"s{n:03d}", group=f"g{n // 2}") for n in range(400)])
    labels = labels_table(*[(f"m{n}", None, None, "cat") for n in range(400)])
    train = build(clips, labels).part("train")
    assert 0.1 < train["held_out"].mean() < 0.3  # type: ignore[operator]
    assert train.group_by("group").agg(pl.col("held_out").n_unique())["held_out"].max() == 1


def test_the_digest_follows_rows_bytes_and_labels_but_not_addresses() -> None:
    clips = clips_table([clip("a", "s1"), clip("b", "s2", split="test")])
    labels = labels_table(("a", None, None, "cat"), ("b", None, None, "dog"))
    first = build(clips, labels).digest()
    assert build(clips.reverse(), labels, commits=commits_of(clips, slot=pl.lit(9))).digest() == first
    assert build(clips, labels, commits=commits_of(clips, crc32c=pl.lit(8))).digest() != first
    other = labels_table(("a", None, None, "dog"), ("b", None, None, "dog"))
    assert build(clips, other).digest() != first
    assert build(clips.head(1), labels).digest() != first


def test_heads_may_learn_from_one_view_of_a_shot_drawn_from_its_id() -> None:
    shots = [bytes([number]) * 16 for number in range(60)]
    rows = [
        clip(f"m{number}", f"s{number}", segment, view, shot_id=shot, split="test" if number < 20 else "train")
        for number, shot in enumerate(shots)
        for segment in range(2)
        for view in range(3)
    ]
    labels = labels_table(*[(f"m{number}", None, None, "cat") for number in range(60)])
    found = build(clips_table(rows), labels, segments=2, train_views="one")
    train, test = found.part("train"), found.part("test")
    assert test.height == 20 * 2 * 3, "all views of a test clip are averaged"
    assert train.group_by("shot_id").agg(pl.col("view_index").unique()).height == 40
    views = train.group_by("shot_id").agg(pl.col("view_index").unique())["view_index"]
    assert views.list.len().unique().to_list() == [1], "both segments have the same view"
    assert set(views.explode()) == {0, 1, 2}, "and shots have different ones"
    assert found.left_out["other_views"] == 40 * 2 * 2


@pytest.mark.parametrize(
    ("labels", "splits", "batch", "message"),
    [
        ("ab", ("train", "train"), 1, "benchmark 'species' has no encoded test clip with a label 'animal'"),
        ("ab", ("test", "test"), 1, "benchmark 'species' has no encoded train clip"),
        ("aaa", ("train", "train", "test"), 1, "has only the class 'a' of 'animal'"),
        ("aba", ("train", "train", "test"), 3, "has 2 clips for heads to learn from, fewer than a batch of 3"),
    ],
)
def test_rows_that_no_head_can_learn_from_are_refused(
    labels: str, splits: Sequence[str], batch: int, message: str
) -> None:
    clips = clips_table([clip(f"m{n}", f"s{n}", split=split) for n, split in enumerate(splits)])
    found = build(clips, labels_table(*[(f"m{n}", None, None, label) for n, label in enumerate(labels)]), held_out=0)
    config = BenchmarkConfig(datasets=("pets",), target="animal", policy=ClipPolicy(frames=2, fps=2), batch=batch)
    with pytest.raises(UpstreamError, match=message):
        refuse_unlearnable(found, config)


@pytest.mark.parametrize(("judged", "answers"), [("shot", 5), ("file", 3)])
def test_one_answer_is_given_for_each_shot_or_file(judged: Literal["shot", "file"], answers: int) -> None:
    shots = [("b", "s1"), ("a", "s2"), ("b", "s3"), ("c", "s4"), ("a", "s5")]
    rows = [clip(media, shot, view=view, split="test") for media, shot in shots for view in range(3)]
    found = build(clips_table(rows), labels_table(*[(media, None, None, media) for media in "abc"]), judged=judged)
    groups, labels = (per_sample(found.frame, column) for column in ("clip_group", "label"))
    assert len(groups) == 15
    assert sorted(set(groups.tolist())) == list(range(answers))
    assert (np.diff(groups) >= 0).all(), "samples of one answer follow one another"
    assert all(len(set(labels[groups == group])) == 1 for group in range(answers))
    names = ["media_id" if judged == "file" else "shot_id", "clip_group"]
    assert found.frame.select(names).unique().height == answers


def test_segments_of_a_whole_file_are_one_sample_and_a_copied_shot_takes_all_of_it_along() -> None:
    rows = [clip("ms1", "s1", 0), clip("ms1", "s2", 5), clip("ms3", "s3", 0), clip("ms3", "s3", 9)]
    labels = labels_table(("ms1", None, None, "cat"), ("ms3", None, None, "dog"))
    whole = build(clips_table(rows), labels, segments=2, judged="file", cut_from="file")
    assert whole.frame["shot_id"].to_list() == [key("s1"), key("s2"), key("s3"), key("s3")]
    assert whole.frame["sample"].to_list() == whole.frame["clip_group"].to_list() == [0, 0, 1, 1]
    assert build(clips_table(rows), labels, segments=2).frame["sample"].n_unique() == 3
    left = build(clips_table(rows), labels, segments=2, judged="file", cut_from="file", dropped=["s1"])
    assert left.frame["media_id"].unique().to_list() == [key("ms3")]


def test_the_other_views_of_train_stand_beside_the_one_that_is_drawn() -> None:
    rows = [
        clip(f"m{number}", f"s{number}", segment, view, split="test" if number < 2 else "train")
        for number in range(6)
        for segment in range(2)
        for view in range(1 if number == 5 else 3)
    ]
    labels = labels_table(*[(f"m{number}", None, None, "cat" if number % 2 else "dog") for number in range(6)])
    once = build(clips_table(rows), labels, segments=2, train_views="one")
    found = build(clips_table(rows), labels, segments=2, train_views="one", every_view=True)
    assert found.frame.equals(once.frame)
    assert once.other_views.is_empty()
    assert found.digest() != once.digest()
    assert (once.left_out["other_views"], found.left_out["other_views"]) == (12, 0)
    both = pl.concat([found.part("train"), found.other_views])
    assert found.other_views.height == 3 * 2 * 2
    assert both.group_by("sample", "shot_id", "label").len()["len"].sort().to_list() == [2, 6, 6, 6]
    assert both.group_by("sample").agg(pl.col("view_index").n_unique())["view_index"].sort().to_list() == [1, 3, 3, 3]
    assert found.other_views["segment"].to_list() == [0, 1] * 6, "segments of a view follow one another"
