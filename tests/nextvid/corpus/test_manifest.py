"""One clip's value, what one shot gives, the quota of a long video, and the split of a file."""

import hashlib
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextvid.config.benchmarks import BenchmarkConfig
from nextvid.config.datasets import ClipPolicy, DatasetConfig, FilterConfig, SplitConfig
from nextvid.corpus.manifest import (
    PRETRAIN,
    Label,
    MediaNow,
    Split,
    WholeFile,
    hold_quota,
    rows_of,
    split_of,
    value_of,
    with_value,
)

SHOT = {
    "shot_id": b"s" * 16,
    "media_id": b"m" * 16,
    "dataset": "d",
    "batch": "d.000000",
    "kind": "video",
    "start_us": 0,
    "end_us": 4_000_000,
    "cut_in": "edge",
    "cut_out": "edge",
    "crop_x": 0,
    "crop_y": 4,
    "crop_w": 64,
    "crop_h": 56,
    "motion_mean": 1.0,
    "freeze_share": 0.0,
    "luma_mean": 100.0,
    "blur": 50.0,
}
SPAN = st.tuples(st.integers(0, 20), st.integers(1, 20)).map(lambda s: (s[0] * 10**5, (s[0] + s[1]) * 10**5))


def media(split: str = "train", labels: tuple[Label, ...] = (), refused: str | None = None) -> MediaNow:
    assert split in ("train", "val", "test")
    return MediaNow("/d/a.mp4", "pyav", 1, 8.0, split, None, labels, refused)  # type: ignore[arg-type]


@given(st.lists(st.tuples(SPAN, st.sampled_from("ab")), max_size=4), SPAN)
def test_a_span_labels_the_clips_wholly_inside(spans: list[tuple[tuple[int, int], str]], clip: tuple[int, int]) -> None:
    labels = [Label("t", value, start, end) for (start, end), value in spans]
    times = list(range(clip[0], clip[1], 10**5))
    covering = {v for (start, end), v in spans if set(times) <= set(range(start, end, 10**5))}
    assert value_of(labels, "t", times) == (covering.pop() if len(covering) == 1 else None)


def test_other_targets_and_whole_files() -> None:
    labels = [Label("t", "a", None, None), Label("u", "b", None, None), Label("t", "a", 0, 10)]
    assert value_of(labels, "t", [5]) == "a"
    assert value_of(labels, "u", [5]) == "b"
    assert value_of(labels, "v", [5]) is None


def test_a_span_may_be_rounded_to_a_millisecond() -> None:
    assert value_of([Label("t", "a", 2_667_000, 4_000_000)], "t", [2_666_667, 3_000_000]) == "a"
    assert value_of([Label("t", "a", 2_669_000, 4_000_000)], "t", [2_666_667, 3_000_000]) is None


MOMENTS = st.integers(0, 6).map(lambda n: n * 700)  # so that many lie within the rounding of each other


@given(
    spans=st.lists(st.tuples(st.sampled_from("ab"), st.none() | MOMENTS, st.none() | MOMENTS), max_size=4),
    clips=st.lists(st.lists(MOMENTS, min_size=1, max_size=3).map(sorted), min_size=1, max_size=4),
)
def test_many_clips_are_labelled_as_one(
    spans: list[tuple[str, int | None, int | None]], clips: list[list[int]]
) -> None:
    labels = [Label("t", *span) for span in spans]
    schema = {"media_id": pl.Binary, "target": pl.String, "value": pl.String, "start_us": pl.Int64, "end_us": pl.Int64}
    table = pl.DataFrame([(b"m", "t", *span) for span in spans], schema, orient="row")
    other = pl.DataFrame([(b"n", "t", "c", None, None), (b"m", "u", "c", None, None)], schema, orient="row")
    rows = pl.DataFrame(
        [("d.000000", bytes([n]), b"m", times) for n, times in enumerate(clips)],
        {"batch": pl.String, "row_id": pl.Binary, "media_id": pl.Binary, "times_us": pl.List(pl.Int64)},
        orient="row",
    )
    found = dict(with_value(rows, pl.concat([table, other]), "t").select("row_id", "label").iter_rows())
    wanted = {bytes([n]): value_of(labels, "t", times) for n, times in enumerate(clips)}
    assert found == {row: value for row, value in wanted.items() if value is not None}


def test_a_refused_media_is_one_row_with_its_reason() -> None:
    dataset = DatasetConfig(uri="/d", weight=1.0, clips=(ClipPolicy(frames=4, fps=4),))
    found = rows_of(SHOT, media(refused="contradictory"), dataset, FilterConfig(), {})
    assert [(row["status"], row["reason"], row["crop_y"]) for row in found.rows] == [("rejected", "contradictory", 4)]


def test_pretraining_takes_train_only() -> None:
    dataset = DatasetConfig(uri="/d", weight=1.0, clips=(ClipPolicy(frames=4, fps=4),))
    for split in ("val", "test"):
        found = rows_of(SHOT, media(split), dataset, FilterConfig(), {})
        assert [(row["status"], row["reason"]) for row in found.rows] == [("rejected", "held_out")]
    assert [row["status"] for row in rows_of(SHOT, media(), dataset, FilterConfig(), {}).rows] == ["ok"]


def test_benchmarks_share_rows_and_count_what_has_no_label() -> None:
    policy = ClipPolicy(frames=4, fps=4, clips_per_shot=2, crop="whole")
    dataset = DatasetConfig(uri="/d", weight=1.0, clips=(policy,))
    both = {
        name: BenchmarkConfig(datasets=("d",), target=target, policy=policy)
        for name, target in (("acts", "action"), ("moods", "mood"))
    }
    found = rows_of(SHOT, media(labels=(Label("action", "run", 0, 2_500_000),)), dataset, FilterConfig(), both)
    assert sorted(row["uses"] for row in found.rows) == [["acts", "pretrain"], ["pretrain"]]
    assert found.unlabelled == {"acts": 1, "moods": 2}


def test_segments_of_whole_files_cross_cuts_and_are_rows_of_the_shot_that_they_begin_in() -> None:
    """Two of three segments begin in the first shot, of 3.5 s; the second crosses the cut."""
    first = SHOT | {"end_us": 3_500_000, "cut_out": "hard"}
    second = SHOT | {"shot_id": b"t" * 16, "start_us": 3_500_000, "end_us": 7_500_000, "cut_in": "hard", "crop_y": 0}
    policy = ClipPolicy(frames=4, stride=4, clips_per_shot=3, crop="whole", cut_from="file")
    benchmarks = {"acts": BenchmarkConfig(datasets=("d",), target="action", policy=policy, judged="file")}
    file, labels = WholeFile.of([second, first]), (Label("action", "run", None, None),)
    found = [
        rows_of(shot, media(labels=labels), DatasetConfig(uri="/d"), FilterConfig(), benchmarks, file).rows
        for shot in (first, second)
    ]
    starts = [[row["times_us"][0] for row in rows] for rows in found]
    assert starts == [[437_500, 2_937_500], [5_437_500]], "in the middle of thirds of 7.5 s"
    assert found[0][1]["times_us"][-1] > first["end_us"]
    assert [row["shot_id"] for rows in found for row in rows] == [b"s" * 16, b"s" * 16, b"t" * 16]
    assert {(row["crop_y"], row["crop_h"]) for rows in found for row in rows} == {(0, 60)}, "both shots' boxes"


def test_a_file_of_one_shot_has_the_same_rows_cut_from_either() -> None:
    rows = []
    for cut_from in ("shot", "file"):
        policy = ClipPolicy(frames=4, stride=2, clips_per_shot=3, views=3, crop="centre", cut_from=cut_from)
        benchmarks = {"acts": BenchmarkConfig(datasets=("d",), target="action", policy=policy, judged="file")}
        labels = (Label("action", "run", None, None),)
        rows.append(rows_of(SHOT, media(labels=labels), DatasetConfig(uri="/d"), FilterConfig(), benchmarks).rows)
    assert len(rows[0]) == 3 * 3
    assert rows[0] == rows[1]


def row(media: int, clip: int, frames: int = 16, uses: tuple[str, ...] = (PRETRAIN,), view: int = 0) -> dict[str, Any]:
    ids = {"media_id": bytes([media]) * 16, "clip_id": clip.to_bytes(16, "big"), "view_index": view}
    return ids | {"frames": frames, "uses": list(uses), "status": "ok", "reason": None}


def test_a_long_video_gives_its_quota_of_each_length_and_every_view_of_a_clip() -> None:
    long = [row(1, clip, view=view) for clip in range(200) for view in range(2)]
    longer = [row(1, 1000 + clip, frames=64) for clip in range(50)]
    short = [row(2, 5000, view=view) for view in range(2)]
    rows = [*long, *longer, *short]
    hold_quota(rows, 8)
    kept = [r for r in rows if r["status"] == "ok"]
    assert sum(r["media_id"] == bytes([1]) * 16 and r["frames"] == 16 for r in kept) == 8 * 2
    assert sum(r["frames"] == 64 for r in kept) == 8
    assert all(r["status"] == "ok" for r in short)
    left = [r for r in rows if r["status"] != "ok"]
    assert {(r["status"], r["reason"]) for r in left} == {("rejected", "over_quota")}
    assert all(r["uses"] == [PRETRAIN] for r in left)


@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 10))
def test_more_clips_of_one_media_move_no_other_and_only_join_by_rank(count: int, quota: int, more: int) -> None:
    def kept(number: int) -> set[bytes]:
        rows = [row(1, clip) for clip in range(number)] + [row(2, 999)]
        hold_quota(rows, quota)
        return {r["clip_id"] for r in rows if r["status"] == "ok"}

    before, after = kept(count), kept(count + more)
    assert (999).to_bytes(16, "big") in before & after
    assert len(before) == min(count, quota) + 1
    assert len(before - after) <= more


def test_what_a_benchmark_wants_stays_for_it() -> None:
    rows = [row(1, clip, uses=("acts", PRETRAIN)) for clip in range(5)]
    hold_quota(rows, 2)
    assert [r["status"] for r in rows] == ["ok"] * 5
    assert sum(PRETRAIN in r["uses"] for r in rows) == 2
    assert all("acts" in r["uses"] for r in rows)


def ids(n: int) -> list[bytes]:
    return [hashlib.blake2b(str(i).encode(), digest_size=16).digest() for i in range(n)]


@given(st.binary(min_size=16, max_size=16), st.binary(min_size=16, max_size=16), st.text(max_size=8))
def test_a_group_is_in_one_split(one: bytes, other: bytes, group: str) -> None:
    config = SplitConfig(val=0.3, test=0.3)
    assert split_of(config, None, group, one) == split_of(config, None, group, other)


@given(st.binary(min_size=16, max_size=16))
def test_the_official_split_wins(media: bytes) -> None:
    config = SplitConfig(val=0.5, test=0.5)
    assert split_of(config, "train", "anna", media) == "train"


def test_shares_are_as_configured() -> None:
    config = SplitConfig(val=0.1, test=0.2)
    found = [split_of(config, None, None, media) for media in ids(20_000)]
    shares: dict[Split, float] = {"test": 0.2, "val": 0.1, "train": 0.7}
    for name, share in shares.items():
        # four standard deviations of a binomial share over 20,000 files
        assert found.count(name) / 20_000 == pytest.approx(share, abs=4 * (share * (1 - share) / 20_000) ** 0.5)


def test_a_smaller_share_of_test_keeps_what_is_test() -> None:
    few, many = SplitConfig(test=0.1), SplitConfig(test=0.3)
    assert all(
        split_of(many, None, None, media) == "test" for media in ids(500) if split_of(few, None, None, media) == "test"
    )


@pytest.mark.parametrize(("test", "expected"), [(0.0, {"train"}), (1.0, {"test"})])
def test_shares_of_nothing_and_all(test: float, expected: set[str]) -> None:
    assert {split_of(SplitConfig(test=test), None, None, media) for media in ids(200)} == expected


def test_the_rule_never_changes() -> None:
    """Pinned: a change here would move files between train and test in every existing corpus."""
    config = SplitConfig(val=0.25, test=0.25)
    assert [split_of(config, None, None, media) for media in ids(6)] == PINNED_MEDIA
    assert [split_of(config, None, name, b"\0" * 16) for name in ("anna", "ben", "cleo", "dan")] == PINNED_GROUPS


PINNED_MEDIA = ["test", "test", "val", "val", "train", "test"]
PINNED_GROUPS = ["test", "val", "val", "train"]
