"""Other forms of one encoder give its features: tubelet by tubelet, as a graph of torch.export, as ONNX."""

from pathlib import Path

import numpy as np
import pytest
import torch

from nextvid.config.project import Project
from nextvid.features.encoder import NExTVidEncoder, load_encoder
from nextvid.features.onnx import ONNX
from nextvid.model.encoder import Encoder
from nextvid.model.incremental import IncrementalEncoder
from nextvid.train.run import find_run
from storage.errors import ConfigError, RefusedError
from tests.nextvid.conftest import Command
from tests.nextvid.features.exported import export, export_of_pixels, export_with_autoencoder
from tests.nextvid.tiny_project import RECIPE
from tests.nextvid.train.corpus import make_project
from tests.nextvid.train.tiny import tiny_recipe


@pytest.fixture(scope="module")
def of_pixels(tmp_path_factory: pytest.TempPathFactory) -> NExTVidEncoder:
    return load_encoder(export_of_pixels(tmp_path_factory.mktemp("pixels")))


def clips(count: int, frames: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, frames, 32, 32, 3), dtype=torch.uint8, generator=generator)


class TestStream:
    def test_tubelet_by_tubelet_is_the_whole_clip_to_double_precision(self) -> None:
        torch.manual_seed(0)
        encoder = Encoder(tiny_recipe().model).double().eval()
        tokens = torch.randn(2, 4 * 16, 8, dtype=torch.float64)
        with torch.no_grad():
            wanted = encoder(tokens, 4)
        stream = IncrementalEncoder(encoder)
        found = torch.cat([stream.encode(one)[0] for one in tokens.split(16, dim=1)], dim=1)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)  # rotary tables are fp32

    def test_frames_in_pieces_of_any_size(self, of_pixels: NExTVidEncoder) -> None:
        frames = clips(2, frames=8)
        stream = of_pixels.stream()
        found = torch.cat([stream.push(piece) for piece in frames.split([2, 4, 2], dim=1)], dim=1)
        torch.testing.assert_close(found, of_pixels(frames), rtol=1e-4, atol=1e-5)
        with pytest.raises(RefusedError, match="whole tubelets of 2"):
            stream.push(frames[:, :1])

    def test_frames_through_an_autoencoder(self, tmp_path: Path) -> None:
        encoder = load_encoder(export_with_autoencoder(tmp_path))
        frames, stream = clips(1), encoder.stream()
        found = torch.cat([stream.push(frames[:, :2]), stream.push(frames[:, 2:])], dim=1)
        torch.testing.assert_close(found, encoder(frames), rtol=1e-3, atol=1e-4)


class TestProgram:
    def test_pixels_and_any_number_of_clips(self, of_pixels: NExTVidEncoder) -> None:
        program = of_pixels.program().module()
        for count in (1, 3):
            torch.testing.assert_close(program(clips(count)), of_pixels(clips(count)), rtol=1e-4, atol=1e-5)

    def test_raw_latents(self, tmp_path: Path) -> None:
        encoder = load_encoder(export(make_project(tmp_path), tmp_path / "encoder"))
        latents = torch.randn(3, 6, 4, 4, 4)
        torch.testing.assert_close(encoder.program(6).module()(latents), encoder(latents), rtol=1e-4, atol=1e-5)
        encoder.clip = None
        with pytest.raises(ConfigError, match="give frames"):
            encoder.program()


@pytest.mark.slow
def test_onnx_of_a_run(own_copy: Project, nextvid: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example of `nextvid export --help`, and 1e-4 in onnxruntime."""
    import onnxruntime

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NEXTVID_CORPUS", str(own_copy.path))
    words = nextvid("export", "--help")[1].splitlines()[-1].replace("RUN", find_run(own_copy, RECIPE).id).split()
    assert words[0] == "nextvid"
    code, _, said = nextvid(*words[1:])
    assert code == 0, said
    encoder = load_encoder("encoder")
    session = onnxruntime.InferenceSession(str(Path("encoder", ONNX)), providers=["CPUExecutionProvider"])
    (taken,) = session.get_inputs()
    for count in (1, 3):
        latents = torch.randn(count, *taken.shape[1:])
        (found,) = session.run(["features"], {"clips": latents.numpy()})
        np.testing.assert_allclose(found, encoder(latents).numpy(), rtol=1e-4, atol=1e-4)
