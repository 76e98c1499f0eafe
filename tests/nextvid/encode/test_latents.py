"""latents, end to end on small files: equal to a slow reading; slips are refused; kills are survived."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from PIL import Image

from nextvid.config.project import Project
from nextvid.encode import decode_task, shard
from nextvid.encode.autoencoders import Autoencoder
from nextvid.encode.checks import shard_costs
from nextvid.encode.decode_task import CropBox
from nextvid.encode.frames import DecodedRow
from nextvid.encode.latent_stats import moments
from nextvid.encode.latents import make_latents
from nextvid.encode.plan import accepted_spec, plan_encode, wanted_clips
from nextvid.making.outcome import Outcome
from nextvid.making.progress import Progress, silent
from storage.digest import digest_file
from storage.errors import UpstreamError
from storage.part import LatentPart, Part
from storage.seal import read_seal
from storage.store import LatentStore, every_store
from storage.tables import require_checks
from storage.withdrawn import record_withdrawal
from tests.factories import clip_row, publish_clips, unchanged
from tests.nextvid.encode.small_corpus import (
    FILMS,
    STILLS,
    F,
    begin,
    films,
    stills,
    stored,
    texture,
    write_corpus,
    write_video,
)
from tests.nextvid.video.film import frames_at


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, cosine_autoencoder: Path) -> tuple[Project, Outcome]:
    """A project whose films are encoded, for tests that only read it."""
    project = begin(tmp_path_factory.mktemp("made"), cosine_autoencoder)
    return project, make_latents(project, FILMS)


def expected(project: Project, row: dict[str, Any]) -> np.ndarray:
    """One row's latents by the slow way: its own decode, its own resize, its own forward."""
    frames, _ = frames_at(Path(row["uri"]), row["times_us"], "pyav")
    box = (row["crop_x"], row["crop_y"], row["crop_x"] + row["crop_w"], row["crop_y"] + row["crop_h"])
    side = project.corpus.encoding.resolution
    seen = [Image.fromarray(f).crop(box).resize((side, side), Image.Resampling.BICUBIC) for f in frames]
    views = np.stack([np.asarray(image) for image in seen])
    views = views[:, :, ::-1].copy() if row["flip"] else views
    return Autoencoder.load(project.corpus.encoding.autoencoder).encode(views).latents


class TestEncode:
    def test_every_row_is_what_the_slow_way_gives(self, made: tuple[Project, Outcome]) -> None:
        project, outcome = made
        assert outcome.made
        assert outcome.passed
        assert outcome.rows == 12
        clips = pl.read_parquet(project.root.table("clips", FILMS))
        held = stored(project, FILMS)
        assert set(held) == set(clips["row_id"])
        for row in clips.iter_rows(named=True):
            np.testing.assert_allclose(held[row["row_id"]], expected(project, row), atol=2e-4)

    def test_int8_makes_the_round_trip(self, tmp_path: Path, cosine_autoencoder: Path) -> None:
        """Smaller rows, still within half a step of the slow way, judged by the maker itself."""
        project = write_corpus(tmp_path, cosine_autoencoder, storage="int8")
        rows = [clip_row(path, index) for path in films(tmp_path, 2) for index in (0, 3)]
        publish_clips(project, FILMS, rows)
        outcome = make_latents(project, FILMS)
        assert outcome.passed
        for row in rows:
            exact, held = expected(project, row), stored(project, FILMS)[row["row_id"]].astype(np.float32)
            largest = np.abs(exact).max(axis=(0, 2, 3), keepdims=True)
            assert (np.abs(held - exact) <= largest / 250 + 2e-4).all()

    def test_images_are_rows_of_one_frame(self, project: Project) -> None:
        outcome = make_latents(project, STILLS)
        assert outcome.passed
        assert {row.shape[0] for row in stored(project, STILLS).values()} == {1}
        assert outcome.rows == 4

    def test_second_call_makes_nothing_and_changes_no_file(self, made: tuple[Project, Outcome]) -> None:
        project, first = made
        with unchanged(project.root.url):
            second = make_latents(project, FILMS)
            assert not second.made
            assert second.digest == first.digest
            assert second.passed

    def test_finished_parts_are_sealed_those_of_before_too(self, project: Project, small_shards: None) -> None:
        first, store = make_latents(project, FILMS), LatentStore(project.root, accepted_spec(project))
        (part,) = store.parts_of(FILMS)
        seal, commits = read_seal(part), store.commits(FILMS)
        assert seal is not None
        part.unseal()  # as a store of before
        again = make_latents(project, FILMS)
        assert not again.made
        assert again.digest == first.digest
        assert read_seal(part) == seal
        assert store.commits(FILMS).equals(commits)

    def test_only_missing_rows_are_encoded_in_a_new_part(self, project: Project, tmp_path: Path) -> None:
        make_latents(project, FILMS)
        before = stored(project, FILMS)
        rows = [clip_row(p, index, view) for p in films(tmp_path, 4) for index in (0, 3) for view in (0, 1, 2)]
        publish_clips(project, FILMS, rows)
        plan = plan_encode(project, FILMS)
        assert plan.reasons == {"new file": 6, "new view": 6}
        outcome = make_latents(project, FILMS)
        assert outcome.numbers["encoded"] == 12
        assert outcome.rows == 24
        store = LatentStore(project.root, accepted_spec(project))
        assert store.parts(FILMS, F) == [0, 1]
        after = stored(project, FILMS)
        for row, values in before.items():
            np.testing.assert_array_equal(after[row], values)

    def test_commits_carry_sums_of_what_is_stored(self, made: tuple[Project, Outcome]) -> None:
        project, _ = made
        held = stored(project, FILMS)
        store = LatentStore(project.root, accepted_spec(project))
        for row in store.commits(FILMS).iter_rows(named=True):
            exact = held[row["row_id"]].astype(np.float64)
            np.testing.assert_allclose(row["sums"], exact.sum((0, 2, 3)), rtol=1e-12)
            np.testing.assert_allclose(row["sums_squared"], (exact**2).sum((0, 2, 3)), rtol=1e-12)

    def test_progress_ends_at_the_total(self, project: Project, small_shards: None) -> None:
        seen: list[Progress] = []
        make_latents(project, FILMS, seen.append)
        assert [(pace.done, pace.total) for pace in seen] == [(4, 12), (8, 12), (12, 12)]
        assert all(0 < pace.busy_share <= 1 for pace in seen)

    def test_costs_of_every_shard_add_up_to_the_metadata(self, project: Project, small_shards: None) -> None:
        outcome = make_latents(project, FILMS)
        spec = accepted_spec(project)
        commits = LatentStore(project.root, spec).commits(FILMS)
        spent = shard_costs(commits, spec)
        assert spent["rows"].to_list() == [4, 4, 4]
        assert spent["stored_bytes"].to_list() == [4 * spec.row_bytes(F)] * 3
        for name in ("decode_s", "encode_s"):
            assert outcome.numbers[name] == pytest.approx(commits[name].sum(), rel=1e-5)
            assert (spent[name] > 0).all()
        assert outcome.numbers["stored_bytes"] == 12 * spec.row_bytes(F) == outcome.size_bytes
        assert outcome.numbers["shards"] == 3

    def test_preview_is_a_picture_of_four_rows_a_clip(self, made: tuple[Project, Outcome]) -> None:
        (path,) = made[1].pictures.values()
        with Image.open(path) as picture:
            assert picture.size == (8 * 96, 4 * 4 * 96 + 3 * 6)  # eight channels beside four frames

    def test_targets_without_a_decoder_are_encoded_again_and_no_more(self, tmp_path: Path, siglip: Path) -> None:
        project = write_corpus(tmp_path, siglip)
        publish_clips(project, FILMS, [clip_row(path, 0) for path in films(tmp_path, 2)])
        outcome = make_latents(project, FILMS)
        assert outcome.passed
        numbers = next(check for check in outcome.checks if check.name == "round_trip").numbers
        assert (numbers["rows"], numbers["unchecked_shards"]) == (2, 0)
        assert "psnr_mean_db" not in numbers
        assert numbers["worst_error_std"] < 0.005  # type: ignore[operator]
        assert {row.shape for row in stored(project, FILMS).values()} == {(F, 32, 4, 4)}

    def test_encoders_over_time_store_their_latent_frames(self, tmp_path: Path, cosmos: Path) -> None:
        """Noise, of which a decoder that always says grey cannot tell a shift or a flip: every row is undecidable."""
        project = write_corpus(tmp_path, cosmos)
        (tmp_path / "films").mkdir(exist_ok=True)
        path = tmp_path / "films" / "noise.mp4"
        write_video(path, np.random.default_rng(0).integers(100, 156, (24, 64, 64, 3), dtype=np.uint8))
        publish_clips(project, FILMS, [clip_row(path, 0), clip_row(path, 3)])
        outcome = make_latents(project, FILMS)
        assert outcome.passed
        assert accepted_spec(project).time_map == "causal4"
        assert {row.shape for row in stored(project, FILMS).values()} == {(2, 4, 8, 8)}  # of F = 4 frames
        commits = LatentStore(project.root, accepted_spec(project)).commits(FILMS)
        held = np.stack([stored(project, FILMS)[row].astype(np.float64) for row in commits["row_id"]])
        found = moments(commits, accepted_spec(project))
        np.testing.assert_allclose(found.mean, held.mean(axis=(0, 1, 3, 4)), atol=1e-9)
        np.testing.assert_allclose(found.std, held.std(axis=(0, 1, 3, 4)), rtol=1e-9)

    def test_raw_pixels_are_a_target_too(self, tmp_path: Path) -> None:
        folder = tmp_path / "pixels"
        folder.mkdir()
        (folder / "nextvid.json").write_text('{"kind": "pixels", "patch": 16}')
        project = write_corpus(tmp_path, folder)
        publish_clips(project, STILLS, [clip_row(path, 0) for path in stills(tmp_path)])
        outcome = make_latents(project, STILLS)
        assert outcome.passed
        numbers = next(check for check in outcome.checks if check.name == "round_trip").numbers
        assert numbers["psnr_min_db"] == 100  # every byte

    def test_unchecked_clips_are_refused(self, project: Project) -> None:
        Path(project.root.checks("clips", FILMS)).unlink()
        with pytest.raises(UpstreamError):
            make_latents(project, FILMS)

    def test_keepbits_and_posterior_sample_come_back_too(self, tmp_path: Path, random_autoencoder: Path) -> None:
        made = write_corpus(tmp_path, random_autoencoder, posterior="sample", storage="int8", precision="bf16")
        publish_clips(made, STILLS, [clip_row(path, 0) for path in stills(tmp_path)])
        spec = accepted_spec(made)
        ids = pl.read_parquet(made.root.table("clips", STILLS))["row_id"].to_list()
        views = {row: DecodedRow(texture(i, 1), 0.0) for i, row in enumerate(ids)}
        model = Autoencoder.load(random_autoencoder, precision="bf16")
        (one,) = shard.encode_rows(model, spec, 1, [views])
        (other,) = shard.encode_rows(model, spec, 1, [dict(reversed(views.items()))])
        mean = model.encode(views[ids[0]].frames).latents  # type: ignore[arg-type]
        assert one.posterior_std[0] is not None
        # the noise belongs to the row, not to its place in the batch
        drawn, again = one.latents[0] - mean, other.latents[1] - mean
        np.testing.assert_allclose(drawn, again, atol=0.1 * drawn.std())
        assert 0.5 < drawn.std() / one.posterior_std[0] < 1.5


class TestFailures:
    def test_row_that_cannot_be_decoded_is_quarantined_and_tried_again(self, project: Project, tmp_path: Path) -> None:
        good = films(tmp_path)
        broken = tmp_path / "films" / "broken.mp4"
        broken.write_bytes(b"not a video at all")
        rows = [clip_row(path, index) for path in good for index in range(8)]
        publish_clips(project, FILMS, [*rows, clip_row(broken, 0)])
        outcome = make_latents(project, FILMS)
        assert outcome.rows == 24
        assert outcome.quarantined == 1
        assert outcome.passed  # 1 of 25 is within the budget of 5 %
        assert plan_encode(project, FILMS).reasons == {"failed before": 1}
        write_video(broken, texture(9))
        publish_clips(project, FILMS, [*rows, clip_row(broken, 0)])
        assert make_latents(project, FILMS).quarantined == 0

    def test_one_bad_time_spoils_no_other_row_of_its_file(self, project: Project, tmp_path: Path) -> None:
        path = films(tmp_path, 1)[0]
        late = clip_row(path, 1, times_us=[90_000_000 + i for i in range(F)])
        publish_clips(project, FILMS, [clip_row(path, 0), late, clip_row(path, 2)])
        outcome = make_latents(project, FILMS)
        assert outcome.rows == 2
        assert outcome.quarantined == 1
        assert not outcome.passed  # a third is over the budget
        with pytest.raises(UpstreamError, match="counts"):
            require_checks(project.root.latents_checks(accepted_spec(project).digest(), FILMS), "latents")

    def test_file_that_changed_since_it_was_listed_gives_no_row(self, project: Project, tmp_path: Path) -> None:
        path = films(tmp_path, 1)[0]
        publish_clips(project, FILMS, [clip_row(path, 0)])
        write_video(path, texture(77))
        make_latents(project, FILMS)
        commits = LatentStore(project.root, accepted_spec(project)).commits(FILMS)
        assert commits["reason"].to_list() == ["changed"]

    def test_constant_rows_are_quarantined(self, project: Project, tmp_path: Path) -> None:
        flat = tmp_path / "stills" / "flat.png"
        Image.fromarray(np.full((64, 64, 3), 128, np.uint8)).save(flat)
        publish_clips(project, STILLS, [clip_row(flat, 0), clip_row(stills(tmp_path)[0], 0)])
        outcome = make_latents(project, STILLS)
        counts = next(check for check in outcome.checks if check.name == "counts")
        assert counts.numbers["reason_constant"] == 1
        assert next(check for check in outcome.checks if check.name == "finite").passed

    def test_orphans_are_reported_and_stay(self, project: Project, tmp_path: Path) -> None:
        make_latents(project, FILMS)
        publish_clips(project, FILMS, [clip_row(films(tmp_path)[0], 0)])
        outcome = make_latents(project, FILMS)
        orphan = next(check for check in outcome.checks if check.name == "no_orphan")
        assert not orphan.passed
        assert orphan.numbers["orphaned"] == 11
        assert outcome.passed
        assert len(stored(project, FILMS)) == 12


class TestUnstorable:
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e6])
    def test_what_float16_cannot_hold_is_refused(self, value: float) -> None:
        latents = np.random.default_rng(0).standard_normal((2, 3, 4, 4)).astype(np.float32)
        seen = DecodedRow(texture(0, 2), 0.0)
        assert shard.unstorable(bytes(16), seen, latents) is None
        latents[1, 2, 3, 0] = value
        with pytest.raises(shard.UnstorableError, match="not finite"):
            shard.unstorable(bytes(16), seen, latents)

    def test_constant_latents_are_a_row_of_flat_frames_or_a_broken_model(self) -> None:
        latents = np.broadcast_to(np.arange(3, dtype=np.float32)[:, None, None], (2, 3, 4, 4))
        flat = DecodedRow(np.full((2, 8, 8, 3), (1, 2, 3), np.uint8), 0.0)
        assert shard.unstorable(bytes(16), flat, latents) == "constant"
        with pytest.raises(shard.UnstorableError, match="though its frames are not"):
            shard.unstorable(bytes(16), DecodedRow(texture(0, 2), 0.0), latents)

    @pytest.mark.parametrize("value", [np.nan, np.inf, 1e6, 0.0], ids=["nan", "inf", "too large", "constant"])
    def test_shard_is_not_committed_and_the_checks_say_so(
        self, project: Project, monkeypatch: pytest.MonkeyPatch, small_shards: None, value: float
    ) -> None:
        """A row of the second shard: the first is kept, nothing of the second is; the next call goes on from there."""
        bad = plan_encode(project, FILMS).rows["row_id"][6]
        judge = shard.unstorable

        def broken(row: bytes, seen: DecodedRow, latents: np.ndarray) -> str | None:
            if row == bad:
                latents[:] = value
            return judge(row, seen, latents)

        with monkeypatch.context() as patched:
            patched.setattr(shard, "unstorable", broken)
            with pytest.raises(shard.UnstorableError, match=bad.hex()):
                make_latents(project, FILMS)
        spec = accepted_spec(project)
        assert LatentStore(project.root, spec).commits(FILMS).height == 4
        with pytest.raises(UpstreamError, match="finite"):
            require_checks(project.root.latents_checks(spec.digest(), FILMS), "latents")
        assert make_latents(project, FILMS).passed
        assert len(stored(project, FILMS)) == 12


class TestKilled:
    def test_kill_between_shards_leaves_a_part_that_is_finished_row_for_row(
        self, project: Project, small_shards: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = write_corpus(tmp_path / "whole", Path(project.corpus.encoding.autoencoder))
        publish_clips(whole, FILMS, pl.read_parquet(project.root.table("clips", FILMS)).to_dicts())
        make_latents(whole, FILMS)
        write = LatentPart.write_shard

        def dying(self: LatentPart, number: int, *rest: Any) -> None:
            if number == 1:
                raise KeyboardInterrupt
            write(self, number, *rest)

        with monkeypatch.context() as patched:
            patched.setattr("storage.part.Part.write_shard", dying)
            with pytest.raises(KeyboardInterrupt):
                make_latents(project, FILMS)
        assert len(stored(project, FILMS)) == 4
        outcome = make_latents(project, FILMS)
        assert outcome.numbers["encoded"] == 8
        one, other = stored(project, FILMS), stored(whole, FILMS)
        assert one.keys() == other.keys()
        for row, values in one.items():
            np.testing.assert_array_equal(values, other[row])

    def test_rows_planned_and_then_unwanted_are_rejected(
        self, project: Project, small_shards: None, tmp_path: Path
    ) -> None:
        plan = plan_encode(project, FILMS)
        store = LatentStore(project.root, plan.spec)
        store.create()
        store.plan_part(FILMS, F, plan.rows["row_id"].to_list())
        publish_clips(project, FILMS, [clip_row(films(tmp_path)[0], 0)])
        outcome = make_latents(project, FILMS)
        assert outcome.rows == 1
        assert outcome.passed
        assert store.commits(FILMS)["reason"].drop_nulls().unique().to_list() == ["not_wanted"]


def test_one_time_asked_twice_gives_two_equal_frames(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write_video(path, texture(0))
    row = clip_row(path, 0)
    asked = decode_task.RequestedRow(row["row_id"], (0, 0, 250_000), CropBox(0, 0, 64, 64), False)
    (frames,), seconds = decode_task.decode(decode_task.Task(path, row["media_id"], "pyav", 32, (asked,)))
    np.testing.assert_array_equal(frames[0], frames[1])
    assert (frames[2] != frames[1]).any()
    assert frames.shape == (3, 32, 32, 3)
    assert seconds > 0


class TestWithdrawn:
    @pytest.mark.parametrize("late", [False, True], ids=["before its shard is committed", "while it is"])
    def test_a_file_that_is_withdrawn_meanwhile_leaves_no_bytes(
        self, tmp_path: Path, cosine_autoencoder: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch, late: bool
    ) -> None:
        """Neither latents nor pixels: the withdrawal sees what is committed, and the encoder what is withdrawn."""
        project = begin(tmp_path, cosine_autoencoder, pixels={"quality": 90})
        media = bytes.fromhex(digest_file(films(tmp_path)[1]))
        store, clips = LatentStore(project.root, accepted_spec(project)), wanted_clips(project, FILMS)
        gone = set(clips.filter(pl.col("media_id") == media)["row_id"].to_list())
        write = LatentPart.write_shard

        def withdraw(*_: object) -> None:
            record_withdrawal(project.root, media.hex(), gone)

        def withdrawing(self: LatentPart, *given: Any) -> None:
            withdraw()
            write(self, *given)

        if late:
            monkeypatch.setattr(Part, "write_shard", withdrawing)
        outcome = make_latents(project, FILMS, silent if late else withdraw)
        assert outcome.passed
        assert outcome.rows == 8
        assert len(gone) == 4
        for one in every_store(project.root):
            assert one.verify() == []  # withdrawn rows are zeros
            commits = one.commits(FILMS).filter(pl.col("row_id").is_in(list(gone)))
            assert commits.height == 4
            if not late or one.noun == "pixels":
                assert commits.select("status", "reason").unique().rows() == [("rejected", "withdrawn")]
        held = stored(project, FILMS)
        assert all(values.any() == (row not in gone) for row, values in held.items())
        assert set(wanted_clips(project, FILMS)["row_id"]) == set(held) - gone
        assert not make_latents(project, FILMS).made
        assert store.parts(FILMS, F) == [0]
