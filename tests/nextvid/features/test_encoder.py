"""An exported encoder needs nothing but its folder: latents, frames, arrays and files in, features out."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import nextvid
from nextvid.config.project import Project
from nextvid.encode.autoencoders import Autoencoder
from nextvid.encode.decode_task import CropBox, cropped
from nextvid.features.encoder import NExTVidEncoder, copy_encoder, load_encoder
from nextvid.model.tokens import latent_tokens
from nextvid.train.step import build_model
from nextvid.trainset.trainset import Trainset
from storage.errors import ConfigError, ConflictError, DamagedError, MediaError, RefusedError, UpstreamError
from tests.factories import flip
from tests.nextvid.corpus.small_media import write_picture
from tests.nextvid.features.exported import (
    export,
    export_of_pixels,
    export_with_autoencoder,
    tiny_autoencoder,
    tiny_run,
)
from tests.nextvid.train.corpus import MEAN, STD, make_project
from tests.nextvid.train.tiny import CHANNELS, GRID, tiny_recipe
from tests.nextvid.video.film import X264_FAST, barcode, frames_at, write_film


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return make_project(tmp_path)


def test_it_normalises_by_itself(project: Project, tmp_path: Path) -> None:
    encoder = nextvid.load_encoder(export(project, tmp_path / "encoder"))
    raw = torch.randn(3, 8, CHANNELS, GRID, GRID, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.from_numpy(values)[:, None, None] for values in (MEAN, STD))
    torch.manual_seed(0)
    model = build_model(tiny_recipe())
    with torch.no_grad():
        wanted = model.encoder(latent_tokens((raw - mean) / std, 2), 4)
    torch.testing.assert_close(encoder(raw), wanted)
    torch.testing.assert_close(encoder(raw.half()), wanted, rtol=0.05, atol=0.05)
    assert encoder(raw).shape == (3, 4 * GRID * GRID, 24)


def test_frames_go_through_the_autoencoder_that_made_the_latents(tmp_path: Path) -> None:
    folder = export_with_autoencoder(tmp_path)
    shutil.rmtree(tmp_path / "autoencoder")  # the folder needs nothing else
    encoder = load_encoder(folder)
    frames = np.random.default_rng(0).integers(0, 256, (2, 4, 32, 32, 3), dtype=np.uint8)
    plain = Autoencoder.load(folder / "autoencoder")
    latents = torch.stack([torch.from_numpy(plain.encode(clip).latents) for clip in frames])
    torch.testing.assert_close(encoder(torch.from_numpy(frames)), encoder(latents), rtol=1e-3, atol=1e-4)


def test_another_autoencoder_is_not_carried_and_frames_are_refused(project: Project, tmp_path: Path) -> None:
    folder = export(project, tmp_path / "encoder", tiny_autoencoder(tmp_path / "other"))
    assert not (folder / "autoencoder").exists()
    with pytest.raises(RefusedError, match="has no autoencoder"):
        load_encoder(folder)(torch.zeros(1, 4, 32, 32, 3, dtype=torch.uint8))


def test_config_says_where_it_comes_from(project: Project, tmp_path: Path) -> None:
    config = json.loads((export(project, tmp_path / "encoder") / "config.json").read_text())
    trainset = Trainset.open(project.root)
    assert (config["run"], config["trainset"]) == (tiny_run(project).id, trainset.digest)
    assert config["encoding"] == trainset.spec.to_json()


def before_sums(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json as release 0.1.0 wrote it."""
    return {name: value for name, value in config.items() if name not in ("seal", "files")}


def test_whatever_byte_of_the_folder_changed_nothing_is_computed(tmp_path: Path) -> None:
    folder = export_with_autoencoder(tmp_path)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert len(files) == 4
    for path in files:
        data = path.read_bytes()
        for at in (0, len(data) // 2, len(data) - 2):
            flip(path, at)
            with pytest.raises((DamagedError, ConfigError), match=re.escape(path.name)):
                load_encoder(folder)
            path.write_bytes(data)
        path.write_bytes(data[: len(data) // 2])
        with pytest.raises((DamagedError, ConfigError), match=re.escape(path.name)):
            load_encoder(folder)
        path.unlink()
        with pytest.raises((DamagedError, UpstreamError), match=re.escape(path.name)):
            load_encoder(folder)
        path.write_bytes(data)
    load_encoder(folder)
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    weights = load_file(other / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, other / "model.safetensors")
    with pytest.raises(DamagedError, match="differ from their checksum"):
        copy_encoder(other, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_an_encoder_exported_without_sums_is_read_with_a_line(tmp_path: Path, caplog: Any) -> None:
    folder = export_with_autoencoder(tmp_path)
    path = folder / "config.json"
    path.write_text(json.dumps(before_sums(json.loads(path.read_text()))))
    load_encoder(folder)
    assert "without checksums" in caplog.text
    again = tmp_path / "again"
    load_encoder(folder).save_pretrained(again)
    assert set(json.loads((again / "config.json").read_text())["files"]) == {
        "model.safetensors", "autoencoder/config.json", "autoencoder/diffusion_pytorch_model.safetensors",
    }  # fmt: skip
    flip(folder / "autoencoder" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(DamagedError, match="did not make the latents"):
        load_encoder(folder)


def test_what_cannot_be_opened_says_why(project: Project, tmp_path: Path) -> None:
    with pytest.raises(UpstreamError, match="no exported encoder"):
        load_encoder(tmp_path)
    folder = export(project, tmp_path / "encoder")
    config = folder / "config.json"
    text = json.dumps(before_sums(json.loads(config.read_text())))  # whose fields may be edited
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
    folder, out = export(project, tmp_path / "encoder"), tmp_path / "shared" / "copy"
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


@pytest.fixture(scope="module")
def of_pixels(tmp_path_factory: pytest.TempPathFactory) -> NExTVidEncoder:
    return load_encoder(export_of_pixels(tmp_path_factory.mktemp("pixels")))


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seconds of numbered frames of 96 x 64 pixels at 8 a second."""
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    write_film(path, [barcode(n) for n in range(16)], fps=8, options=X264_FAST)
    return path


def middle(frames: np.ndarray) -> np.ndarray:
    """The square in the middle of frames of 96 x 64 pixels, resized as the pipeline does."""
    return cropped(frames, CropBox(16, 0, 64, 64), flip=False, resolution=32)


class TestClips:
    def test_what_the_encoder_is(self, of_pixels: NExTVidEncoder) -> None:
        assert (of_pixels.layers, of_pixels.grid, of_pixels.frames, of_pixels.resolution) == (2, (4, 4), 4, 32)

    def test_a_video_gives_the_clip_in_its_middle_as_it_was_trained(
        self, of_pixels: NExTVidEncoder, film: Path
    ) -> None:
        found = of_pixels.clips(film)
        wanted, _ = frames_at(film, [500_000 + 250_000 * n for n in range(4)], "pyav")
        np.testing.assert_array_equal(found.numpy(), middle(wanted)[None])
        assert of_pixels(found).shape == (1, 2 * 16, 24)

    def test_sliding_windows_other_rates_and_strides(self, of_pixels: NExTVidEncoder, film: Path) -> None:
        found = of_pixels.clips(str(film), frames=2, stride=4, every_s=0.5)
        first, _ = frames_at(film, [0, 500_000], "pyav")
        last, _ = frames_at(film, [1_000_000, 1_500_000], "pyav")
        assert len(found) == 3
        np.testing.assert_array_equal(found[0].numpy(), middle(first))
        np.testing.assert_array_equal(found[-1].numpy(), middle(last))

    def test_an_image_is_repeated(self, of_pixels: NExTVidEncoder, tmp_path: Path) -> None:
        write_picture(tmp_path / "one.jpg", "one")
        found = of_pixels.clips(tmp_path / "one.jpg")
        assert found.shape == (1, 4, 32, 32, 3)
        assert torch.equal(found[0, 0], found[0, 3])

    def test_arrays_are_cropped_and_resized(self, of_pixels: NExTVidEncoder) -> None:
        frames = np.random.default_rng(0).integers(0, 256, (4, 64, 96, 3), dtype=np.uint8)
        found = of_pixels.clips(frames)
        np.testing.assert_array_equal(found.numpy(), middle(frames)[None])
        assert torch.equal(of_pixels.clips(found), found)
        torch.testing.assert_close(of_pixels(torch.from_numpy(frames)[None]), of_pixels(found), rtol=0, atol=0)

    def test_layers(self, of_pixels: NExTVidEncoder) -> None:
        clips = torch.zeros(1, 4, 32, 32, 3, dtype=torch.uint8)
        torch.testing.assert_close(of_pixels(clips, layer=1), of_pixels(clips), rtol=0, atol=0)
        assert not torch.allclose(of_pixels(clips, layer=0), of_pixels(clips))
        torch.testing.assert_close(of_pixels(clips, layer=-2), of_pixels(clips, layer=0), rtol=0, atol=0)

    def test_what_is_wrong_is_one_line(self, of_pixels: NExTVidEncoder, film: Path, tmp_path: Path) -> None:
        write_picture(tmp_path / "one.jpg", "one")
        (tmp_path / "bad.mp4").write_bytes(b"no video")
        for source, options, reason in (
            (film, {"frames": 8, "fps": 2.0}, "too_short"),
            (tmp_path / "one.jpg", {"stride": 2}, "no_rate"),
            (tmp_path / "bad.mp4", {}, "unknown_format"),
            (tmp_path / "gone.mp4", {}, "missing"),
        ):
            with pytest.raises(MediaError) as raised:
                of_pixels.clips(source, **options)
            assert raised.value.reason == reason
            assert "\n" not in str(raised.value)
            assert str(source) in str(raised.value)
        array = np.zeros((4, 64, 64, 3), np.uint8)
        with pytest.raises(ConfigError, match="give one of them"):
            of_pixels.clips(film, fps=2, stride=2)
        with pytest.raises(ConfigError, match="must be above 0"):
            of_pixels.clips(film, every_s=0)
        with pytest.raises(ConfigError, match="an array is taken whole"):
            of_pixels.clips(array, fps=2)
        with pytest.raises(RefusedError, match="give RGB bytes"):
            of_pixels.clips(array.astype(np.float32))
        for refuse in (lambda: of_pixels.clips(array, resize=False), lambda: of_pixels.clips(film, resize=False)):
            with pytest.raises(RefusedError, match="resize them to 32 x 32"):
                refuse()
        with pytest.raises(RefusedError, match="resize them to 32 x 32"):
            of_pixels(torch.from_numpy(array)[None], resize=False)
        with pytest.raises(RefusedError, match="whole tubelets of 2"):
            of_pixels(torch.zeros(1, 3, 32, 32, 3, dtype=torch.uint8))
        with pytest.raises(RefusedError, match="layers 0 to 1"):
            of_pixels(torch.zeros(1, 4, 32, 32, 3, dtype=torch.uint8), layer=2)

    def test_an_export_of_an_earlier_version_needs_to_be_told(self, film: Path, tmp_path: Path) -> None:
        folder = export_of_pixels(tmp_path)
        config = before_sums(json.loads((folder / "config.json").read_text()))
        del config["clip"]
        (folder / "config.json").write_text(json.dumps(config))
        encoder = load_encoder(folder)
        assert encoder.frames is None
        with pytest.raises(ConfigError, match="give frames, and fps or stride"):
            encoder.clips(film)
        assert len(encoder.clips(film, frames=4, fps=4)) == 1
