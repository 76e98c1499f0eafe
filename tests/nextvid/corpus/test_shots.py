"""`shots`: cuts found, copies looked at once, failures tried again, configuration digests, the contact sheet."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from PIL import Image

from nextvid.config.project import Project
from nextvid.corpus.cutting import shot_id
from nextvid.corpus.media import make_media
from nextvid.corpus.shots import facts_of, make_shots
from nextvid.corpus.sources import update_sources
from nextvid.making.progress import Progress
from nextvid.video.probe import probe
from storage import tables
from storage.errors import UpstreamError
from storage.schemas import Media, Shots
from tests.factories import passed, unchanged, write_project
from tests.nextvid.corpus.conftest import Made
from tests.nextvid.corpus.small_media import FPS, scene, write_film, write_picture

FILMS = "films.000000"


def shots_of(project: Project, batch: str = FILMS) -> pl.DataFrame:
    return tables.read_table(project.root.table("shots", batch), Shots)


def ids(project: Project, batch: str = FILMS) -> dict[str, bytes]:
    media = tables.read_table(project.root.table("media", batch), Media)
    return dict(media.select("path", "media_id").iter_rows())


def test_a_film_of_two_scenes_is_two_shots_cut_where_it_was_joined(small_corpus: Made) -> None:
    media = ids(small_corpus.project)["one.mp4"]
    shots = shots_of(small_corpus.project).filter(pl.col("media_id") == media)
    assert list(shots.select("start_us", "end_us", "cut_in", "cut_out").iter_rows()) == [
        (0, 2_000_000, "edge", "hard"),
        (2_000_000, 4_000_000, "hard", "edge"),
    ]
    assert shots["shot_id"].to_list() == [
        bytes.fromhex(shot_id(media.hex(), start, end)) for start, end in shots.select("start_us", "end_us").iter_rows()
    ]
    assert all(0.1 < motion < 6 for motion in shots["motion_mean"])


def test_every_readable_media_has_shots_and_copies_are_looked_at_once(small_corpus: Made) -> None:
    shots = shots_of(small_corpus.project)
    known = ids(small_corpus.project)
    assert set(shots["media_id"]) == {media for path, media in known.items() if path != "broken.mp4"}
    assert shots.filter(pl.col("media_id") == known["three.mp4"]).height == 1
    assert small_corpus.outcomes[f"shots {FILMS}"].numbers["viewed"] == 4
    images = shots_of(small_corpus.project, "stills.000000")
    assert images.select("start_us", "end_us").unique().row(0) == (0, 0)
    assert images.height == 4


def test_the_facts_of_a_media_row_are_those_of_its_probe(small_corpus: Made) -> None:
    media = tables.read_table(small_corpus.project.root.table("media", FILMS), Media)
    row = media.row(by_predicate=pl.col("path") == "one.mp4", named=True)
    assert facts_of(row) == probe(small_corpus.folder / "films" / "one.mp4")


def test_the_contact_sheet_shows_the_shots(small_corpus: Made) -> None:
    outcome = small_corpus.outcomes[f"shots {FILMS}"]
    with Image.open(outcome.pictures["shots"]) as sheet:
        assert sheet.format == "PNG"
        colours = {colour for _, colour in sheet.convert("RGB").getcolors(1 << 20) or []}
    assert (200, 40, 40) in colours, "the hard cut of one.mp4 is marked"


def test_making_it_again_does_nothing(own_copy: Callable[..., Project]) -> None:
    project = own_copy()
    with unchanged(project.root.url):
        outcome = make_shots(project, FILMS)
        assert (outcome.made, outcome.numbers["viewed"], outcome.passed) == (False, 0, True)


def test_another_first_pass_looks_again_and_another_threshold_does_not(own_copy: Callable[..., Project]) -> None:
    project = own_copy(curation={"filters": {"motion_min": 3.0}})
    assert make_shots(project, FILMS).numbers["viewed"] == 0
    curation = project.corpus.curation
    hashed = curation.model_copy(update={"shots": curation.shots.model_copy(update={"hash_hz": 2.0})})
    changed = replace(project, corpus=project.corpus.model_copy(update={"curation": hashed}))
    before = shots_of(project)
    outcome = make_shots(changed, FILMS)
    assert (outcome.made, outcome.numbers["viewed"]) == (True, 4)
    after = shots_of(project)
    assert after["shot_id"].equals(before["shot_id"]), "ids come from times alone"
    assert after["hashes"].list.len().sum() > before["hashes"].list.len().sum()


def test_a_failed_first_pass_is_one_row_and_is_tried_again(tmp_path: Path) -> None:
    write_film(tmp_path / "d" / "film.mp4", [scene("dunes", 2 * FPS)])
    write_film(tmp_path / "d" / "other.mp4", [scene("waves", 2 * FPS)])
    project = write_project(tmp_path, {"d": {"uri": "d"}})
    update_sources(project)
    make_media(project, "d.000000")
    whole = (tmp_path / "d" / "film.mp4").read_bytes()
    (tmp_path / "d" / "film.mp4").write_bytes(whole[: len(whole) // 2])
    outcome = make_shots(project, "d.000000")
    assert (outcome.rows, outcome.quarantined, outcome.passed) == (2, 1, True)
    failed = shots_of(project, "d.000000").filter(pl.col("status") == "quarantined")
    assert failed["shot_id"].to_list() == [None]
    assert failed["reason"].null_count() == failed["error"].null_count() == 0
    (tmp_path / "d" / "film.mp4").write_bytes(whole)
    again = make_shots(project, "d.000000")
    assert (again.numbers["viewed"], again.quarantined, again.made) == (1, 0, True)


def test_media_whose_file_went_before_its_first_pass_is_a_row_and_comes_back(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        write_picture(tmp_path / "d" / name, name)
    project = write_project(tmp_path, {"d": {"uri": "d"}})
    update_sources(project)
    make_media(project, "d.000000")
    shutil.move(tmp_path / "d" / "a.jpg", tmp_path / "a.jpg")
    update_sources(project)
    make_media(project, "d.000000")
    assert make_shots(project, "d.000000").numbers["viewed"] == 1
    states = shots_of(project, "d.000000")
    assert sorted(states["status"]) == ["ok", "rejected"]
    assert make_shots(project, "d.000000").made is False
    shutil.move(tmp_path / "a.jpg", tmp_path / "d" / "a.jpg")
    update_sources(project)
    make_media(project, "d.000000")
    assert make_shots(project, "d.000000").numbers["viewed"] == 1
    assert sorted(shots_of(project, "d.000000")["status"]) == ["ok", "ok"]


def test_failed_media_checks_stop_it(own_copy: Callable[..., Project]) -> None:
    project = own_copy()
    passed(project.root.checks("media", FILMS), "media", False)
    with pytest.raises(UpstreamError, match="failed its checks"):
        make_shots(project, FILMS)
    Path(project.root.checks("media", FILMS)).unlink()
    with pytest.raises(UpstreamError, match="has not been made"):
        make_shots(project, FILMS)


def test_progress_counts_to_the_end(own_copy: Callable[..., Project]) -> None:
    project = own_copy()
    Path(project.root.table("shots", "stills.000000")).unlink()
    seen: list[Progress] = []
    make_shots(project, "stills.000000", seen.append)
    assert seen == [Progress("shots stills.000000", done, 4) for done in (1, 2, 3, 4)]


def overlapping(shots: pl.DataFrame) -> pl.DataFrame:
    return shots.with_columns(start_us=pl.when(pl.col("shot_index") == 1).then(1_000_000).otherwise("start_us"))


def too_long(shots: pl.DataFrame) -> pl.DataFrame:
    return shots.with_columns(end_us=pl.when(pl.col("shot_index") == 1).then(9_000_000).otherwise("end_us"))


@pytest.mark.parametrize(("spoil", "name"), [(overlapping, "no_overlap"), (too_long, "intervals_inside_file")])
def test_wrong_intervals_fail_their_check(own_copy: Callable[..., Project], spoil: Any, name: str) -> None:
    project = own_copy()
    tables.write_table(project.root.table("shots", FILMS), spoil(shots_of(project)), Shots)
    outcome = make_shots(project, FILMS)
    assert [check.name for check in outcome.checks if not check.passed] == [name]
    with pytest.raises(UpstreamError, match=name):
        tables.require_checks(project.root.checks("shots", FILMS), "shots")
