"""An exported encoder stands for itself: raw latents in, or frames where it carries the autoencoder."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

import nextvid
from nextvid.config.project import Project
from nextvid.encode.autoencoders import Autoencoder
from nextvid.encode.weights import autoencoder_digest
from nextvid.model.tokens import latent_tokens
from nextvid.train.export import copy_encoder, export_encoder, load_encoder
from nextvid.train.run import Run, plan_run
from nextvid.train.step import build_model
from nextvid.trainset.trainset import Trainset
from storage.errors import ConfigError, ConflictError, DamagedError, RefusedError, UpstreamError
from storage.spec import EncodingSpec
from tests.nextvid.train.corpus import MEAN, STD, make_project
from tests.nextvid.train.tiny import CHANNELS, GRID, HOW, tiny_recipe


def _run(project: Project) -> Run:
    return plan_run(project.root, tiny_recipe(), HOW, Trainset.open(project.root).digest, "b" * 32, 0, ())


def _export(project: Project, folder: Path, autoencoder: str = "none") -> Path:
    model = build_model(tiny_recipe())
    export_encoder(folder, model.encoder, Trainset.open(project.root), _run(project), autoencoder)
    return folder


def _tiny_autoencoder(folder: Path) -> Path:
    """Stride 8 and four channels, untrained."""
    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=4,
    ).save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return make_project(tmp_path)


def test_it_normalises_by_itself(project: Project, tmp_path: Path) -> None:
    encoder = nextvid.load_encoder(_export(project, tmp_path / "encoder"))
    raw = torch.randn(3, 8, CHANNELS, GRID, GRID, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.from_numpy(values)[:, None, None] for values in (MEAN, STD))
    model = build_model(tiny_recipe())
    with torch.no_grad():
        wanted = model.encoder(latent_tokens((raw - mean) / std, 2), 4)
    torch.testing.assert_close(encoder(raw), wanted)
    torch.testing.assert_close(encoder(raw.half()), wanted, rtol=0.05, atol=0.05)
    assert encoder(raw).shape == (3, 4 * GRID * GRID, 24)


def test_frames_go_through_the_autoencoder_that_made_the_latents(tmp_path: Path) -> None:
    source = _tiny_autoencoder(tmp_path / "autoencoder")
    spec = EncodingSpec(
        autoencoder_digest(source), 8 * GRID, "bicubic", "fp32", "mean", "float16", CHANNELS, GRID, GRID
    )
    project = make_project(tmp_path, spec=spec)
    folder = _export(project, tmp_path / "encoder", str(source))
    shutil.rmtree(source)  # the folder stands for itself
    encoder = load_encoder(folder)
    frames = np.random.default_rng(0).integers(0, 256, (2, 4, 32, 32, 3), dtype=np.uint8)
    plain = Autoencoder.load(folder / "autoencoder")
    latents = torch.stack([torch.from_numpy(plain.encode(clip).latents) for clip in frames])
    torch.testing.assert_close(encoder(torch.from_numpy(frames)), encoder(latents), rtol=1e-3, atol=1e-4)
    with pytest.raises(RefusedError, match="resize them to 32 x 32"):
        encoder(torch.zeros(1, 4, 64, 64, 3, dtype=torch.uint8))


def test_another_autoencoder_is_not_carried_and_frames_are_refused(project: Project, tmp_path: Path) -> None:
    folder = _export(project, tmp_path / "encoder", str(_tiny_autoencoder(tmp_path / "other")))
    assert not (folder / "autoencoder").exists()
    with pytest.raises(RefusedError, match="has no autoencoder"):
        load_encoder(folder)(torch.zeros(1, 4, 32, 32, 3, dtype=torch.uint8))


def test_config_says_where_it_comes_from(project: Project, tmp_path: Path) -> None:
    config = json.loads((_export(project, tmp_path / "encoder") / "config.json").read_text())
    trainset = Trainset.open(project.root)
    assert (config["run"], config["trainset"]) == (_run(project).id, trainset.digest)
    assert config["encoding"] == trainset.spec.to_json()


def test_what_cannot_be_opened_says_why(project: Project, tmp_path: Path) -> None:
    with pytest.raises(UpstreamError, match="no exported encoder"):
        load_encoder(tmp_path)
    folder = _export(project, tmp_path / "encoder")
    config = folder / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"format": 1', '"format": 2'))
    with pytest.raises(ConfigError, match="format 2"):
        load_encoder(folder)
    config.write_text(text.replace('"depth"', '"dept"', 1))
    with pytest.raises(ConfigError, match="did you mean 'depth'"):
        load_encoder(folder)
    for key in ("model", "autoencoder", "encoding", "resolution", "precision"):
        said = json.loads(text)
        del (said if key in said else said["encoding"])[key]
        config.write_text(json.dumps(said))
        with pytest.raises(ConfigError, match=f"'{key}' is missing: export the run again"):
            load_encoder(folder)
    for elsewhere in ("../autoencoder", "/etc", "."):
        config.write_text(json.dumps(json.loads(text) | {"autoencoder": elsewhere}))
        with pytest.raises(ConfigError, match="the autoencoder must be in 'autoencoder'"):
            load_encoder(folder)
    config.write_text(text)
    (folder / "model.safetensors").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(DamagedError):
        load_encoder(folder)


def test_importing_the_package_costs_no_torch_until_an_encoder_is_asked_for() -> None:
    code = "import sys, nextvid; assert 'torch' not in sys.modules; nextvid.load_encoder; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'load_decoder'"):
        nextvid.load_decoder  # noqa: B018


def test_a_copy_is_the_same_encoder_and_never_half_there(project: Project, tmp_path: Path) -> None:
    folder, out = _export(project, tmp_path / "encoder"), tmp_path / "shared" / "copy"
    copy_encoder(folder, out)
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in folder.iterdir())
    latents = torch.randn(1, 4, CHANNELS, GRID, GRID)
    torch.testing.assert_close(load_encoder(out)(latents), load_encoder(folder)(latents), rtol=0, atol=0)
    with pytest.raises(ConflictError, match="exists already"):
        copy_encoder(folder, out)
    with pytest.raises(UpstreamError, match="no exported encoder yet"):
        copy_encoder(tmp_path / "nothing", tmp_path / "other")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(DamagedError):
        copy_encoder(folder, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    assert not list(tmp_path.glob(".*"))
