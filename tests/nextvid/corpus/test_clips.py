"""`clips`: who wants which view, what each shot says when nobody does, and the labels that benchmarks read."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from nextvid.config.project import Project
from nextvid.corpus.clips import _checks, _media_now, make_clips
from nextvid.corpus.cutting import View, clip_id, row_id
from nextvid.corpus.media import make_media
from nextvid.corpus.shots import make_shots
from nextvid.making.batches import config_of
from storage import tables
from storage.errors import UpstreamError
from storage.schemas import Clips, Labels, Shots
from tests.factories import make_corpus, passed, unchanged, write_project
from tests.nextvid.corpus.conftest import POLICY, Made, films_of
from tests.nextvid.corpus.small_media import write_picture

FILMS, STILLS = "films.000000", "stills.000000"


def clips_of(project: Project, batch: str = FILMS) -> pl.DataFrame:
    return tables.read_table(project.root.table("clips", batch), Clips)


def named(project: Project, batch: str = FILMS) -> dict[str, pl.DataFrame]:
    """Rows by file name."""
    rows = clips_of(project, batch).with_columns(name=pl.col("uri").str.split("/").list.last())
    return {str(name): part for (name,), part in rows.group_by("name")}


def test_pretraining_and_benchmarks_get_their_views(small_corpus: Made) -> None:
    one = named(small_corpus.project)["one.mp4"]
    uses = one.group_by("shot_id").agg(pl.col("uses").list.join("+").sort())["uses"].to_list()
    assert uses == [["actions", "pretrain", "pretrain"]] * 2, "two views for pretraining, one for the benchmark"
    assert one["split"].unique().to_list() == ["train"]
    assert one["group"].unique().to_list() == ["anna"]
    assert one["frames"].unique().to_list() == [4]
    for times in one["times_us"]:
        assert [b - a for a, b in itertools.pairwise(times)] == [250_000] * 3


def test_benchmark_views_show_the_protocols_crop_unflipped(small_corpus: Made) -> None:
    for rows in named(small_corpus.project).values():
        mine = rows.filter((pl.col("status") == "ok") & pl.col("uses").list.contains("actions"))
        assert mine.select("crop_x", "crop_y", "crop_w", "crop_h", "flip").unique().rows() in (
            [(0, 0, 64, 64, False)],
            [],
        )


def test_clips_stay_away_from_cuts(small_corpus: Made) -> None:
    one = named(small_corpus.project)["one.mp4"]
    for times in one["times_us"]:
        assert times[-1] <= 1_750_000 - 125_000 or times[0] >= 2_250_000, (
            "0.25 s trimmed on both sides of the cut at 2 s"
        )


def test_test_files_serve_the_benchmark_only(small_corpus: Made) -> None:
    two = named(small_corpus.project)["two.mp4"]
    assert two.select("split", pl.col("uses").list.join("+")).rows() == [("test", "actions")]


def test_a_shot_that_nobody_takes_says_why(small_corpus: Made) -> None:
    still = named(small_corpus.project)["still.mp4"].row(0, named=True)
    reason = "static" if still["split"] == "train" else "unlabelled"
    assert (still["status"], still["reason"], still["row_id"], still["frames"]) == ("rejected", reason, None, 0)
    assert still["uses"] == (["pretrain"] if still["split"] == "train" else [])


def test_copies_in_a_batch_are_made_once_and_broken_files_give_no_row(small_corpus: Made) -> None:
    names = set(named(small_corpus.project))
    assert names == {"one.mp4", "two.mp4", "still.mp4", "copy_of_three.mp4"}, "the first name of the two equal files"


def test_a_view_that_both_want_is_one_row(small_corpus: Made) -> None:
    rows = clips_of(small_corpus.project, STILLS)
    assert rows.height == 4
    for row in rows.iter_rows(named=True):
        assert row["uses"] == (["fruits", "pretrain"] if row["split"] == "train" else ["fruits"])
        assert (row["frames"], row["times_us"]) == (1, [0])


def test_ids_are_those_of_content(small_corpus: Made) -> None:
    for row in clips_of(small_corpus.project).filter(pl.col("status") == "ok").iter_rows(named=True):
        clip = clip_id(row["media_id"].hex(), row["times_us"])
        view = View(row["crop_x"], row["crop_y"], row["crop_w"], row["crop_h"], row["flip"])
        assert (row["clip_id"].hex(), row["row_id"].hex()) == (clip, row_id(clip, view))


def test_making_it_again_writes_nothing(own_copy: Callable[..., Project]) -> None:
    project = own_copy()
    with unchanged(project.root.url):
        assert make_clips(project, FILMS).made is False


def test_a_threshold_drops_shots_from_pretraining_only(own_copy: Callable[..., Project]) -> None:
    project = own_copy(curation={"filters": {"motion_min": 50.0, "motion_max": None}})
    shots = Path(project.root.table("shots", FILMS)).stat().st_mtime_ns
    outcome = make_clips(project, FILMS)
    assert "for_pretrain" not in outcome.numbers
    assert outcome.numbers["for_actions"] == 4
    one = named(project)["one.mp4"]
    assert sorted(one.select("status", "reason", pl.col("uses").list.join("+")).rows(), key=str) == [
        ("ok", None, "actions"),
        ("ok", None, "actions"),
        ("rejected", "static", "pretrain"),
        ("rejected", "static", "pretrain"),
    ]
    assert Path(project.root.table("shots", FILMS)).stat().st_mtime_ns == shots


def test_a_benchmark_of_whole_files_crosses_cuts_and_pretraining_does_not(own_copy: Callable[..., Project]) -> None:
    policy = {"frames": 4, "fps": 4, "cut_from": "file"}
    benchmark = {"datasets": ["films"], "target": "group", "policy": policy, "judged": "file"}
    project = own_copy(benchmarks={"people": benchmark})
    outcome = make_clips(project, FILMS)
    assert outcome.passed, outcome.checks
    one = named(project)["one.mp4"].filter(pl.col("uses").list.contains("people"))
    assert one["times_us"].to_list()[0][0] < 2_000_000 <= one["times_us"].to_list()[0][-1]
    shots, media = (
        tables.read_table(project.root.table("shots", FILMS), Shots),
        _media_now(project, FILMS, config_of(project, FILMS)),
    )
    assert not _checks(clips_of(project), shots, media, {})[0].passed, "of shots, the same clips would cross a cut"


def test_a_policy_that_no_shot_is_long_enough_for(own_copy: Callable[..., Project], small_files: Path) -> None:
    films = films_of(small_files) | {"clips": [{"frames": 64, "fps": 4, "pad": "skip"}]}
    project = own_copy(datasets={"films": films}, benchmarks={})
    outcome = make_clips(project, FILMS)
    assert int(outcome.numbers["reason_too_short"]) >= 3
    assert outcome.numbers["clips"] == 0
    assert outcome.passed


def test_a_dataset_that_nobody_uses_says_so(own_copy: Callable[..., Project], small_files: Path) -> None:
    project = own_copy(datasets={"films": {"uri": str(small_files / "films")}}, benchmarks={})
    assert make_clips(project, FILMS).numbers["reason_unused"] == 5


def test_more_policies_and_views_keep_the_old_rows(own_copy: Callable[..., Project], small_files: Path) -> None:
    films = films_of(small_files)
    old = films["clips"][0]
    project = own_copy(
        datasets={"films": films | {"clips": [old | {"views": 4}, {**POLICY, "frames": 2}]}}, benchmarks={}
    )
    pretrained = (pl.col("status") == "ok") & pl.col("uses").list.contains("pretrain")
    before = set(clips_of(project).filter(pretrained)["row_id"])
    make_clips(project, FILMS)
    after = set(clips_of(project).filter(pretrained)["row_id"])
    assert before < after


def test_withdrawn_media_give_only_their_reason(own_copy: Callable[..., Project]) -> None:
    project = own_copy()
    media = named(project)["one.mp4"]["media_id"][0]
    mark = Path(project.root.withdrawn(), f"{media.hex()}.json")
    mark.parent.mkdir()
    mark.write_text("{}")
    make_media(project, FILMS)
    make_shots(project, FILMS)
    make_clips(project, FILMS)
    rows = clips_of(project).filter(pl.col("media_id") == media)
    assert rows.select("status", "reason", "row_id").unique().rows() == [("rejected", "withdrawn", None)]


def test_rows_of_a_gone_file_stay_and_those_of_a_replaced_one_do_not(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        write_picture(tmp_path / "d" / name, name)
    config = {"uri": "d", "weight": 1.0, "clips": [{"frames": 1}], "split": {"test": 0.0}}
    project = write_project(tmp_path, {"d": config})

    def make() -> dict[str, list[tuple[Any, ...]]]:
        assert all(outcome.passed for outcome in make_corpus(project).values())
        return {n: sorted(t.select("status", "reason").rows()) for n, t in named(project, "d.000000").items()}

    assert make() == {name: [("ok", None)] for name in ("a.jpg", "b.jpg", "c.jpg")}
    (tmp_path / "d" / "a.jpg").unlink()
    write_picture(tmp_path / "d" / "b.jpg", "other bytes")
    assert make() == {
        "a.jpg": [("ok", None)],
        "b.jpg": [("ok", None), ("rejected", "replaced")],
        "c.jpg": [("ok", None)],
    }


def test_values_that_are_missing_or_several_are_left_out(own_copy: Callable[..., Project]) -> None:
    project = own_copy()
    labels = tables.read_table(project.root.table("labels", FILMS), Labels)
    media = named(project)["two.mp4"]["media_id"][0]
    extra = labels.filter((pl.col("media_id") == media) & (pl.col("target") == "action")).with_columns(
        start_us=pl.lit(0, pl.Int64), end_us=pl.lit(3_000_000, pl.Int64), value=pl.lit("run")
    )
    tables.write_table(project.root.table("labels", FILMS), pl.concat([labels, extra]), Labels)
    outcome = make_clips(project, FILMS)
    assert outcome.numbers["unlabelled_actions"] == 2, "two.mp4 walks and runs from 0 to 3 s; still.mp4"


def test_failed_shots_stop_it(own_copy: Callable[..., Project]) -> None:
    project = own_copy()
    passed(project.root.checks("shots", FILMS), "shots", False)
    with pytest.raises(UpstreamError, match="by hand"):
        make_clips(project, FILMS)


def crossing(clips: pl.DataFrame) -> pl.DataFrame:
    """The last time of every clip a second later."""
    later = pl.concat_list(pl.col("times_us").list.head(3), pl.col("times_us").list.tail(1) + 2_000_000)
    return clips.with_columns(times_us=pl.when(pl.col("status") == "ok").then(later).otherwise("times_us"))


def moved(clips: pl.DataFrame) -> pl.DataFrame:
    return clips.with_columns(crop_x=pl.col("crop_x") + 1)


def twice(clips: pl.DataFrame) -> pl.DataFrame:
    return pl.concat([clips, clips.filter(pl.col("status") == "ok").head(1)])


def lost(clips: pl.DataFrame) -> pl.DataFrame:
    return clips.filter(pl.col("status") == "ok")


@pytest.mark.parametrize(
    ("spoil", "names"),
    [
        (lambda clips: clips, []),
        (crossing, ["no_clip_crosses_a_cut", "ids_derive_from_content"]),
        (moved, ["ids_derive_from_content"]),
        (twice, ["ids_derive_from_content"]),
        (lost, ["every_shot_has_a_row"]),
    ],
)
def test_checks_find_what_they_are_for(small_corpus: Made, spoil: Any, names: list[str]) -> None:
    project = small_corpus.project
    shots = tables.read_table(project.root.table("shots", FILMS), Shots)
    media = _media_now(project, FILMS, config_of(project, FILMS))
    checks = _checks(spoil(clips_of(project)), shots, media, project.corpus.benchmarks)
    assert [check.name for check in checks if not check.passed] == names
