"""Several devices: processes on CPU stand in for GPUs, and share a part's shards without writing one twice."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nextvid.config.project import Project
from nextvid.encode.latents import make_latents
from nextvid.encode.pipeline import shares
from nextvid.encode.plan import accepted_spec, plan_encode
from nextvid.making.progress import Progress
from storage.errors import ConfigError
from storage.shard import ROWS_PER_SHARD
from storage.store import LatentStore
from tests.factories import clip_row, publish_clips
from tests.nextvid.encode.small_corpus import FILMS, STILLS, films, stills, stored, write_corpus


def begin(folder: Path, autoencoder: Path, count: int) -> Project:
    """One image, looked at often enough for three shards."""
    made = write_corpus(folder, autoencoder, devices=count, batch_frames=64)
    (path,) = stills(folder, 1)
    views = 2 * ROWS_PER_SHARD + 9
    boxes = [
        {"crop_x": n % 24, "crop_y": n // 24 % 24, "crop_w": 40, "crop_h": 40, "flip": False} for n in range(views)
    ]
    publish_clips(made, STILLS, [clip_row(path, 0, view, **box) for view, box in enumerate(boxes)])
    return made


def test_two_processes_store_what_one_stores(tmp_path: Path, cosine_autoencoder: Path) -> None:
    one, two = begin(tmp_path / "one", cosine_autoencoder, 1), begin(tmp_path / "two", cosine_autoencoder, 2)
    paces: list[Progress] = []
    alone, together = make_latents(one, STILLS), make_latents(two, STILLS, paces.append)
    assert together.passed
    assert together.digest == alone.digest  # ids and checksums of every row
    assert together.numbers["encoded"] == 2 * ROWS_PER_SHARD + 9
    assert stored(two, STILLS).keys() == stored(one, STILLS).keys()
    assert {pace.devices for pace in paces} == {2}
    assert paces[-1].done == paces[-1].total
    checks = {check.name: check.numbers for check in together.checks}
    assert checks["round_trip"]["last_rows"] == 6  # two of each shard
    assert plan_encode(two, STILLS).rows.is_empty()


@pytest.mark.faults
def test_what_a_process_refuses_is_told_in_its_words(tmp_path: Path, cosine_autoencoder: Path) -> None:
    project = write_corpus(tmp_path, cosine_autoencoder, devices=2, posterior="sample")
    publish_clips(project, STILLS, [clip_row(stills(tmp_path, 1)[0], 0)])
    with pytest.raises(ConfigError, match="no posterior to sample"):
        make_latents(project, STILLS)


def test_it_waits_for_a_gpu_that_is_held(
    tmp_path: Path, cosine_autoencoder: Path, refuse_to_share: Callable[..., None]
) -> None:
    project = write_corpus(tmp_path, cosine_autoencoder)
    publish_clips(project, STILLS, [clip_row(stills(tmp_path, 1)[0], 0)])
    refuse_to_share(f"latents {STILLS}", project, lambda project, tell: make_latents(project, STILLS, tell))


@pytest.mark.parametrize("sharers", [1, 2, 8])
def test_sharers_together_take_no_more_cores_than_there_are(monkeypatch: pytest.MonkeyPatch, sharers: int) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)))
    for device in ("cpu", "cuda:0"):
        workers, threads = shares(device, sharers)
        assert workers >= 1
        assert threads >= 1
        assert sharers * (workers + threads) <= 64


@pytest.mark.faults
@pytest.mark.parametrize("turn", range(2))
def test_three_makers_at_once_commit_each_row_once(
    tmp_path: Path, random_autoencoder: Path, small_shards: None, turn: int
) -> None:
    """A file that cannot be decoded among them: whoever begins before the others end does not try it again."""
    project = write_corpus(tmp_path, random_autoencoder)
    broken = tmp_path / "films" / "broken.mp4"
    broken.write_bytes(b"no film")
    rows = [clip_row(path, index, view) for path in films(tmp_path) for index in range(6) for view in (0, 1)]
    publish_clips(project, FILMS, [*rows, clip_row(broken, 0)])
    command = [sys.executable, "-m", "tests.nextvid.encode.encoders", str(project.path), str(tmp_path / "start")]
    makers = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for maker in makers:
        assert maker.stdout is not None
        assert maker.stdout.readline() == "ready\n"
    (tmp_path / "start").touch()
    said = [maker.communicate(timeout=300)[1] for maker in makers]
    assert [maker.returncode for maker in makers] == [0, 0, 0], said
    store = LatentStore(project.root, accepted_spec(project))
    planned = [row for part in store.parts_of(FILMS) for row in part.plan["row_id"].to_list()]
    good = [row["row_id"] for row in rows]
    assert sorted(row for row in planned if row in set(good)) == sorted(good)
    assert [problem for problem in store.verify(FILMS) if not problem.file.endswith(".partial")] == []
