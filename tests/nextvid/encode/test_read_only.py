"""Makers on a root that may only be read: one error, nothing half-written, and what is up to date stays so."""

from pathlib import Path

import pytest

from nextvid.encode.latent_stats import make_latent_stats
from nextvid.encode.latents import make_latents
from nextvid.trainset.trainset import make_trainset
from storage.errors import UnwritableError
from tests.factories import Corpus
from tests.nextvid.encode.small_corpus import FILMS, begin
from tests.storage.read_only import read_only, tree

MESSAGE = r"cannot be written: .* is on a read-only file system\. Make it writable"


def test_encoding(tmp_path: Path, cosine_autoencoder: Path) -> None:
    """Before anything is decoded, in the middle of a batch's parts, and where nothing is left to do."""
    project = begin(tmp_path, cosine_autoencoder)
    before = tree(project.root.url)
    with read_only(project.root.url) as refused, pytest.raises(UnwritableError, match=MESSAGE) as caught:
        make_latents(project, FILMS)
    assert project.root.url in str(caught.value)
    assert len(refused) == 1
    assert tree(project.root.url) == before
    assert make_latents(project, FILMS).rows == 12
    done = tree(project.root.url)
    with read_only(project.root.url) as refused:
        again = make_latents(project, FILMS)
    assert not again.made
    assert again.passed
    assert refused == []
    (commit,) = (path for path in done if path.endswith("/commits/000000.parquet"))
    Path(project.root.url, commit).unlink()  # a shard is to be written again
    part_done = tree(project.root.url)
    with read_only(project.root.url), pytest.raises(UnwritableError, match=MESSAGE):
        make_latents(project, FILMS)
    assert tree(project.root.url) == part_done
    assert make_latents(project, FILMS).rows == 12


def test_statistics_and_trainset(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path)
    for batch, count in (("films.000000", 6), ("stills.000000", 4)):
        corpus.add(batch, count)
    corpus.duplicates()
    root = corpus.project.root.url
    for make in (make_latent_stats, make_trainset):
        before = tree(root)
        with read_only(root), pytest.raises(UnwritableError, match=MESSAGE):
            make(corpus.project)
        assert tree(root) == before
        outcome = make(corpus.project)
        assert outcome.made
        with read_only(root) as refused:
            again = make(corpus.project)
        assert (again.made, again.digest) == (False, outcome.digest)
        assert refused == []
