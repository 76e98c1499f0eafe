"""Several devices: processes on CPU stand in for GPUs, and share a part's shards without writing one twice."""

from collections.abc import Callable
from pathlib import Path

import pytest

from nextvid.config.project import Project
from nextvid.encode.latents import make_latents
from nextvid.encode.pipeline import shares
from nextvid.encode.plan import plan_encode
from nextvid.making.progress import Progress
from storage.errors import ConfigError
from storage.shard import ROWS_PER_SHARD
from tests.factories import clip_row, publish_clips
from tests.nextvid.encode.small_corpus import STILLS, stills, stored, write_corpus


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
