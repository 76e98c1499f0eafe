"""trainset: which batches and rows join, what its statistics and digest are, and what its checks catch."""

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from nextvid.encode.latent_stats import make_latent_stats, mixed, moments, united
from nextvid.encode.plan import encoding_spec, usable_clips
from nextvid.lineage import trace
from nextvid.making.publishing import read_latest
from nextvid.trainset import selection, trainset
from nextvid.trainset.trainset import Trainset, make_trainset
from storage import atomic
from storage.errors import ConflictError, DamagedError, RefusedError, UpstreamError
from storage.reader import RowReader, row_id
from storage.spec import EncodingSpec
from storage.store import LatentStore
from storage.withdrawn import record_withdrawal
from tests.factories import FRAMES, Corpus, doubled, passed, put_latents, unchanged, write_autoencoder

FILMS, MORE, STILLS, PROBE = "films.000000", "films.000001", "stills.000000", "probe.000000"


@pytest.fixture
def autoencoder(tmp_path: Path) -> Path:
    return write_autoencoder(tmp_path / "autoencoder")


@pytest.fixture
def corpus(tmp_path: Path, autoencoder: Path) -> Corpus:
    """Ten clips and six images, all encoded and known."""
    made = Corpus(tmp_path, autoencoder)
    for batch, count in ((FILMS, 10), (STILLS, 6)):
        made.add(batch, count)
    made.duplicates()
    return made


class TestRows:
    def test_every_row_reads_back_what_was_stored(self, corpus: Corpus) -> None:
        outcome = make_trainset(corpus.project)
        assert outcome.made
        assert outcome.passed
        assert outcome.rows == 16
        opened = Trainset.open(corpus.project.root)
        assert opened.digest == outcome.digest
        assert opened.lengths == (1, FRAMES)
        reader = RowReader(corpus.project.root, opened.spec, opened.batches)
        seen = {}
        for frames in opened.lengths:
            for address in opened.rows(frames):
                out = np.empty(opened.spec.row_shape(frames), np.float16)
                reader.read_into(frames, address, out)
                seen[row_id(address)] = out
        assert seen.keys() == corpus.latents.keys()
        for row, values in seen.items():
            np.testing.assert_array_equal(values, corpus.latents[row])

    def test_rows_are_sorted_by_dataset_then_id_and_offsets_cover_them(self, corpus: Corpus) -> None:
        corpus.add(MORE, 5)
        corpus.duplicates()
        make_trainset(corpus.project)
        opened = Trainset.open(corpus.project.root)
        assert opened.offsets(FRAMES) == {"films": (0, 15)}
        ids = [row_id(row) for row in opened.rows(FRAMES)]
        assert ids == sorted(ids)
        lineage = opened.lineage()
        assert sorted(lineage.filter(pl.col("frames") == FRAMES)["row_id"].to_list()) == ids
        assert lineage.select("batch", "row_id").equals(lineage.select("batch", "row_id").sort("batch", "row_id"))

    def test_shards_beyond_the_first_have_slots_of_their_own(self, corpus: Corpus) -> None:
        corpus.add(MORE, 300)
        spec = encoding_spec(corpus.project)
        assert LatentStore(corpus.project.root, spec).part(MORE, FRAMES, 0).shards == 2
        corpus.duplicates()
        make_trainset(corpus.project)
        opened = Trainset.open(corpus.project.root)
        reader = RowReader(corpus.project.root, opened.spec, opened.batches)
        out = np.empty(spec.row_shape(FRAMES), np.float16)
        for address in opened.rows(FRAMES):
            reader.read_into(FRAMES, address, out)
            np.testing.assert_array_equal(out, corpus.latents[row_id(address)])

    @pytest.mark.parametrize(
        ("changes", "why"),
        [({"split": "test"}, "split"), ({"split": "val"}, "split"), ({"uses": ["probing"]}, None)],
    )
    def test_only_rows_for_pretraining_of_split_train_join(
        self, corpus: Corpus, changes: dict[str, Any], why: str | None
    ) -> None:
        rows = [corpus.row(FILMS, index, **(changes if index < 3 else {})) for index in range(10)]
        corpus.clips(FILMS, rows)
        corpus.duplicates()
        outcome = make_trainset(corpus.project)
        assert outcome.rows == 13
        assert outcome.numbers.get(f"dropped_{why}") == (3 if why else None)

    def test_rows_that_failed_are_left_out_and_counted(self, corpus: Corpus) -> None:
        corpus.add(MORE, 4, failed=[1])
        corpus.duplicates()
        outcome = make_trainset(corpus.project)
        assert outcome.rows == 19
        assert outcome.numbers["dropped_not_encoded"] == 1

    def test_withdrawn_rows_are_left_out_and_the_parent_is_named(self, corpus: Corpus) -> None:
        first = make_trainset(corpus.project)
        gone = corpus.row(FILMS, 0)
        record_withdrawal(corpus.project.root, gone["media_id"].hex(), [gone["row_id"]])
        second = make_trainset(corpus.project)
        assert second.rows == 14  # every clip of the file, also one that the record does not name
        assert second.digest != first.digest
        assert gone["row_id"] not in Trainset.open(corpus.project.root).lineage()["row_id"].to_list()
        said = atomic.read_json(f"{corpus.project.root.pointed('trainset', str(second.digest))}/trainset.json")
        assert said["parent"] == first.digest

    def test_a_file_that_is_withdrawn_before_it_is_encoded_keeps_no_batch_back(self, corpus: Corpus) -> None:
        """Clips that were cut after the record was written are not named in it; their file is."""
        corpus.clips(FILMS, corpus.rows(FILMS, 11))
        corpus.duplicates()
        record_withdrawal(corpus.project.root, corpus.row(FILMS, 10)["media_id"].hex(), [])
        outcome = make_trainset(corpus.project)
        assert outcome.rows == 16
        assert outcome.numbers["dropped_withdrawn"] == 1

    def test_nothing_left_is_an_error_that_says_why(self, corpus: Corpus) -> None:
        for batch, count in ((FILMS, 10), (STILLS, 6)):
            rows = corpus.rows(batch, count)
            for row in rows:
                record_withdrawal(corpus.project.root, row["media_id"].hex(), [row["row_id"]])
        with pytest.raises(UpstreamError, match=r"no row for pretraining is left in .*'withdrawn': 16"):
            make_trainset(corpus.project)

    def test_one_row_id_in_two_datasets_stays_in_both(self, corpus: Corpus) -> None:
        films = corpus.rows(FILMS, 2)
        copies = [corpus.row("empty.000000", index, row_id=films[index]["row_id"]) for index in range(2)]
        corpus.clips("empty.000000", copies)
        corpus.encode("empty.000000", copies)
        corpus.duplicates()
        outcome = make_trainset(corpus.project)
        assert outcome.rows == 18
        assert Trainset.open(corpus.project.root).offsets(FRAMES) == {"empty": (0, 2), "films": (2, 10)}

    def test_a_batch_that_changes_while_it_is_frozen_stops_it(
        self, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(trainset, "usable_clips", lambda *given: usable_clips(*given)[1:])
        with pytest.raises(ConflictError, match=f"batch {FILMS} changed"):
            make_trainset(corpus.project)
        assert read_latest(corpus.project.root, "trainset") is None
        monkeypatch.undo()
        assert make_trainset(corpus.project).passed


class TestDuplicates:
    def test_rows_that_give_way_are_dropped_with_their_reason(self, corpus: Corpus) -> None:
        one, other = corpus.row(FILMS, 0), corpus.row(FILMS, 4)
        corpus.duplicates([doubled(one, 0, drop=False), doubled(other, 0, drop=True, reason="copy")])
        outcome = make_trainset(corpus.project)
        assert outcome.rows == 14  # two clips a shot
        assert outcome.numbers["dropped_copy"] == 2

    def test_check_catches_a_test_duplicate_that_the_table_forgot(self, corpus: Corpus) -> None:
        tested = corpus.row(PROBE, 0, split="test", uses=["probing"])
        corpus.clips(PROBE, [tested])
        corpus.duplicates([doubled(tested, 0, drop=False), doubled(corpus.row(FILMS, 0), 0, drop=False)])
        outcome = make_trainset(corpus.project)
        check = next(check for check in outcome.checks if check.name == "no_test_duplicate")
        assert not check.passed
        assert check.numbers["leaked"] == 2
        assert read_latest(corpus.project.root, "trainset") is None  # nothing points to it

    def test_missing_duplicates_are_named(self, corpus: Corpus) -> None:
        Path(corpus.project.root.latest("duplicates")).unlink()
        with pytest.raises(UpstreamError, match="duplicates"):
            make_trainset(corpus.project)

    def test_test_clips_that_duplicates_has_not_seen_refuse(self, corpus: Corpus) -> None:
        corpus.clips(PROBE, [corpus.row(PROBE, 0, split="test", uses=["probing"])])
        with pytest.raises(UpstreamError, match="has not seen"):
            make_trainset(corpus.project)

    def test_clips_that_changed_since_are_not_known(self, corpus: Corpus) -> None:
        corpus.clips(STILLS, corpus.rows(STILLS, 5))
        with pytest.raises(UpstreamError, match=STILLS):
            make_trainset(corpus.project)


class TestBatches:
    def test_batch_that_is_not_encoded_holds_the_trainset_up_unless_allowed(self, corpus: Corpus) -> None:
        corpus.clips(MORE, [corpus.row(MORE, 0)])
        corpus.duplicates()
        with pytest.raises(UpstreamError, match=f"2 of 3 batches.*{MORE}: it has no latents"):
            make_trainset(corpus.project)
        corpus.configure(min_complete=0.5)
        outcome = make_trainset(corpus.project)
        assert outcome.rows == 16
        folder = corpus.project.root.pointed("trainset", str(outcome.digest))
        assert list(atomic.read_json(f"{folder}/trainset.json")["left_out"]) == [MORE]

    def test_rows_added_after_encoding_make_a_batch_incomplete(self, corpus: Corpus) -> None:
        corpus.clips(FILMS, corpus.rows(FILMS, 12))
        corpus.duplicates()
        with pytest.raises(UpstreamError, match="2 of its 12 rows are not encoded yet"):
            make_trainset(corpus.project)

    def test_batch_whose_checks_failed_is_left_out_and_stops_nobody(self, corpus: Corpus) -> None:
        corpus.add(MORE, 1, verdict=False)
        corpus.duplicates()
        outcome = make_trainset(corpus.project)
        assert outcome.rows == 16
        assert outcome.numbers["batches_left_out"] == 1

    def test_no_batch_at_all_is_an_error(self, corpus: Corpus) -> None:
        corpus.configure(datasets={"other": {"uri": "other", "weight": 1.0, "clips": [{"frames": 1}]}})
        with pytest.raises(UpstreamError, match="0 of 0"):
            make_trainset(corpus.project)


class TestDigest:
    def test_same_rows_make_nothing_twice(self, corpus: Corpus) -> None:
        first = make_trainset(corpus.project)
        with unchanged(corpus.project.root.url):
            second = make_trainset(corpus.project)
            assert (second.made, second.digest) == (False, first.digest)

    def test_follows_rows_and_weights_not_addresses(self, corpus: Corpus, tmp_path: Path) -> None:
        first = make_trainset(corpus.project)
        (tmp_path / "moved").mkdir()
        moved = Corpus(tmp_path / "moved", corpus.autoencoder)
        for batch, count in ((FILMS, 10), (STILLS, 6)):
            rows = moved.rows(batch, count)
            moved.clips(batch, rows)
            _copy_rows(corpus, moved, batch, rows[::-1])
        moved.duplicates()
        second = make_trainset(moved.project)
        assert second.digest == first.digest
        old, new = (Trainset.open(c.project.root).rows(FRAMES) for c in (corpus, moved))
        assert (old["slot"] != new["slot"]).any()
        corpus.configure(datasets=_reweighted(corpus))
        assert make_trainset(corpus.project).digest != first.digest

    def test_changes_with_one_stored_byte(self, corpus: Corpus, tmp_path: Path) -> None:
        first = make_trainset(corpus.project)
        (tmp_path / "other").mkdir()
        other = Corpus(tmp_path / "other", corpus.autoencoder)
        for batch, count in ((FILMS, 10), (STILLS, 6)):
            rows = other.rows(batch, count)
            other.clips(batch, rows)
            other.encode(batch, rows, seed=int(batch == FILMS))
        other.duplicates()
        assert make_trainset(other.project).digest != first.digest


def _reweighted(corpus: Corpus) -> dict[str, Any]:
    said: dict[str, Any] = yaml.safe_load((corpus.folder / "corpus.yaml").read_text())["datasets"]
    said["films"]["weight"] = 5.0
    return said


def _copy_rows(source: Corpus, target: Corpus, batch: str, rows: Sequence[dict[str, Any]]) -> None:
    """The same latents in another order of slots."""
    spec = encoding_spec(target.project)
    store = LatentStore(target.project.root, spec)
    put_latents(store, batch, rows[0]["frames"], {row["row_id"]: source.latents[row["row_id"]] for row in rows})
    passed(target.project.root.latents_checks(spec.digest(), batch), "latents")


class TestStatistics:
    def test_weights_are_shared_by_datasets_that_have_rows(self, corpus: Corpus) -> None:
        make_trainset(corpus.project)
        assert Trainset.open(corpus.project.root).weights == {"films": 0.75, "stills": 0.25}

    def test_mean_and_std_are_those_of_a_draw_from_the_mixture(self, corpus: Corpus) -> None:
        make_trainset(corpus.project)
        opened = Trainset.open(corpus.project.root)
        films = np.stack([v for v in corpus.latents.values() if len(v) == FRAMES]).astype(np.float64)
        stills = np.stack([v for v in corpus.latents.values() if len(v) == 1]).astype(np.float64)
        mean = 0.75 * films.mean((0, 1, 3, 4)) + 0.25 * stills.mean((0, 1, 3, 4))
        square = 0.75 * (films**2).mean((0, 1, 3, 4)) + 0.25 * (stills**2).mean((0, 1, 3, 4))
        np.testing.assert_allclose(opened.mean, mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(opened.std, np.sqrt(square - mean**2), rtol=1e-5)
        assert opened.mean.dtype == opened.std.dtype == np.float32

    def test_longer_clips_do_not_enter(self, corpus: Corpus) -> None:
        make_trainset(corpus.project)
        before = Trainset.open(corpus.project.root)
        rows = [corpus.row(MORE, index, frames=8, times_us=list(range(8))) for index in range(3)]
        corpus.clips(MORE, rows)
        corpus.encode(MORE, rows)
        corpus.duplicates()
        make_trainset(corpus.project)
        after = Trainset.open(corpus.project.root)
        assert after.lengths == (1, 4, 8)
        np.testing.assert_array_equal(after.mean, before.mean)
        np.testing.assert_array_equal(after.std, before.std)

    def test_moments_are_exact_far_from_zero(self, corpus: Corpus) -> None:
        spec = replace(encoding_spec(corpus.project), channels=2, height=3, width=3)
        values = np.random.default_rng(0).standard_normal((50, 4, 2, 3, 3)) * [[[1e-3]], [[2.0]]] + [
            [[100.0]],
            [[-5.0]],
        ]
        table = pl.DataFrame(
            {
                "frames": [4] * 50,
                "sums": values.sum((1, 3, 4)).tolist(),
                "sums_squared": (values**2).sum((1, 3, 4)).tolist(),
                "posterior_std": [0.5] * 50,
            }
        )
        found = moments(table, spec)
        np.testing.assert_allclose(found.mean, values.mean((0, 1, 3, 4)), rtol=1e-12)
        np.testing.assert_allclose(found.std, values.std((0, 1, 3, 4)), rtol=1e-3)
        mean, std = mixed([(2.0, found), (5.0, found)])
        np.testing.assert_allclose(mean, found.mean)
        np.testing.assert_allclose(std, found.std)

    def test_latent_stats_report_each_dataset_and_length(self, corpus: Corpus) -> None:
        outcome = make_latent_stats(corpus.project)
        assert outcome.made
        said = atomic.read_json(f"{corpus.project.root.pointed('latent_stats', str(outcome.digest))}/stats.json")
        films = np.stack([v for v in corpus.latents.values() if len(v) == FRAMES]).astype(np.float64)
        np.testing.assert_allclose(said["datasets"]["films"]["f4"]["std"], films.std((0, 1, 3, 4)), rtol=1e-9)
        assert said["datasets"]["stills"]["f1"]["rows"] == 6
        assert said["datasets"]["films"]["f4"]["posterior_std"] == pytest.approx(0.01)
        again = make_latent_stats(corpus.project)
        assert (again.made, again.digest) == (False, outcome.digest)
        checks = {check.name: check.passed for check in outcome.checks}
        assert checks["std_positive"]

    def test_latent_stats_that_were_changed_are_named(self, corpus: Corpus) -> None:
        digest = make_latent_stats(corpus.project).digest
        path = Path(corpus.project.root.pointed("latent_stats", str(digest)), "stats.json")
        path.write_text(path.read_text().replace('"rows": ', '"rows": 1', 1))
        with pytest.raises(DamagedError, match=r"stats\.json was changed .*remove the folder .*/latent_stats/"):
            make_latent_stats(corpus.project)

    def test_latent_stats_are_those_of_all_rows_in_one_table(self, corpus: Corpus) -> None:
        """The slow reference: every commit of every batch at once, as one table in memory."""
        corpus.add(MORE, 5)
        spec = encoding_spec(corpus.project)
        store = LatentStore(corpus.project.root, spec)
        table = pl.concat([store.commits(batch) for batch in store.batches()]).filter(pl.col("status") == "ok")
        assert len({batch for batch in table["batch"] if batch.startswith("films.")}) == 2
        outcome = make_latent_stats(corpus.project)
        said = atomic.read_json(f"{corpus.project.root.pointed('latent_stats', str(outcome.digest))}/stats.json")
        wanted = {}
        for (dataset, frames), group in table.group_by(pl.col("batch").str.split(".").list.first(), "frames"):
            wanted[dataset, f"f{frames}"] = moments(group, spec)
        assert {(name, length) for name, lengths in said["datasets"].items() for length in lengths} == set(wanted)
        for (name, length), part in wanted.items():
            found = said["datasets"][name][length]
            assert (found["rows"], found["values"]) == (part.rows, part.values)
            np.testing.assert_allclose(found["mean"], part.mean, rtol=1e-12, atol=1e-14)
            np.testing.assert_allclose(found["std"], part.std, rtol=1e-12)
            assert found["posterior_std"] == pytest.approx(part.posterior_std, rel=1e-12)
        assert outcome.rows == table.height

    @given(
        sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
        seed=st.integers(0, 2**32 - 1),
        shift=st.sampled_from([0.0, 1e4]),
    )
    def test_united_moments_are_those_of_all_rows(self, sizes: list[int], seed: int, shift: float) -> None:
        """Batches of any size, some without a posterior width, means far from zero."""
        spec = EncodingSpec("0" * 32, 8, "bicubic", "fp32", "mean", "float16", 2, 3, 1)
        rng, parts = np.random.default_rng(seed), []
        for size in sizes:
            values = rng.standard_normal((size, 4, 2, 3, 1)) + shift * rng.standard_normal()
            width = [None if draw == 0 else draw / 4 for draw in rng.integers(0, 3, size).tolist()]
            parts.append(
                pl.DataFrame(
                    {
                        "frames": [4] * size,
                        "sums": values.sum((1, 3, 4)).tolist(),
                        "sums_squared": (values**2).sum((1, 3, 4)).tolist(),
                        "posterior_std": pl.Series(width, dtype=pl.Float32),
                    }
                )
            )
        wanted = moments(pl.concat(parts), spec)
        found = functools.reduce(united, (moments(part, spec) for part in parts))
        assert (found.rows, found.values, found.widths) == (wanted.rows, wanted.values, wanted.widths)
        np.testing.assert_allclose(found.mean, wanted.mean, rtol=1e-12, atol=1e-12 * (1 + shift))
        np.testing.assert_allclose(found.variance, wanted.variance, rtol=1e-9, atol=1e-9 * (1 + shift**2) * 1e-3)
        assert found.posterior_std == (None if wanted.posterior_std is None else pytest.approx(wanted.posterior_std))

    def test_a_small_dataset_beside_a_large_one_stops_nothing(self, corpus: Corpus) -> None:
        """Training normalises by the mixture; a data set of six images of four cells is no mixture's undoing."""
        (check,) = (check for check in make_latent_stats(corpus.project).checks if check.name == "enough_rows")
        numbers = {name: int(value) for name, value in check.numbers.items()}
        assert numbers["fewest_of_a_dataset"] == 24
        assert check.passed == (numbers["values"] >= numbers["needed"])
        assert numbers["values"] > numbers["fewest_of_a_dataset"]


class TestOpening:
    def test_nothing_there(self, corpus: Corpus) -> None:
        with pytest.raises(UpstreamError, match="no trainset yet"):
            Trainset.open(corpus.project.root)

    def test_length_it_has_not(self, corpus: Corpus) -> None:
        make_trainset(corpus.project)
        with pytest.raises(RefusedError, match="no clips of 16 frames; it has 1, 4"):
            Trainset.open(corpus.project.root).rows(16)

    def test_images_alone_are_said_to_be(self, corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
        make_trainset(corpus.project)
        monkeypatch.setattr(Trainset, "lengths", (1,))
        with pytest.raises(RefusedError, match=r"has images alone.*Add a dataset of videos"):
            Trainset.open(corpus.project.root).rows(16)

    @pytest.mark.parametrize("damage", ["short", "gone", "pickled"])
    def test_damaged_rows_are_refused(self, corpus: Corpus, damage: str) -> None:
        outcome = make_trainset(corpus.project)
        path = Path(corpus.project.root.pointed("trainset", str(outcome.digest))) / f"rows.f{FRAMES}.npy"
        match damage:
            case "short":
                np.save(path, np.load(path)[:-1])
            case "gone":
                path.unlink()
            case "pickled":
                np.save(path, np.array([object()]), allow_pickle=True)
        with pytest.raises(DamagedError):
            Trainset.open(corpus.project.root).rows(FRAMES)

    def test_rows_are_mapped_not_read(self, corpus: Corpus) -> None:
        make_trainset(corpus.project)
        assert isinstance(Trainset.open(corpus.project.root).rows(FRAMES), np.memmap)


def test_modules_load_without_torch() -> None:
    import subprocess
    import sys

    names = ", ".join(module.__name__ for module in (trainset, selection, trace))
    code = f"import {names}, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_lineage_leads_back_to_the_clips_table(corpus: Corpus) -> None:
    make_trainset(corpus.project)
    lineage = Trainset.open(corpus.project.root).lineage()
    clips = pl.concat([pl.read_parquet(corpus.project.root.table("clips", batch)) for batch in (FILMS, STILLS)])
    joined = lineage.join(clips, on=["row_id", "clip_id", "shot_id", "media_id", "uri", "batch"], how="inner")
    assert joined.height == lineage.height == 16
