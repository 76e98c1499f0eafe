"""A pulled trainset trains as the source does; damage, strangers and stops are told or repaired."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nextvid.config.project import Project
from nextvid.trainset.pull import pull
from nextvid.trainset.trainset import Trainset
from storage import atomic, listing
from storage.errors import ConfigError, ConflictError, DamagedError, RefusedError, StoreError, UpstreamError
from storage.listing import files_below
from storage.reader import row_id
from storage.store import LatentStore
from storage.withdrawn import record_withdrawal
from tests.factories import flip, write_project
from tests.nextvid.train.corpus import WEIGHTS, loading, make_project, tiny_spec
from tests.nextvid.train.tiny import latents_of, tiny_recipe

SHARDS = 3  # of the tiny trainset: 4 and 8 frames of films, images


@pytest.fixture
def source(tmp_path: Path) -> Project:
    return make_project(tmp_path / "source")


@pytest.fixture
def other(tmp_path: Path) -> Project:
    """A project with an empty root."""
    datasets = {name: {"uri": name, "weight": w, "clips": [{"frames": 4, "fps": 4}]} for name, w in WEIGHTS.items()}
    encoding = {"autoencoder": "none", "resolution": 32}
    return write_project(tmp_path / "other", datasets, root="data", encoding=encoding)


def digest_of(project: Project) -> str:
    return Trainset.open(project.root).digest


def test_a_pulled_trainset_gives_the_same_batches_without_its_source(source: Project, other: Project) -> None:
    with loading(source, tiny_recipe()) as loader:
        wanted = [latents_of(batch).clone() for batch in loader.batches(0)]
    done: list[tuple[int, int]] = []
    found = pull(
        other, digest_of(source), source.root.url, lambda progress: done.append((progress.done, progress.total))
    )
    assert (found.shards, found.copied, found.is_latest) == (SHARDS, SHARDS, True)
    assert done == [(n + 1, SHARDS) for n in range(SHARDS)]
    shutil.rmtree(source.root.url)
    assert LatentStore(other.root, tiny_spec()).verify() == []
    with loading(other, tiny_recipe()) as loader:
        assert all(latents_of(batch).equal(one) for batch, one in zip(loader.batches(0), wanted, strict=True))


def test_only_what_the_trainset_cites_is_copied(source: Project, other: Project) -> None:
    (Path(source.root.url) / "clips").mkdir()
    (Path(source.root.url) / "clips" / "films.000000.parquet").write_bytes(b"no row of it is asked for")
    pull(other, digest_of(source), source.root.url)
    copied = {path.removeprefix(other.root.url) for path in files_below(other.root.url)}
    there = {path.removeprefix(source.root.url) for path in files_below(source.root.url)}
    assert copied <= there
    assert {path.split("/")[1] for path in copied} == {"latents", "trainset"}


@pytest.mark.parametrize("left", range(1, 14, 3))
def test_stopped_after_any_file_it_goes_on(
    source: Project, other: Project, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    staged, count = atomic.staged_file, 0

    @contextmanager
    def stops(path: str, **more: bool) -> Iterator[Path]:
        nonlocal count
        count += 1
        if count > left:
            raise KeyboardInterrupt
        with staged(path, **more) as temporary:
            yield temporary

    with monkeypatch.context() as patched:
        patched.setattr(atomic, "staged_file", stops)
        with pytest.raises(KeyboardInterrupt):
            pull(other, digest_of(source), source.root.url)
    with pytest.raises(UpstreamError):
        Trainset.open(other.root)
    found = pull(other, digest_of(source), source.root.url)
    assert found.copied <= found.shards == SHARDS
    assert LatentStore(other.root, tiny_spec()).verify() == []
    again = pull(other, digest_of(source), source.root.url)
    assert (again.copied, again.copied_bytes) == (0, 0)


def test_a_damaged_source_is_not_copied(source: Project, other: Project) -> None:
    flip(LatentStore(source.root, tiny_spec()).part("films.000000", 8, 0).shard_path(0), 50)
    with pytest.raises(DamagedError, match="differs from its checksum"):
        pull(other, digest_of(source), source.root.url)
    with pytest.raises(UpstreamError):
        Trainset.open(other.root)


@pytest.mark.parametrize("where", ["source", "other"])
def test_a_withdrawn_row_is_refused_wherever_it_was_withdrawn(source: Project, other: Project, where: str) -> None:
    row = row_id(Trainset.open(source.root).rows(4)[1])
    record_withdrawal((source if where == "source" else other).root, row.hex(), [row])
    with pytest.raises(RefusedError, match="was withdrawn"):
        pull(other, digest_of(source), source.root.url)


def test_a_batch_of_the_same_name_is_not_mixed_with(source: Project, tmp_path: Path) -> None:
    mine = make_project(tmp_path / "mine", seed=1)
    before = digest_of(mine)
    with pytest.raises(ConflictError, match=r"has a batch .* of its own"):
        pull(mine, digest_of(source), source.root.url)
    assert LatentStore(mine.root, tiny_spec()).verify() == []
    assert digest_of(mine) == before


def test_a_listing_that_lacks_a_file_is_no_damage(
    source: Project, other: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = listing.files_below
    monkeypatch.setattr(
        listing, "files_below", lambda top: {path: size for path, size in real(top).items() if "/commits/" not in path}
    )
    with pytest.raises(StoreError, match=r"their folder was listed without them: .*Nothing is damaged") as caught:
        pull(other, digest_of(source), source.root.url)
    assert not isinstance(caught.value, DamagedError)
    with pytest.raises(StoreError, match="listed without it"):
        Trainset.open(source.root).gone()


def test_what_cannot_be_pulled(source: Project, other: Project) -> None:
    with pytest.raises(ConfigError, match="this project's own root"):
        pull(source, digest_of(source), source.root.url)
    with pytest.raises(UpstreamError, match="is not whole"):
        pull(other, "0" * 32, source.root.url)
    with pytest.raises(ConfigError, match="not a digest"):
        pull(other, "latest", source.root.url)
