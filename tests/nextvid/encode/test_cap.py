"""cap: an even sample of a dataset's rows, by the smallest ids, that grows and is refilled; and what training draws."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from nextvid.config.project import Project
from nextvid.encode.cap import EVERY, Cap, _bound, _Smallest, bounds_of, drawn_rows, settle_cap
from nextvid.encode.plan import accepted_spec, encoding_spec, plan_encode, wanted_clips
from nextvid.planning.costs import forecast
from nextvid.planning.waiting import standard
from nextvid.trainset.order import listed_draws
from nextvid.trainset.trainset import Trainset, make_trainset
from storage.draws import BLOCK, Draws, _entries_of_block, most_drawn
from storage.errors import ConfigError, CorpusError
from storage.store import LatentStore
from storage.withdrawn import record_withdrawal
from tests.factories import FRAMES, Corpus, doubled, write_project
from tests.nextvid.train.tiny import tiny_recipe

FILMS, MORE, STILLS = "films.000000", "films.000001", "stills.000000"


def capped(corpus: Corpus, films: Any, stills: Any = None, **more: Any) -> Project:
    """The corpus with other caps."""
    datasets = {
        "films": {"uri": "films", "weight": 3.0, "clips": [{"frames": FRAMES, "fps": 4}], "cap": films},
        "stills": {"uri": "stills", "weight": 1.0, "clips": [{"frames": 1}], "cap": stills},
    }
    return corpus.configure(datasets=datasets, **more)


def short_blocks(patch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 draws; what is cached of longer ones stays for other tests."""
    patch.setattr("storage.draws.BLOCK", 16)
    patch.setattr("storage.draws._entries_of_block", _entries_of_block.__wrapped__)


def settle(project: Project, batch: str) -> None:
    settle_cap(project, LatentStore(project.root, accepted_spec(project)), batch)


def taken(project: Project, *batches: str) -> set[bytes]:
    """Rows that the plan of these batches stores or has stored."""
    return {
        row
        for batch in batches
        for plan in [plan_encode(project, batch)]
        for row in [*plan.rows["row_id"], *plan.good["row_id"]]
    }


def encode(corpus: Corpus, *batches: str) -> None:
    """Encode what the plan wants, without a picture."""
    for batch in batches:
        settle(corpus.project, batch)
        rows = plan_encode(corpus.project, batch).rows.to_dicts()
        if rows:
            corpus.encode(batch, rows)


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """Forty clips of two batches and twelve images, cut and not encoded."""
    made = Corpus(tmp_path)
    for batch in (FILMS, MORE):
        made.clips(batch, made.rows(batch, 20))
    made.clips(STILLS, made.rows(STILLS, 12))
    return made


class TestCap:
    def test_the_smallest_ids_of_all_batches_are_taken(self, corpus: Corpus) -> None:
        project = capped(corpus, 11)
        settle(project, MORE)
        every = sorted(row["row_id"] for batch in (FILMS, MORE) for row in corpus.rows(batch, 20))
        assert taken(project, FILMS, MORE) == set(every[:11])
        assert sum(plan_encode(project, batch).over_cap.height for batch in (FILMS, MORE)) == 29
        assert plan_encode(project, STILLS).rows.height == 12, "no cap"
        assert wanted_clips(project, FILMS).height == 20, "no clip is lost"

    def test_a_larger_cap_moves_no_row(self, corpus: Corpus) -> None:
        before: set[bytes] = set()
        for rows in (3, 8, {FRAMES: 30}, 1000):
            project = capped(corpus, rows)
            encode(corpus, FILMS, MORE)
            now = taken(project, FILMS, MORE)
            assert len(now) == min(40, rows if isinstance(rows, int) else rows[FRAMES])
            assert before < now
            assert all(not plan_encode(project, batch).orphaned for batch in (FILMS, MORE))
            before = now

    def test_rows_stored_before_the_cap_stay_stored_and_leave_the_next_trainset(self, corpus: Corpus) -> None:
        for batch, count in ((FILMS, 20), (MORE, 20), (STILLS, 12)):
            corpus.encode(batch, corpus.rows(batch, count))
        corpus.duplicates()
        project = capped(corpus, 7)
        settle(project, FILMS)
        plan = plan_encode(project, FILMS)
        assert (plan.rows.height, plan.kept, plan.over_cap.height, plan.orphaned) == (0, 20, 0, ())
        outcome = make_trainset(project)
        assert outcome.numbers[f"rows_f{FRAMES}"] == 7
        assert outcome.numbers["dropped_over_cap"] == 33

    def test_duplicates_rejected_and_withdrawn_rows_are_replaced(self, corpus: Corpus) -> None:
        project = capped(corpus, 10)
        encode(corpus, FILMS, MORE, STILLS)
        corpus.duplicates()
        assert make_trainset(project).numbers[f"rows_f{FRAMES}"] == 10
        rows = {row["row_id"]: row for batch in (FILMS, MORE) for row in corpus.rows(batch, 20)}
        smallest = sorted(rows)
        copy, gone = rows[smallest[0]], rows[smallest[9]]
        record_withdrawal(project.root, gone["media_id"].hex(), [gone["row_id"]])
        corpus.duplicates([doubled(copy, 1, drop=True, reason="test_file")])
        lost = {
            row
            for row in smallest[:10]
            if rows[row]["shot_id"] == copy["shot_id"] or rows[row]["media_id"] == gone["media_id"]
        }
        first = make_trainset(project)
        assert first.numbers[f"rows_f{FRAMES}"] == 10 - len(lost)
        missing = {batch: plan_encode(project, batch).rows.height for batch in (FILMS, MORE)}
        assert sum(missing.values()) >= len(lost), "the bound rose, and earlier batches wait again"
        encode(corpus, FILMS, MORE)
        assert make_trainset(project).numbers[f"rows_f{FRAMES}"] == 10

    def test_what_benchmarks_use_is_stored_whatever_the_cap(self, corpus: Corpus) -> None:
        rows = corpus.rows(FILMS, 20)
        for row in rows[::2]:
            row["uses"] = ["actions"]
        for row in rows[1::4]:
            row["uses"] = ["actions", "pretrain"]
        corpus.clips(FILMS, rows)
        project = capped(corpus, 1)
        settle(project, FILMS)
        probed = {row["row_id"] for row in rows if "actions" in row["uses"]}
        assert probed <= taken(project, FILMS)
        assert len(taken(project, FILMS, MORE) - probed) <= 1

    def test_a_batch_decides_before_the_others_are_cut(self, tmp_path: Path) -> None:
        """Of ten batches one is cut: it takes about its tenth, and the bound is exact once all are."""
        made = Corpus(tmp_path)
        keys = [f"films.{number:06d}" for number in range(10)]
        for key in keys:
            _list(made, key)
        project = capped(made, 200)
        made.clips(keys[0], made.rows(keys[0], 100))
        settle(project, keys[0])
        assert 5 <= len(taken(project, keys[0])) <= 40  # 20 expected of 100
        for key in keys[1:]:
            made.clips(key, made.rows(key, 100))
            settle(project, key)
        assert len(taken(project, *keys)) == 200

    def test_a_grown_dataset_is_sampled_evenly_and_not_more(self, corpus: Corpus) -> None:
        project = capped(corpus, 10)
        encode(corpus, FILMS, MORE)
        third = "films.000002"
        corpus.clips(third, corpus.rows(third, 100))
        settle(project, third)
        plans = [plan_encode(project, batch) for batch in (FILMS, MORE, third)]
        assert [plan.rows.height for plan in plans[:2]] == [0, 0]
        assert sum(plan.kept for plan in plans) == 10, "what is stored stays"
        every = sorted(row["row_id"] for b, n in ((FILMS, 20), (MORE, 20), (third, 100)) for row in corpus.rows(b, n))
        assert set(plans[2].rows["row_id"]) == set(every[:10]) & {row["row_id"] for row in corpus.rows(third, 100)}

    def test_a_changed_bound_is_a_new_run_key_and_no_cap_leaves_it_as_it_was(self, corpus: Corpus) -> None:
        project = corpus.project
        _list(corpus, FILMS)
        plain = standard(project).key(FILMS)
        assert not plain.endswith(":")
        keys = []
        for rows in (3, 8):
            project = capped(corpus, rows)
            assert standard(project).recapped == {"films"}
            keys.append(standard(project).key(FILMS))
            settle(project, FILMS)
            assert not standard(project).recapped
            keys.append(standard(project).key(FILMS))
            assert standard(project).not_encoded(FILMS) == plan_encode(project, FILMS).rows.height
        assert len({plain, *keys}) == 5, "the change asks for a run, and so does what it takes"


class TestAuto:
    def recipe(self, monkeypatch: pytest.MonkeyPatch, steps: Sequence[int]) -> None:
        made = tiny_recipe("tiny", steps=tuple(steps))
        monkeypatch.setattr("nextvid.config.project.recipe_by_name", lambda name, _: made)

    def test_drawn_rows_are_weights_times_draws(self, corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
        self.recipe(monkeypatch, (256, 256, 256, 1024))  # whole blocks: 3072 draws of 4 frames, 2048 of 8
        project = capped(corpus, "auto", "auto", recipes=["tiny"])
        found = drawn_rows(project)
        assert (found["films", 4], found["films", 8]) == (0.75 * 3072, 0.75 * 2048)
        assert found["stills", 1] == 0.25 * 5120

    @settings(
        max_examples=3,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(st.lists(st.integers(1, 12), min_size=3, max_size=3), st.integers(0, 9))
    def test_every_draw_is_stored_and_none_is_drawn_again_too_early(
        self, tmp_path_factory: pytest.TempPathFactory, steps: list[int], seed: int
    ) -> None:
        with pytest.MonkeyPatch.context() as patch:
            made = tiny_recipe("tiny", steps=(*steps, 1)).model_copy(update={"seed": seed})
            stages = tuple(stage.model_copy(update={"frames": FRAMES}) for stage in made.stages)
            made = made.model_copy(update={"stages": stages})
            patch.setattr("nextvid.config.project.recipe_by_name", lambda name, _: made)
            short_blocks(patch)
            corpus = Corpus(tmp_path_factory.mktemp("auto"))
            for batch, count in ((FILMS, 70), (MORE, 30), (STILLS, 40)):
                corpus.clips(batch, corpus.rows(batch, count))
            project = capped(corpus, "auto", "auto", recipes=["tiny"])
            encode(corpus, FILMS, MORE, STILLS)
            corpus.duplicates()
            make_trainset(project)
            drawn = list(listed_draws(project, "tiny", range(10**6)))
            store = LatentStore(project.root, encoding_spec(project))
            stored = {
                row.hex() for b in (FILMS, MORE, STILLS) for row in store.commits(b).filter(status="ok")["row_id"]
            }
            assert {str(one["row"]) for one in drawn} <= stored
            assert len(stored) < 1400 or len(drawn) > BLOCK
            most = drawn_rows(project)
            for name, frames, rows in (("films", FRAMES, 100), ("stills", 1, 40)):
                mine = [one["row"] for one in drawn if one["dataset"] == name]
                assert len(mine) <= most[name, frames]
                assert len(set(mine)) == min(len(mine), rows), "no row twice before all came"
            assert Trainset.open(project.root).weights == {"films": 0.75, "stills": 0.25}

    def test_images_and_clips_of_one_dataset_keep_their_proportion(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.recipe(monkeypatch, (16, 1, 1, 1))
        short_blocks(monkeypatch)
        made = Corpus(tmp_path)
        rows = made.rows(FILMS, 800)
        for row in rows[::4]:
            row.update(frames=1, times_us=[0], kind="image")
        made.clips(FILMS, rows)
        clips = [{"frames": FRAMES, "fps": 4}, {"frames": 1}]
        project = made.configure(
            datasets={"films": {"uri": "films", "weight": 1.0, "clips": clips, "cap": "auto"}}, recipes=["tiny"]
        )
        settle(project, FILMS)
        bounds = bounds_of(project, "films")
        assert bounds[1] == bounds[FRAMES] < EVERY
        counts = dict(plan_encode(project, FILMS).rows.group_by("frames").len().iter_rows())
        assert 80 <= counts[1] + counts[FRAMES] <= 100
        assert 0.15 < counts[1] / (counts[1] + counts[FRAMES]) < 0.35

    def test_the_plan_says_what_is_drawn_wanted_and_stored(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.recipe(monkeypatch, (1, 1, 1, 1))
        made = Corpus(tmp_path)
        made.clips(FILMS, made.rows(FILMS, 20))
        project = capped(made, 5, recipes=["tiny"])
        text = forecast(project).text()
        assert "films, 4 frames: 768 drawn, 5 wanted, 0 stored; 15 more are over the cap" in text
        assert "films.000000: 5 rows (5 new encoding)" in text
        encode(made, FILMS)
        assert "films, 4 frames: 768 drawn, 5 wanted, 5 stored; 15 more" in forecast(project).text()


class TestBounds:
    @settings(deadline=None)
    @given(st.lists(st.binary(min_size=16, max_size=16), min_size=1, max_size=60, unique=True), st.integers(1, 70))
    def test_exactly_so_many_ids_are_below(self, ids: list[bytes], rows: int) -> None:
        found = _Smallest(rows)
        for part in (ids[::2], ids[1::2]):
            found.add(pl.Series(part, dtype=pl.Binary))
        bound = bytes.fromhex(_bound(Cap(rows, rows, rows), found, 1.0, None) or "")
        words = sorted(row[:8] for row in ids)
        below = [row for row in ids if row <= bound]
        assert len(below) >= min(rows, len(ids))
        assert {row[:8] for row in below} == set(words[:rows])  # ids that share 64 bits come together

    def test_every_nth_id_of_a_large_cap_counts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("nextvid.encode.cap.COUNTED", 100)
        ids = [bytes.fromhex(f"{number * 2**32 // 20000:08x}{'0' * 16}{number:08x}") for number in range(20000)]
        found = _Smallest(5000)
        found.add(pl.Series(ids, dtype=pl.Binary))
        assert found.every == 50
        assert found.count == 20000
        bound = bytes.fromhex(_bound(Cap(5000, 5000, 5000), found, 1.0, None) or "")
        assert 4900 <= sum(row <= bound for row in ids) <= 5000

    @settings(max_examples=20)
    @given(st.integers(0, 4000), st.integers(0, 3000), st.lists(st.integers(1, 50), min_size=1, max_size=4))
    def test_most_drawn_holds_any_run_of_draws(self, start: int, count: int, weights: list[int]) -> None:
        named = {f"d{n}": float(weight) for n, weight in enumerate(weights)}
        datasets, _ = Draws(3, named, dict.fromkeys(named, 7)).range(start, count)
        most = most_drawn(named, start, start + count)
        assert all((datasets == n).sum() <= most[name] for n, name in enumerate(sorted(named)))
        whole = most_drawn(named, 0, 2 * BLOCK)
        assert sum(whole.values()) == 2 * BLOCK


@pytest.mark.parametrize(
    ("cap", "words"),
    [
        (0, r"datasets.films.cap.*a cap is a number of rows from 1 on, or 'auto', not 0"),
        (-3, "not -3"),
        (2.5, "not 2.5"),
        (True, "not True"),
        ("all", "not 'all'"),
        ({4: 0}, "not 0"),
        ({32: 5}, "'cap' names 32 frames, and the clips have 4"),
        ("auto", r"'datasets.films.cap' is 'auto': name the recipes"),
    ],
)
def test_a_bad_cap_is_one_clear_line(tmp_path: Path, cap: Any, words: str) -> None:
    clips = [{"frames": 4, "fps": 4}]
    with pytest.raises(ConfigError, match=words) as caught:
        write_project(tmp_path, {"films": {"uri": "films", "weight": 1.0, "clips": clips, "cap": cap}})
    assert len(str(caught.value).splitlines()) == 1


def test_a_cap_without_a_weight_and_an_unknown_recipe_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="without a 'weight' there are none"):
        write_project(tmp_path, {"films": {"uri": "films", "cap": 5}})
    with pytest.raises(ConfigError, match="did you mean 'nextvid_s'"):
        write_project(tmp_path, {"films": {"uri": "films"}}, recipes=["nextvid_ss"])


def test_a_damaged_record_names_the_remedy(corpus: Corpus) -> None:
    project = capped(corpus, 5)
    settle(project, FILMS)
    Path(project.root.cap("films")).write_text('{"bounds": {"4": "zz"}}')
    with pytest.raises(CorpusError, match=r"caps/films.json.*remove it, and make 'latents' again"):
        plan_encode(project, FILMS)


def test_digests_do_not_know_the_cap(corpus: Corpus) -> None:
    plain = corpus.project.corpus
    assert capped(corpus, 5).corpus.curation_digest("films") == plain.curation_digest("films")


def _list(corpus: Corpus, batch: str) -> None:
    """A batch in the listing."""
    from storage.schemas import Sources
    from storage.tables import write_table

    write_table(corpus.project.root.table("sources", batch), Sources.create_empty(), Sources)
