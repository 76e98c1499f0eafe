"""The sweep: what a trainset cites or a clip needs keeps its bytes, the rest is deleted, a plan changes nothing."""

import os
import shutil
import time
from pathlib import Path

import pytest

from nextvid.encode.latent_stats import make_latent_stats
from nextvid.encode.plan import encoding_spec, plan_encode
from nextvid.lineage.sweep import sweep
from nextvid.planning.acceptance import accept_asked
from nextvid.trainset.trainset import Trainset, make_trainset
from storage.reader import RowReader
from storage.store import LatentStore
from tests.factories import FRAMES, Corpus, passed

FILMS, STILLS = "films.000000", "stills.000000"
DAY_S = 86_400


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """Two parts of films: rows 0 to 3, then 4 to 7, all wanted; and two stills."""
    made = Corpus(tmp_path)
    accept_asked(made.project)
    films, stills = made.rows(FILMS, 8), made.rows(STILLS, 2)
    made.clips(FILMS, films)
    made.clips(STILLS, stills)
    made.encode(FILMS, films[:4])
    made.encode(FILMS, films[4:], seed=1)
    made.encode(STILLS, stills)
    return made


def store_of(corpus: Corpus) -> LatentStore:
    return LatentStore(corpus.project.root, encoding_spec(corpus.project))


def shard_files(corpus: Corpus) -> dict[str, bytes]:
    folder = Path(corpus.project.root.folder("latents"))
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("0")) if path.is_file()}


def want_films(corpus: Corpus, *rows: int) -> None:
    corpus.clips(FILMS, [corpus.row(FILMS, i) for i in rows])


def test_what_clips_need_is_kept(corpus: Corpus) -> None:
    before = shard_files(corpus)
    found = sweep(corpus.project, yes=True)
    assert (found.deleted, found.kept, found.leftovers) == ((), (), ())
    assert shard_files(corpus) == before


def test_a_plan_names_what_would_go_and_changes_nothing(corpus: Corpus) -> None:
    want_films(corpus, 0, 1, 2, 3)
    before = shard_files(corpus)
    found = sweep(corpus.project)
    (shard,) = found.deleted
    assert (shard.rows, shard.needed, shard.trainsets) == (4, 0, ())
    assert found.size_bytes == shard.size_bytes == Path(shard.path).stat().st_size
    assert shard_files(corpus) == before
    assert "nothing is changed without --yes" in found.text()


def test_whole_shards_go_and_stay_gone(corpus: Corpus) -> None:
    want_films(corpus, 0, 1, 2, 3)
    before = shard_files(corpus)
    (shard,) = sweep(corpus.project, yes=True).deleted
    after = shard_files(corpus)
    assert after == {path: data for path, data in before.items() if path != shard.path}
    store = store_of(corpus)
    assert store.verify() == []
    assert store.unfinished(FILMS, FRAMES) is None  # nobody encodes it again
    assert plan_encode(corpus.project, FILMS).orphaned == ()
    assert sweep(corpus.project, yes=True).deleted == ()


def test_swept_rows_that_clips_want_again_are_encoded_again(corpus: Corpus) -> None:
    want_films(corpus, 0, 1, 2, 3)
    sweep(corpus.project, yes=True)
    want_films(corpus, *range(8))
    plan = plan_encode(corpus.project, FILMS)
    assert (plan.rows.height, plan.kept) == (4, 4)
    corpus.encode(FILMS, corpus.rows(FILMS, 4, 8))
    assert plan_encode(corpus.project, FILMS).rows.is_empty()
    assert store_of(corpus).verify() == []


def test_a_shard_with_one_needed_row_stays_whole(corpus: Corpus) -> None:
    want_films(corpus, 0, 1, 2, 3, 7)
    before = shard_files(corpus)
    found = sweep(corpus.project, yes=True)
    assert found.deleted == ()
    assert [(shard.rows, shard.needed) for shard in found.kept] == [(4, 1)]
    assert "3 of 4 rows not needed" in found.text()
    assert shard_files(corpus) == before


def test_what_a_trainset_cites_stays_readable(corpus: Corpus) -> None:
    corpus.duplicates()
    make_latent_stats(corpus.project)
    digest = make_trainset(corpus.project).digest
    want_films(corpus, 0, 1, 2, 3)
    found = sweep(corpus.project, yes=True)
    assert found.deleted == ()
    assert [shard.trainsets for shard in found.kept] == [(digest,)]
    assert f"referred to by trainset {digest}" in found.text()
    trainset = Trainset.open(corpus.project.root)
    reader = RowReader(corpus.project.root, trainset.spec, trainset.batches)
    for address in trainset.rows(FRAMES):
        row = corpus.latents[bytes(address["row_id"].astype(">u8"))]
        out = row.copy()
        reader.read_into(FRAMES, address, out)
        assert (out == row).all()
    shutil.rmtree(corpus.project.root.pointed("trainset", str(digest)))
    assert [shard.rows for shard in sweep(corpus.project).deleted] == [4]


def test_an_old_encoding_goes_once_another_is_accepted(corpus: Corpus) -> None:
    old = store_of(corpus)
    corpus.configure(encoding={"autoencoder": str(corpus.autoencoder), "resolution": 32})
    assert sweep(corpus.project).deleted == ()  # asked for, but the old one is still accepted
    accept_asked(corpus.project)
    assert {
        Path(shard.path).is_relative_to(old.root.spec_folder(old.digest)) for shard in sweep(corpus.project).deleted
    } == {True}
    assert len(sweep(corpus.project, yes=True).deleted) == 3
    assert old.verify() == []


@pytest.mark.parametrize("verdict", ["missing", "failed"])
def test_a_batch_whose_clips_are_not_known_loses_nothing(corpus: Corpus, verdict: str) -> None:
    want_films(corpus, 0, 1, 2, 3)
    path = corpus.project.root.checks("clips", FILMS)
    if verdict == "missing":
        Path(path).unlink()
    else:
        passed(path, "clips", False)
    assert sweep(corpus.project, yes=True).deleted == ()


def test_a_killed_sweep_is_finished_by_the_next(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    want_films(corpus, 0, 1, 2, 3)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            sweep(corpus.project, yes=True)
    (problem,) = store_of(corpus).verify()
    assert "a sweep was killed" in problem.what
    assert len(sweep(corpus.project, yes=True).deleted) == 1
    assert store_of(corpus).verify() == []


def test_only_old_leftovers_are_deleted(corpus: Corpus) -> None:
    folder = Path(corpus.project.root.url, "media")
    folder.mkdir()
    old, new, kept = folder / ".a.0123.partial", folder / ".b.0123.partial", folder / "c.parquet"
    for path in (old, new, kept):
        path.write_bytes(b"12345")
    os.utime(old, (time.time() - 2 * DAY_S,) * 2)
    os.utime(kept, (time.time() - 2 * DAY_S,) * 2)
    planned = sweep(corpus.project)
    assert (planned.leftovers, planned.leftover_bytes) == ((str(old),), 5)
    assert old.exists()
    assert sweep(corpus.project, yes=True).leftovers == (str(old),)
    assert [path.exists() for path in (old, new, kept)] == [False, True, True]
