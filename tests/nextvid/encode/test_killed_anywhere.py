"""kill -9 of an encode at moments that nobody chose, pixels included: nothing committed is lost, nothing else is read.

A kill falls at random into the time from the plan of the part to the last commit, as an encode that was not killed took
it. At steps that were chosen: test_killed.py.
"""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pytest

from nextvid.config.project import Project, open_project
from nextvid.encode.latents import make_latents
from nextvid.encode.plan import accepted_spec
from storage import atomic
from storage.store import LatentStore, every_store
from tests.forked import Forks, parent_of
from tests.nextvid.encode.conftest import shards_of_four
from tests.nextvid.encode.small_corpus import FILMS, F, begin

SHARDS = 6  # three of latents, and their twins of pixels
ENCODE = ("tests.nextvid.encode.encoders", "encode")
Rows = Mapping[tuple[str, bytes], int]  # by store and row id: crc32c of the stored bytes


@dataclass(frozen=True)
class Killed:
    """What a dead encoder left: commits, temporary names, shards without a commit."""

    commits: int
    temporary: int
    uncommitted: int


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    modules = ["torch", "diffusers", "zarr", "nextvid.encode.pipeline", "nextvid.encode.autoencoders", ENCODE[0]]
    with parent_of(Path(__file__).resolve().parents[3], modules) as found:
        yield found


@pytest.fixture(scope="module")
def unkilled(tmp_path_factory: pytest.TempPathFactory, cosine_autoencoder: Path) -> tuple[Path, Rows]:
    """Where its films lie, and what one uninterrupted call stores."""
    folder = tmp_path_factory.mktemp("unkilled")
    with shards_of_four():
        project = planned(folder, cosine_autoencoder, None)
        make_latents(project, FILMS)
        return folder, committed(project)


def planned(folder: Path, autoencoder: Path, films: Path | None) -> Project:
    if films is not None:
        shutil.copytree(films / "films", folder / "films")
    return begin(folder, autoencoder, batch_frames=F, pixels={"quality": 90})


def committed(project: Project) -> Rows:
    """Of every store, by what its commits say; verify reads each of these rows."""
    return {
        (store.noun, row): crc
        for store in every_store(project.root)
        for row, crc in store.commits(FILMS).filter(pl.col("status") == "ok").select("row_id", "crc32c").iter_rows()
    }


def commits(folder: Path) -> int:
    return len(list((folder / "root").rglob("commits/[0-9]*.parquet")))


def waited(folder: Path, wanted: str) -> None:
    until = time.monotonic() + 240
    while not list((folder / "root" / "latents").rglob(wanted)):
        assert time.monotonic() < until, "the encoder made nothing"
        time.sleep(0.002)


def seconds_to_commit(folder: Path, forks: Forks) -> float:
    """From the plan to the last commit, of an encode that nobody kills."""
    forks.start(*ENCODE, str(folder / "corpus.yaml"))
    waited(folder, "plan.parquet")
    began = time.monotonic()
    while commits(folder) < SHARDS:
        time.sleep(0.002)
        assert time.monotonic() - began < 240
    took = time.monotonic() - began
    assert forks.ended() == 0
    return took


def killed(folder: Path, forks: Forks, after_s: float) -> None:
    forks.start(*ENCODE, str(folder / "corpus.yaml"))
    waited(folder, "plan.parquet")
    time.sleep(after_s)
    forks.kill()
    assert forks.ended() in (0, -signal.SIGKILL)  # 0: it was faster than the one that was measured


def recovered(folder: Path, unkilled: Rows) -> Killed:
    """Check what is there, encode the rest, sweep; the whole is that of an encode that nobody killed."""
    project = open_project(folder / "corpus.yaml")
    before = commits(folder)
    temporary = [str(path) for path in (folder / "root").rglob(".*.partial")]
    with shards_of_four():
        assert committed(project).items() <= unkilled.items()
        problems = [problem for store in every_store(project.root) for problem in store.verify()]
        orphans = [problem for problem in problems if "without its commit" in problem.what]
        assert problems == orphans
        assert make_latents(project, FILMS).passed
        assert committed(project) == unkilled
        atomic.remove_leftovers(project.root.url, older_than_s=0)
        assert [problem for store in every_store(project.root) for problem in store.verify()] == []
        assert LatentStore(project.root, accepted_spec(project)).parts(FILMS, F) == [0]
    assert not list((folder / "root").rglob(".*.partial"))
    return Killed(before, len(temporary), len(orphans))


def kills(folder: Path, autoencoder: Path, forks: Forks, unkilled: tuple[Path, Rows], seeds: range) -> Iterator[Killed]:
    films, rows = unkilled
    took_s = 0.0
    for seed in seeds:
        if (seed - seeds.start) % 20 == 0:  # others use the machine too
            planned(folder / f"whole{seed}", autoencoder, films)
            took_s = seconds_to_commit(folder / f"whole{seed}", forks)
        planned(folder / str(seed), autoencoder, films)
        killed(folder / str(seed), forks, took_s * random.Random(seed).random())
        yield recovered(folder / str(seed), rows)
        shutil.rmtree(folder / str(seed))


def test_an_encode_killed_at_some_moments(
    tmp_path: Path, cosine_autoencoder: Path, forks: Forks, unkilled: tuple[Path, Rows]
) -> None:
    found = list(kills(tmp_path, cosine_autoencoder, forks, unkilled, range(2)))
    assert any(one.commits < SHARDS for one in found)


@pytest.mark.faults
@pytest.mark.timeout(2400)
def test_an_encode_killed_at_many_moments(
    tmp_path: Path,
    cosine_autoencoder: Path,
    forks: Forks,
    unkilled: tuple[Path, Rows],
    record_property: Callable[[str, object], None],
) -> None:
    tries = int(os.environ.get("NEXTVID_TRIES", "200"))
    found = list(kills(tmp_path, cosine_autoencoder, forks, unkilled, range(100, 100 + tries)))
    record_property("tries", len(found))
    between = sum(0 < one.commits < SHARDS for one in found)
    leftover = sum(one.temporary > 0 or one.uncommitted > 0 for one in found)
    assert (between > 0.3 * tries, leftover > 0.15 * tries) == (True, True) or tries < 100, (
        f"of {len(found)}: {between} between commits, {leftover} with leftover files"
    )
