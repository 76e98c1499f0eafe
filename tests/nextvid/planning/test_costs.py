"""What encoding would cost: rates are the store's own, what was never measured is unknown, and accepting changes it."""

from pathlib import Path

import pytest

from nextvid.encode.plan import accepted_spec, encoding_spec
from nextvid.planning.acceptance import accept_asked, ensure_accepted, outdated
from nextvid.planning.costs import Rate, forecast, rates
from storage.errors import UpstreamError
from storage.store import LatentStore
from tests.factories import FRAMES, Corpus

FILMS, STILLS = "films.000000", "stills.000000"


@pytest.fixture
def corpus(tmp_path: Path, random_autoencoder: Path) -> Corpus:
    """Six clips and two images wanted, four of the clips encoded at 0.5 and 0.25 s a row."""
    made = Corpus(tmp_path, random_autoencoder)
    films = made.rows(FILMS, 6)
    made.clips(FILMS, films)
    made.clips(STILLS, made.rows(STILLS, 2))
    made.encode(FILMS, films[:4], failed=[3], encode_s=0.5, decode_s=0.25)
    return made


def test_rates_are_means_over_good_rows_by_clip_length(corpus: Corpus) -> None:
    store = LatentStore(corpus.project.root, encoding_spec(corpus.project))
    assert rates(store) == {FRAMES: Rate(3, 0.5, 0.25)}


def test_rates_are_of_the_latest_batches_of_each_dataset(corpus: Corpus) -> None:
    """An old machine's figures fade, and a plan reads no more of a store of a thousand batches than of one of ten."""
    for number in range(1, 5):
        batch = f"films.{number:06d}"
        rows = [corpus.row(batch, 0)]
        corpus.clips(batch, rows)
        corpus.encode(batch, rows, encode_s=float(number), decode_s=1.0)
    store = LatentStore(corpus.project.root, encoding_spec(corpus.project))
    assert rates(store) == {FRAMES: Rate(3, 3.0, 1.0)}  # of 2, 3 and 4


def test_a_store_without_rows_has_no_rates(tmp_path: Path, random_autoencoder: Path) -> None:
    made = Corpus(tmp_path, random_autoencoder)
    assert rates(LatentStore(made.project.root, encoding_spec(made.project))) == {}


def test_costs_are_rows_times_rates(corpus: Corpus) -> None:
    found = forecast(corpus.project, FILMS)
    (cost,) = found.now
    row_bytes = encoding_spec(corpus.project).row_bytes(FRAMES)
    assert (cost.rows, cost.kept, cost.orphaned) == (3, 3, 0)
    assert dict(cost.why) == {"failed before": 1, "new file": 2}
    assert (cost.size_bytes, cost.encode_s, cost.decode_s) == (3 * row_bytes, 1.5, 0.75)
    assert found.outdated == ()
    assert "3 rows" in found.text()
    assert "1.5 device-s" in found.text()


def test_what_was_never_measured_is_unknown(corpus: Corpus) -> None:
    (cost,) = forecast(corpus.project, STILLS).now
    assert (cost.rows, cost.encode_s, cost.decode_s, cost.unmeasured) == (2, None, None, (1,))
    assert "no rate is known (none measured at 1 frames)" in cost.line()


def test_nothing_to_do_says_so(corpus: Corpus) -> None:
    corpus.encode(FILMS, corpus.rows(FILMS, 3, 6))
    (cost,) = forecast(corpus.project, FILMS).now
    assert (cost.rows, cost.encode_s, cost.size_bytes) == (0, 0, 0)
    assert "nothing to do" in cost.line()


def test_another_resolution_is_outdated_until_it_is_accepted(corpus: Corpus) -> None:
    before = ensure_accepted(corpus.project)
    project = corpus.configure(encoding={"autoencoder": str(corpus.autoencoder), "resolution": 32})
    found = forecast(project)
    assert found.outdated == ("encoding",)
    assert found.accepted == before
    assert [cost.rows for cost in found.now] == [3, 2]  # what make goes on with
    assert [cost.rows for cost in found.if_accepted] == [6, 2]
    assert [dict(cost.why) for cost in found.if_accepted] == [{"new encoding": 6}, {"new encoding": 2}]
    assert all(cost.encode_s is None for cost in found.if_accepted)
    assert "2 batches are outdated" in found.text()
    accept_asked(project)
    assert outdated(project) == ()
    assert accepted_spec(project) == encoding_spec(project)
    assert [cost.rows for cost in forecast(project).now] == [6, 2]


def test_accepting_writes_the_spec_so_that_the_next_change_can_be_told(
    tmp_path: Path, random_autoencoder: Path
) -> None:
    """Nothing was encoded between two changes: the accepted spec must still be readable."""
    made = Corpus(tmp_path, random_autoencoder)
    made.clips(FILMS, [made.row(FILMS, 0)])
    ensure_accepted(made.project)
    project = made.configure(encoding={"autoencoder": str(random_autoencoder), "resolution": 32})
    assert [cost.rows for cost in forecast(project).now] == [1]


def test_other_weights_leave_only_what_accepting_costs(corpus: Corpus, cosine_autoencoder: Path) -> None:
    ensure_accepted(corpus.project)
    project = corpus.configure(encoding={"autoencoder": str(cosine_autoencoder), "resolution": 16})
    found = forecast(project)
    assert found.now == ()
    assert [cost.rows for cost in found.if_accepted] == [6, 2]
    assert "corpus.yaml names another autoencoder than the accepted one" in found.text()


def test_a_batch_without_clips_is_named(corpus: Corpus) -> None:
    Path(corpus.project.root.folder("sources")).mkdir()
    Path(corpus.project.root.table("sources", "films.000001")).touch()
    found = forecast(corpus.project)
    assert found.without_clips == ("films.000001",)
    assert "films.000001: its clips are not made yet" in found.text()
    with pytest.raises(UpstreamError):
        forecast(corpus.project, "films.000001")


def test_an_empty_project_says_what_to_do(tmp_path: Path, random_autoencoder: Path) -> None:
    assert "nextvid make clips" in forecast(Corpus(tmp_path, random_autoencoder).project).text()
