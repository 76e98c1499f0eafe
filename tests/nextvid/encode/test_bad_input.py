"""What encoding is given wrongly: one clear error each, nothing half-written; files that went cost only their rows."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from safetensors.torch import load_file, save_file

from nextvid.config.project import Project
from nextvid.encode.latents import make_latents
from nextvid.encode.plan import accepted_spec, plan_encode
from storage import atomic
from storage.errors import ConfigError, DamagedError
from storage.store import LatentStore
from tests.factories import clip_row, publish_clips
from tests.nextvid.encode.small_corpus import films, write_corpus

FILMS = "films.000000"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def begin(folder: Path, autoencoder: Path, **encoding: Any) -> Project:
    made = write_corpus(folder, autoencoder, **encoding)
    publish_clips(made, FILMS, [clip_row(path, index) for path in films(folder) for index in range(8)])
    return made


def parts(project: Project) -> list[Path]:
    return list(Path(project.root.folder("latents")).rglob("plan.parquet"))


def _without(folder: Path, name: str) -> None:
    (folder / name).unlink()


def _tensor(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    held = load_file(folder / WEIGHTS)
    change(held)
    save_file(held, folder / WEIGHTS)


def _config(folder: Path, **changed: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changed
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: _without(f, "config.json"), "no config.json"),
        (lambda f: (f / "config.json").write_text("{cut off"), "not readable as JSON"),
        (lambda f: (f / "config.json").write_text("[1]"), "keys were expected"),
        (lambda f: _config(f, block_out_channels=None), "'block_out_channels' is missing"),
        (lambda f: _config(f, _class_name="AutoencoderOobleck"), "AutoencoderOobleck is not supported"),
        (lambda f: _without(f, WEIGHTS), "read from safetensors only"),
        (lambda f: (f / WEIGHTS).write_bytes(b"\x00" * 40), "cannot load"),
        (lambda f: _tensor(f, lambda held: held.pop("decoder.conv_out.weight")), "1 tensors missing"),
        (lambda f: _tensor(f, lambda held: held.update(more=held["decoder.conv_out.bias"].clone())), "1 unknown"),
        (lambda f: (f / "nextvid.json").write_text('{"kind": "autoencoder_kl", "patch": 48}'), "no multiple of 96"),
        (lambda f: (f / "nextvid.json").write_text('{"kind": "autoencoder_kl", "pach": 4}'), "did you mean 'patch'"),
    ],
    ids=lambda value: None if callable(value) else value.split("'")[0],
)
def test_an_autoencoder_that_is_none(
    tmp_path: Path, random_autoencoder: Path, spoil: Callable[[Path], Any], words: str
) -> None:
    folder = tmp_path / "autoencoder"
    shutil.copytree(random_autoencoder, folder)
    project = begin(tmp_path, folder)
    spoil(folder)
    with pytest.raises(ConfigError, match=words):
        make_latents(project, FILMS)
    assert parts(project) == []


def test_a_posterior_that_is_not_there_is_refused_by_the_plan(tmp_path: Path, cosine_autoencoder: Path) -> None:
    project = begin(tmp_path, cosine_autoencoder, posterior="sample")
    with pytest.raises(ConfigError, match="no posterior to sample"):
        plan_encode(project, FILMS)


@pytest.mark.parametrize("change", ["vanished", "changed"])
def test_a_file_that_went_costs_its_rows_and_the_batch_goes_on(
    tmp_path: Path, cosine_autoencoder: Path, change: str
) -> None:
    project = begin(tmp_path, cosine_autoencoder)
    gone, *others = films(tmp_path)
    content = gone.read_bytes()
    clips = pl.read_parquet(project.root.table("clips", FILMS))
    if change == "vanished":
        gone.unlink()
    else:
        gone.write_bytes(content + b"one byte more")
    outcome = make_latents(project, FILMS)
    assert (outcome.rows, outcome.quarantined) == (16, 8)
    commits = LatentStore(project.root, accepted_spec(project)).commits(FILMS)
    lost = commits.filter(pl.col("status") == "quarantined")
    assert set(lost["reason"]) == {"missing" if change == "vanished" else "changed"}
    assert set(lost["row_id"]) == set(clips.filter(pl.col("uri") == str(gone))["row_id"])
    gone.write_bytes(content)  # back again: the next call takes up what it lost, and that alone
    assert plan_encode(project, FILMS).reasons == {"failed before": 8}
    assert make_latents(project, FILMS).rows == 24
    assert all(path.exists() for path in others)


def test_a_full_disk_leaves_no_shard_and_the_next_call_goes_on(
    tmp_path: Path, cosine_autoencoder: Path, monkeypatch: pytest.MonkeyPatch, small_shards: None
) -> None:
    project = begin(tmp_path, cosine_autoencoder)
    sync = atomic._sync

    def full(path: Path) -> None:
        if path.name.startswith(".c.2.") and path.name.endswith(atomic.SUFFIX):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        sync(path)

    with monkeypatch.context() as patched:
        patched.setattr(atomic, "_sync", full)
        with pytest.raises(OSError, match="cannot be written: its disk is full"):
            make_latents(project, FILMS)
    store = LatentStore(project.root, accepted_spec(project))
    assert set(store.commits(FILMS)["shard"]) in ({0, 1}, {0, 1, 3})  # whole ones; the fourth was at the door
    assert not list(Path(project.root.url).rglob(f"*{atomic.SUFFIX}"))
    assert store.verify(FILMS) == []
    assert make_latents(project, FILMS).rows == 24


@pytest.mark.parametrize("noun", ["latents", "pixels"])
def test_a_folder_with_a_commits_name_is_one_clear_error(
    tmp_path: Path, cosine_autoencoder: Path, small_shards: None, noun: str
) -> None:
    """Nothing can be committed under that name, so that the part stays unfinished whatever is encoded."""
    project = begin(tmp_path, cosine_autoencoder, pixels={"quality": 90})
    make_latents(project, FILMS)
    (commit,) = Path(project.root.url, noun).rglob("commits/000001.parquet")
    commit.unlink()
    commit.mkdir()
    with pytest.raises(DamagedError, match=r"000001\.parquet is not a file: remove it"):
        make_latents(project, FILMS)
    commit.rmdir()
    assert make_latents(project, FILMS).rows == 24
