"""Pixels beside latents: the frames that were encoded, in the same pass or added later, and what cannot go wrong."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from PIL import Image

from nextvid.config.project import Project, open_project
from nextvid.encode import pixels as writer
from nextvid.encode.frames import DecodedRow, Decoding
from nextvid.encode.latents import make_latents
from nextvid.encode.plan import BatchPlan, accepted_spec, pixel_spec, plan_batch
from nextvid.encode.roundtrip import psnr_db
from nextvid.making.outcome import Check, Outcome
from nextvid.planning.costs import forecast
from nextvid.planning.waiting import standard, unfinished
from storage.errors import ConfigError, ConflictError
from storage.part import PixelPart
from storage.reader import read_row
from storage.shard import ROWS_PER_SHARD, PixelFormat
from storage.spec import PixelSpec
from storage.store import LatentStore, PixelStore
from tests.factories import clip_row, publish_clips
from tests.nextvid.encode.small_corpus import FILMS, STILLS, begin, films, write_corpus
from tests.nextvid.video.film import frames_at

PIXELS = {"quality": 95, "subsampling": "4:4:4"}


@pytest.fixture
def plain(tmp_path: Path, cosine_autoencoder: Path) -> Project:
    """A project that asks for no pixels."""
    return begin(tmp_path, cosine_autoencoder)


@pytest.fixture
def project(tmp_path: Path, cosine_autoencoder: Path) -> Project:
    return begin(tmp_path, cosine_autoencoder, pixels=PIXELS)


def with_pixels(project: Project) -> Project:
    """The same project, once its corpus.yaml asks for pixels."""
    text = project.path.read_text().replace("encoding:\n", "encoding:\n  pixels: {quality: 95, subsampling: '4:4:4'}\n")
    project.path.write_text(text)
    return open_project(project.path)


def planned(project: Project, batch: str = FILMS) -> BatchPlan[PixelSpec]:
    spec = pixel_spec(project, accepted_spec(project))
    assert spec is not None
    return plan_batch(project, batch, PixelStore(project.root, spec))


def store_of(project: Project) -> PixelStore:
    return PixelStore(project.root, planned(project).spec)


def stored(project: Project, batch: str = FILMS) -> dict[bytes, np.ndarray]:
    """Every committed clip, read through zarr."""
    store = store_of(project)
    good = store.commits(batch).filter(pl.col("status") == "ok")
    return {
        row["row_id"]: read_row(store, batch, row["frames"], row["part"], row["slot"])
        for row in good.iter_rows(named=True)
    }


def expected(project: Project, row: dict[str, Any]) -> np.ndarray:
    """One row's frames by the slow way: its own decode and its own resize."""
    frames, _ = frames_at(Path(row["uri"]), row["times_us"], "pyav")
    box = (row["crop_x"], row["crop_y"], row["crop_x"] + row["crop_w"], row["crop_y"] + row["crop_h"])
    side = project.corpus.encoding.resolution
    seen = [np.asarray(Image.fromarray(f).crop(box).resize((side, side), Image.Resampling.BICUBIC)) for f in frames]
    return np.stack(seen)[:, :, ::-1] if row["flip"] else np.stack(seen)


def check_of(outcome: Outcome) -> Check:
    return next(check for check in outcome.checks if check.name == "pixels")


def all_files(folder: str) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*") if path.is_file()}


def forbid_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """No second pass over any file."""

    def refused(*_: object) -> Decoding:
        raise AssertionError("a file was opened again")

    monkeypatch.setattr(writer, "Decoding", refused)


class TestSamePass:
    def test_every_row_is_what_the_slow_way_gives(self, project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
        """Frame by frame, in the same pass as the latents, under their row ids."""
        forbid_decoding(monkeypatch)
        outcome = make_latents(project, FILMS)
        assert outcome.passed
        held = stored(project)
        clips = pl.read_parquet(project.root.table("clips", FILMS))
        assert set(held) == set(clips["row_id"])
        for row in clips.iter_rows(named=True):
            true = expected(project, row)
            for frame, wanted in zip(held[row["row_id"]], true, strict=True):
                assert psnr_db(frame, wanted) > 40
        latents = LatentStore(project.root, accepted_spec(project))
        assert store_of(project).commits(FILMS)["row_id"].to_list() == latents.commits(FILMS)["row_id"].to_list()
        assert store_of(project).verify() == []

    def test_images_are_rows_of_one_frame(self, project: Project) -> None:
        outcome = make_latents(project, STILLS)
        assert check_of(outcome).passed
        assert {clip.shape for clip in stored(project, STILLS).values()} == {(1, 64, 64, 3)}

    def test_the_check_states_psnr_and_size(self, project: Project) -> None:
        """As somebody would measure it by hand on the rows that were sampled."""
        check = check_of(make_latents(project, FILMS))
        commits, held = store_of(project).commits(FILMS), stored(project)
        clips = {
            row["row_id"]: row for row in pl.read_parquet(project.root.table("clips", FILMS)).iter_rows(named=True)
        }
        sampled = commits.drop_nulls("psnr_db")
        assert set(sampled["row_id"]) == set(sorted(clips)[: writer.MEASURED])
        by_hand = [psnr_db(held[row], expected(project, clips[row])) for row in sampled["row_id"]]
        np.testing.assert_allclose(sampled["psnr_db"], by_hand, rtol=1e-5)
        numbers = check.numbers
        assert numbers["psnr_mean_db"] == pytest.approx(np.mean(by_hand), rel=1e-5)
        assert (numbers["rows"], numbers["missing"], numbers["failed"]) == (12, 0, 0)
        assert numbers["size_bytes"] == commits["size_bytes"].sum()
        assert not check.blocking

    def test_second_call_makes_nothing_and_changes_no_file(self, project: Project) -> None:
        make_latents(project, FILMS)
        before = all_files(project.root.url)
        assert not make_latents(project, FILMS).made
        assert all_files(project.root.url) == before

    def test_a_row_that_fails_is_named_and_the_rest_stands(self, project: Project) -> None:
        films(project.path.parent)[1].write_bytes(b"no video")
        outcome = make_latents(project, FILMS)
        commits = store_of(project).commits(FILMS)
        assert commits["status"].to_list().count("quarantined") == 4
        assert commits.filter(pl.col("status") != "ok")["reason"].n_unique() == 1
        assert (check_of(outcome).numbers["rows"], check_of(outcome).numbers["failed"]) == (8, 4)
        assert check_of(outcome).passed  # each wanted row is there, or failed with a reason; the budget is `counts`'

    def test_latents_are_the_same_with_and_without(
        self, plain: Project, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        make_latents(plain, FILMS)
        spec = accepted_spec(plain)
        alone = LatentStore(plain.root, spec).commits(FILMS)["crc32c"].to_list()
        folder = tmp_path_factory.mktemp("both")
        both = begin(folder, Path(plain.corpus.encoding.autoencoder), pixels=PIXELS)
        make_latents(both, FILMS)
        assert accepted_spec(both).digest() == spec.digest()
        assert LatentStore(both.root, spec).commits(FILMS)["crc32c"].to_list() == alone


class TestLater:
    def test_pixels_are_added_without_touching_latents(self, plain: Project) -> None:
        outcome = make_latents(plain, FILMS)
        assert check_of(outcome).passed
        assert not Path(plain.root.folder("pixels")).exists()
        before = all_files(plain.root.folder("latents"))
        project = with_pixels(plain)
        assert unfinished(standard(project), FILMS)[-1:] != (
            "12 rows have no pixels",
        )  # other tables were never made here
        (cost,) = forecast(project, FILMS).now
        assert (cost.rows, cost.without_pixels) == (0, 12)
        assert "12 rows have no pixels yet" in cost.line()
        outcome = make_latents(project, FILMS)
        assert outcome.made
        assert set(stored(project)) == set(pl.read_parquet(project.root.table("clips", FILMS))["row_id"])
        checks = Path(project.root.latents_checks(accepted_spec(project).digest(), FILMS))
        assert {p: t for p, t in all_files(plain.root.folder("latents")).items() if p != checks} == {
            p: t for p, t in before.items() if p != checks
        }
        assert forecast(project, FILMS).now[0].without_pixels == 0

    def test_another_quality_is_another_store(self, project: Project) -> None:
        make_latents(project, FILMS)
        first = store_of(project)
        project.path.write_text(project.path.read_text().replace("quality: 95", "quality: 60"))
        again = open_project(project.path)
        assert planned(again).rows.height == 12
        make_latents(again, FILMS)
        assert len(PixelStore.every(again.root)) == 2
        small, large = (int(store.commits(FILMS)["size_bytes"].sum()) for store in (store_of(again), first))
        assert small < 0.7 * large

    def test_new_clips_get_pixels_with_their_latents(self, project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
        paths = films(project.path.parent)
        publish_clips(project, FILMS, [clip_row(paths[0], 0)])
        make_latents(project, FILMS)
        publish_clips(project, FILMS, [clip_row(paths[0], 0), clip_row(paths[1], 0), clip_row(paths[1], 3)])
        forbid_decoding(monkeypatch)
        make_latents(project, FILMS)
        assert len(stored(project)) == 3
        assert store_of(project).parts(FILMS, 4) == [0, 1]

    def test_new_latents_under_old_pixels_decode_no_pixels_again(
        self, project: Project, random_autoencoder: Path
    ) -> None:
        """Another autoencoder at the same resolution: its rows have their pixels already."""
        make_latents(project, FILMS)
        before = all_files(project.root.folder("pixels"))
        text = project.path.read_text().replace(str(project.corpus.encoding.autoencoder), str(random_autoencoder))
        project.path.write_text(text)
        make_latents(open_project(project.path), FILMS)
        assert all_files(project.root.folder("pixels")) == before


class TestCrashes:
    def test_a_writer_that_dies_before_the_pixels_is_finished_by_the_next(
        self, project: Project, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Latents are committed, their pixels are not: the next call adds them, from a decode of its own."""

        def dies(self: PixelFormat, *_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(PixelFormat, "encode", dies)
            with pytest.raises(KeyboardInterrupt):
                make_latents(project, FILMS)
        assert planned(project).rows.height == 12
        assert store_of(project).parts(FILMS, 4) == [0]
        outcome = make_latents(project, FILMS)
        assert check_of(outcome).passed
        assert len(stored(project)) == 12
        assert store_of(project).parts(FILMS, 4) == [0]  # the part that was begun
        assert store_of(project).verify() == []

    def test_a_shard_that_another_writer_committed_is_theirs(
        self, project: Project, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = PixelPart.write_shard

        def second(self: PixelPart, number: int, rows: Any, commits: pl.DataFrame) -> None:
            real(self, number, rows, commits)
            if self.format.array == "pixels":
                raise ConflictError("another writer was first")

        monkeypatch.setattr("storage.part.Part.write_shard", second)
        assert check_of(make_latents(project, FILMS)).passed
        assert len(stored(project)) == 12

    def test_a_removed_commit_is_made_again(self, project: Project) -> None:
        """The remedy that `verify` names."""
        make_latents(project, FILMS)
        part = store_of(project).part(FILMS, 4, 0)
        before = Path(part.shard_path(0)).read_bytes()
        Path(part.shard_path(0)).write_bytes(before[:-9] + b"123456789")
        (problem,) = store_of(project).verify()
        assert problem.remedy == f"remove {part.commit_path(0)} and make the latents of batch {FILMS} again"
        Path(part.commit_path(0)).unlink()
        make_latents(project, FILMS)
        assert store_of(project).verify() == []
        assert Path(part.shard_path(0)).read_bytes() == before


class TestShard:
    def test_frames_wait_for_threads_only_so_far(self, project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whoever decodes faster than JPEGs are made waits, so that memory is bounded."""
        monkeypatch.setattr(writer, "WAITING", 2)
        spec = planned(project).spec
        store = PixelStore(project.root, spec)
        store.create()
        ids = [bytes([number]) * 16 for number in range(40)]
        part = store.plan_part(FILMS, 4, ids)
        frames = np.zeros((4, 64, 64, 3), np.uint8)
        most = 0
        with ThreadPoolExecutor(1) as threads:
            shard = writer.PixelShard(part, 0, threads)
            for row in ids:
                shard.add({row: DecodedRow(frames, 0.0)})
                most = max(most, sum(not future.done() for future in shard._coming.values()))
            assert shard.publish() == len(ids)
        assert most <= 2
        assert store.commits(FILMS)["status"].to_list() == ["ok"] * 40

    def test_rows_nobody_wants_are_rejected_without_a_chunk(self, project: Project) -> None:
        spec = planned(project).spec
        store = PixelStore(project.root, spec)
        store.create()
        part = store.plan_part(FILMS, 4, [bytes(16), b"1" * 16])
        with ThreadPoolExecutor(1) as threads:
            shard = writer.PixelShard(part, 0, threads)
            shard.add(
                {
                    bytes(16): DecodedRow(np.zeros((4, 64, 64, 3), "u1"), 0.0),
                    b"1" * 16: DecodedRow(None, 0.0, "not_wanted"),
                }
            )
            assert shard.publish() == 2
        assert store.commits(FILMS).select("status", "reason").rows() == [("ok", None), ("rejected", "not_wanted")]
        assert ROWS_PER_SHARD == 256


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"quality": 0}, "encoding.pixels.quality"),
        ({"quality": 101}, "encoding.pixels.quality"),
        ({"subsampling": "420"}, "encoding.pixels.subsampling"),
        ({"qualty": 90}, "did you mean 'quality'"),
    ],
)
def test_corpus_yaml_refuses(tmp_path: Path, cosine_autoencoder: Path, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        write_corpus(tmp_path, cosine_autoencoder, pixels=asked)
