"""The sweep of pixels: what runs of a trainset read or clips need is kept, the rest is deleted shard by shard."""

from pathlib import Path

import pytest

from nextvid.config.overrides import apply_overrides
from nextvid.config.project import Project
from nextvid.encode.plan import encoding_spec, pixel_spec
from nextvid.lineage.sweep import sweep
from nextvid.planning.acceptance import accept_asked
from nextvid.trainset.pixels import freeze_pixels
from nextvid.trainset.trainset import Trainset, make_trainset
from storage.store import PixelStore
from tests.factories import FRAMES, Corpus
from tests.nextvid.train.pixel_corpus import write_shard
from tests.nextvid.train.tiny import tiny_recipe

FILMS = "films.000000"
PIXELS = {"quality": 90}


def configure(corpus: Corpus, pixels: dict[str, int] | None) -> Project:
    encoding = {"autoencoder": str(corpus.autoencoder), "resolution": 16}
    return corpus.configure(encoding=encoding | ({"pixels": pixels} if pixels else {}))


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """Eight films with latents and pixels, each in two parts of four, all wanted."""
    made = Corpus(tmp_path)
    configure(made, PIXELS)
    accept_asked(made.project)
    films = made.rows(FILMS, 8)
    made.clips(FILMS, films)
    store = store_of(made)
    store.create()
    for number, some in enumerate((films[:4], films[4:])):
        made.encode(FILMS, some, seed=number)
        write_shard(store.plan_part(FILMS, FRAMES, [row["row_id"] for row in some]), 0)
    return made


def store_of(corpus: Corpus) -> PixelStore:
    spec = pixel_spec(corpus.project, encoding_spec(corpus.project))
    assert spec is not None
    return PixelStore(corpus.project.root, spec)


def standing(store: PixelStore) -> list[bool]:
    return [store.part(FILMS, FRAMES, number).is_stored(0) for number in store.parts(FILMS, FRAMES)]


def want(corpus: Corpus, *rows: int) -> None:
    corpus.clips(FILMS, [corpus.row(FILMS, i) for i in rows])


def freeze(corpus: Corpus) -> None:
    """A trainset of all rows, and its pixels as a run of 16 x 16 pixels reads them."""
    corpus.duplicates()

    make_trainset(corpus.project)
    small = ["model.encoder.input=pixels", "model.grid_height=2", "model.grid_width=2"]
    budgets = ["masks.strategies.0.budget=2", "masks.strategies.1.budget=1"]
    freeze_pixels(corpus.project, Trainset.open(corpus.project.root), apply_overrides(tiny_recipe(), small + budgets))


def test_what_clips_need_is_kept(corpus: Corpus) -> None:
    assert sweep(corpus.project, yes=True).deleted == ()
    assert standing(store_of(corpus)) == [True, True]


def test_what_no_clip_wants_goes_with_its_latents(corpus: Corpus) -> None:
    want(corpus, 0, 1, 2, 3)
    store = store_of(corpus)
    planned = sweep(corpus.project)
    assert len(planned.deleted) == 2  # one shard of latents, one of pixels
    assert standing(store) == [True, True]
    found = sweep(corpus.project, yes=True)
    assert {shard.path for shard in found.deleted} == {shard.path for shard in planned.deleted}
    assert standing(store) == [True, False]
    assert store.verify() == []


def test_pixels_that_nobody_asks_for_any_more_go_and_latents_stay(corpus: Corpus) -> None:
    store = store_of(corpus)
    plain = configure(corpus, None)
    assert sweep(plain, yes=True).deleted == (), "they are accepted until another corpus.yaml is accepted"
    plain = accept_asked(plain)
    found = sweep(plain, yes=True)
    assert [Path(shard.path).is_relative_to(corpus.project.root.folder("pixels")) for shard in found.deleted] == [
        True,
        True,
    ]
    assert standing(store) == [False, False]


def test_pixels_of_another_quality_go(corpus: Corpus) -> None:
    store = store_of(corpus)
    other = configure(corpus, {"quality": 80})
    other = accept_asked(other)
    assert len(sweep(other, yes=True).deleted) == 2
    assert standing(store) == [False, False]


def test_what_a_run_may_read_stays_whatever_corpus_yaml_says(corpus: Corpus) -> None:
    """Frozen pixels of a trainset are cited, by name."""
    freeze(corpus)
    store, digest = store_of(corpus), Trainset.open(corpus.project.root).digest
    want(corpus, 0)
    found = sweep(configure(corpus, None), yes=True)
    assert found.deleted == ()
    assert standing(store) == [True, True]
    assert all(shard.trainsets == (digest,) for shard in found.kept)
    assert len(found.kept) == 4


def test_an_unknown_batch_loses_no_pixels(corpus: Corpus) -> None:
    Path(corpus.project.root.checks("clips", FILMS)).unlink()
    assert sweep(corpus.project, yes=True).deleted == ()
    assert standing(store_of(corpus)) == [True, True]
