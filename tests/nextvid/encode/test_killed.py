"""kill -9 at every step that publishes: what is committed is whole, and the finished store equals one never killed.

The disk of the child is slow, so that its encoder runs ahead as far as it may: what a kill loses is the most it can.
"""

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nextvid.config.project import Project, open_project
from nextvid.encode.latents import make_latents
from nextvid.encode.plan import accepted_spec
from storage.store import LatentStore
from tests.nextvid.encode.conftest import shards_of_four
from tests.nextvid.encode.small_corpus import FILMS, F, begin, stored

SHARD = 4  # rows a shard, so that there are three
AHEAD = 2  # rows encoded before the shard before them is committed; batches are of one row
STEPS = 8  # the spec, the part with its plan, and of three shards the file and the commit

# A child that publishes by os.link and os.rename dies at the n-th of them, just before or just after it. It prints a
# dot for each row that it begins to encode.
CHILD = f"""
import os, signal, sys, time
from storage import shard
from nextvid.encode import pipeline
shard.ROWS_PER_SHARD = {SHARD}
shard.INDEX_BYTES = 16 * {SHARD} + 4
pipeline.AHEAD = {AHEAD}
encode = pipeline.encode_rows
def dotted(model, spec, frames, forwards):
    def begun():
        for seen in forwards:
            os.write(1, b"." * len(seen))
            yield seen
    return encode(model, spec, frames, begun())
pipeline.encode_rows = dotted
corpus, wanted, when = sys.argv[1], int(sys.argv[2]), sys.argv[3]
step = 0
def dying(publish):
    def published(*args, **named):
        global step
        if ".partial/" in str(args[1]):  # zarr, inside a folder that has no name yet
            return publish(*args, **named)
        step += 1
        time.sleep(0.25)
        if step == wanted and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        publish(*args, **named)
        if step == wanted:
            os.kill(os.getpid(), signal.SIGKILL)
    return published
os.link, os.rename = dying(os.link), dying(os.rename)
from nextvid.config.project import open_project
from nextvid.encode.latents import make_latents
make_latents(open_project(corpus), "{FILMS}")
"""


@pytest.fixture(scope="module")
def unkilled(tmp_path_factory: pytest.TempPathFactory, cosine_autoencoder: Path) -> dict[bytes, np.ndarray]:
    """What one uninterrupted call stores."""
    with shards_of_four():
        project = begin(tmp_path_factory.mktemp("unkilled"), cosine_autoencoder, batch_frames=F)
        make_latents(project, FILMS)
        return stored(project, FILMS)


def killed_at(
    folder: Path, autoencoder: Path, unkilled: dict[bytes, np.ndarray], step: int, when: str
) -> tuple[Project, int, int]:
    """A project whose encode was killed there, its committed rows, checked to be right, and how many rows were lost:
    begun and not committed."""
    begin(folder, autoencoder, batch_frames=F)
    command = [sys.executable, "-c", CHILD, str(folder / "corpus.yaml"), str(step), when]
    done = subprocess.run(command, cwd=Path.cwd(), capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    project = open_project(folder / "corpus.yaml")
    survived = stored(project, FILMS)
    for row, values in survived.items():
        np.testing.assert_array_equal(values, unkilled[row])
    return project, len(survived), done.stdout.count(".") - len(survived)


def finish(project: Project, unkilled: dict[bytes, np.ndarray]) -> None:
    """Ask again: one part, every row, bit for bit; verify minds nothing but temporary files of the dead."""
    assert make_latents(project, FILMS).passed
    again = stored(project, FILMS)
    assert again.keys() == unkilled.keys()
    for row, values in again.items():
        np.testing.assert_array_equal(values, unkilled[row])
    store = LatentStore(project.root, accepted_spec(project))
    assert store.parts(FILMS, 4) == [0]
    assert [problem for problem in store.verify(FILMS) if not problem.file.endswith(".partial")] == []


def test_a_kill_between_a_shard_and_its_commit_costs_that_shard(
    tmp_path: Path, cosine_autoencoder: Path, unkilled: dict[bytes, np.ndarray], small_shards: None
) -> None:
    """And the few rows of the next one that may be begun before it is committed; not a second shard."""
    project, survived, lost = killed_at(tmp_path, cosine_autoencoder, unkilled, 6, "before")
    assert survived == SHARD  # the first is committed, the second written and not committed
    assert lost == SHARD + AHEAD
    finish(project, unkilled)


@pytest.mark.faults
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_a_kill_at_any_step_loses_no_committed_row_and_at_most_a_shard_and_a_few_rows(
    tmp_path: Path,
    cosine_autoencoder: Path,
    unkilled: dict[bytes, np.ndarray],
    small_shards: None,
    step: int,
    when: str,
) -> None:
    project, survived, lost = killed_at(tmp_path, cosine_autoencoder, unkilled, step, when)
    reached = step if when == "after" else step - 1
    assert survived == SHARD * max(0, (reached - 2) // 2)  # two steps a shard after spec and part
    assert lost <= SHARD + AHEAD
    finish(project, unkilled)
