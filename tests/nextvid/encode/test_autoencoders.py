"""Autoencoders: exact shapes and values of every family, identity that follows content alone, refusals."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nextvid.encode.autoencoders import Autoencoder
from nextvid.encode.weights import autoencoder_digest, latent_shape
from storage.errors import ConfigError
from tests.nextvid.encode.conftest import KEPT, PATCH, SCALE, cosine_basis

Frames = np.ndarray


def _frames(n: int = 5, side: int = 32, seed: int = 0) -> Frames:
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


def _smooth(n: int = 3, side: int = 32) -> Frames:
    y, x = np.mgrid[:side, :side] / side
    waves = [np.sin(2 * np.pi * (x + 0.3 * i)) * np.cos(2 * np.pi * (y - 0.2 * i)) for i in range(n)]
    return np.stack([np.stack([127 + 90 * w, 100 + 60 * w, 140 - 80 * w], -1) for w in waves]).round().astype(np.uint8)


class TestEncode:
    def test_cosine_latents_are_the_cosine_coefficients(self, cosine_autoencoder: Path) -> None:
        frames = _frames(2)
        encoded = Autoencoder.load(cosine_autoencoder).encode(frames)
        patches = frames.reshape(2, 4, PATCH, 4, PATCH, 3).transpose(0, 5, 2, 4, 1, 3).reshape(2, 192, 4, 4)
        wanted = SCALE * np.einsum("kp,npyx->nkyx", cosine_basis(), patches / 255 - 0.5)
        np.testing.assert_allclose(encoded.latents, wanted, atol=1e-6)
        assert encoded.posterior_std is None

    def test_decode_inverts_what_the_transform_keeps(self, cosine_autoencoder: Path) -> None:
        model = Autoencoder.load(cosine_autoencoder)
        frames = _smooth()
        again = model.decode(model.encode(frames).latents)
        assert again.dtype == np.uint8
        assert np.abs(again.astype(int) - frames).max() <= 2

    def test_trap_18_posterior_mean_and_width_are_diffusers_own(self, random_autoencoder: Path) -> None:
        from diffusers import AutoencoderKL

        frames = _frames()
        encoded = Autoencoder.load(random_autoencoder).encode(frames)
        model = AutoencoderKL.from_pretrained(random_autoencoder)
        pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.no_grad():
            posterior = model.encode(torch.nn.functional.pixel_unshuffle(pixels, 4)).latent_dist
        np.testing.assert_allclose(encoded.latents, posterior.mode().numpy(), atol=2e-5)
        assert encoded.posterior_std is not None
        np.testing.assert_allclose(encoded.posterior_std, posterior.std.mean((1, 2, 3)).numpy(), rtol=1e-4)

    def test_noise_scales_with_the_posterior_width(self, random_autoencoder: Path) -> None:
        model = Autoencoder.load(random_autoencoder)
        frames = _frames(3)
        mean = model.encode(frames).latents
        noise = np.random.default_rng(1).standard_normal(mean.shape).astype(np.float32)
        up = model.encode(frames, noise).latents - mean
        down = model.encode(frames, -noise).latents - mean
        np.testing.assert_allclose(up, -down, atol=1e-5)
        assert (np.sign(up) == np.sign(noise)).mean() > 0.999

    def test_noise_without_posterior_is_refused(self, cosine_autoencoder: Path) -> None:
        model = Autoencoder.load(cosine_autoencoder)
        with pytest.raises(ConfigError, match="posterior"):
            model.encode(_frames(1), np.zeros((1, 3 * KEPT**2, 4, 4), np.float32))

    def test_equal_input_gives_equal_bits_and_pieces_change_little(self, random_autoencoder: Path) -> None:
        frames = _frames(7)
        small = Autoencoder.load(random_autoencoder, frames_at_once=3)
        np.testing.assert_array_equal(small.encode(frames).latents, small.encode(frames).latents)
        whole = Autoencoder.load(random_autoencoder).encode(frames).latents
        np.testing.assert_allclose(small.encode(frames).latents, whole, atol=1e-5)

    def test_bf16_is_near_fp32(self, random_autoencoder: Path) -> None:
        frames = _frames()
        exact = Autoencoder.load(random_autoencoder).encode(frames).latents
        fast = Autoencoder.load(random_autoencoder, precision="bf16").encode(frames).latents
        assert fast.dtype == np.float32
        assert 0 < np.sqrt(((fast - exact) ** 2).mean()) < 0.05 * exact.std()  # research vae 7: 0.3 to 2.3 %

    def test_side_that_is_no_multiple_is_refused(self, cosine_autoencoder: Path) -> None:
        with pytest.raises(ConfigError, match="multiple"):
            Autoencoder.load(cosine_autoencoder).encode(_frames(1, side=36))


def _families() -> dict[str, Any]:
    from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLFlux2, AutoencoderTiny

    return {
        "flux": AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 8),
            layers_per_block=1,
            latent_channels=16,
            norm_num_groups=4,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        "flux2": AutoencoderKLFlux2(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4),
        "vavae": AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4 + ("AttnDownEncoderBlock2D",),
            up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 16, 16, 16),
            layers_per_block=2,
            latent_channels=32,
            norm_num_groups=4,
        ),
        "tiny": AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4),
        "dc": AutoencoderDC(
            latent_channels=4,
            attention_head_dim=4,
            encoder_block_out_channels=(8, 8, 16),
            decoder_block_out_channels=(8, 8, 16),
            encoder_layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            encoder_qkv_multiscales=((), (), ()),
            decoder_qkv_multiscales=((), (), ()),
        ),
    }


@pytest.mark.parametrize(
    ("family", "channels", "stride", "posterior"),
    [
        ("flux", 16, 4, True),
        ("flux2", 32, 8, True),
        ("vavae", 32, 16, True),
        ("tiny", 4, 8, False),
        ("dc", 4, 4, False),
    ],
)
def test_every_family_gives_the_shape_its_config_promises(
    tmp_path: Path, family: str, channels: int, stride: int, posterior: bool
) -> None:
    torch.manual_seed(0)
    _families()[family].save_pretrained(tmp_path)
    assert latent_shape(tmp_path) == (channels, stride)
    model = Autoencoder.load(tmp_path)
    encoded = model.encode(_frames(2, side=64))
    assert encoded.latents.shape == (2, channels, 64 // stride, 64 // stride)
    assert (encoded.posterior_std is not None) == posterior
    assert model.decode(encoded.latents).shape == (2, 64, 64, 3)


class TestDigest:
    def test_follows_content_not_path_or_version(self, random_autoencoder: Path, tmp_path: Path) -> None:
        copy = tmp_path / "copy"
        shutil.copytree(random_autoencoder, copy)
        config = json.loads((copy / "config.json").read_text())
        config |= {"_diffusers_version": "99", "_name_or_path": "elsewhere"}
        (copy / "config.json").write_text(json.dumps(dict(reversed(config.items()))))
        assert autoencoder_digest(copy) == autoencoder_digest(random_autoencoder)

    @pytest.mark.parametrize("change", ["weights", "config", "patch"])
    def test_changes_with_what_is_computed(self, random_autoencoder: Path, tmp_path: Path, change: str) -> None:
        copy = tmp_path / "copy"
        shutil.copytree(random_autoencoder, copy)
        match change:
            case "weights":
                file = copy / "diffusion_pytorch_model.safetensors"
                data = bytearray(file.read_bytes())
                data[-1] ^= 1
                file.write_bytes(data)
            case "config":
                config = json.loads((copy / "config.json").read_text())
                (copy / "config.json").write_text(json.dumps(config | {"norm_num_groups": 8}))
            case "patch":
                (copy / "nextvid.json").write_text(json.dumps({"patch": 2}))
        assert autoencoder_digest(copy) != autoencoder_digest(random_autoencoder)

    def test_model_carries_the_digest_of_its_folder(self, random_autoencoder: Path) -> None:
        assert Autoencoder.load(random_autoencoder).digest == autoencoder_digest(random_autoencoder)

    def test_needs_no_torch(self, random_autoencoder: Path) -> None:
        code = (
            "import sys; from nextvid.encode.weights import autoencoder_digest as d; "
            f"print(d({str(random_autoencoder)!r})); assert 'torch' not in sys.modules"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == autoencoder_digest(random_autoencoder)


class TestRefusals:
    def test_fp16_on_cpu(self, random_autoencoder: Path) -> None:
        with pytest.raises(ConfigError, match="fp16 on CPU"):
            Autoencoder.load(random_autoencoder, "cpu", "fp16")

    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="no folder of a diffusers"):
            autoencoder_digest(tmp_path)

    def test_unknown_class(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKLCosmos"}))
        with pytest.raises(ConfigError, match="AutoencoderKLCosmos is not supported"):
            latent_shape(tmp_path)

    def test_pickled_weights(self, random_autoencoder: Path, tmp_path: Path) -> None:
        shutil.copy(random_autoencoder / "config.json", tmp_path)
        torch.save({}, tmp_path / "diffusion_pytorch_model.bin")
        with pytest.raises(ConfigError, match="never from a pickle"):
            Autoencoder.load(tmp_path)

    def test_trap_18_a_missing_tensor(self, random_autoencoder: Path, tmp_path: Path) -> None:
        """Loaders that are not strict leave such a tensor at random."""
        shutil.copytree(random_autoencoder, tmp_path, dirs_exist_ok=True)
        file = tmp_path / "diffusion_pytorch_model.safetensors"
        held = load_file(file)
        del held["decoder.conv_out.weight"]
        save_file(held, file)
        with pytest.raises(ConfigError, match=r"1 tensors missing .*decoder\.conv_out\.weight"):
            Autoencoder.load(tmp_path)

    def test_wrapper_of_another_kind(self, random_autoencoder: Path, tmp_path: Path) -> None:
        shutil.copytree(random_autoencoder, tmp_path, dirs_exist_ok=True)
        (tmp_path / "nextvid.json").write_text(json.dumps({"kind": "autoencoder_dc", "patch": 4}))
        with pytest.raises(ConfigError, match="do not fit"):
            latent_shape(tmp_path)

    def test_truncated_weights(self, random_autoencoder: Path, tmp_path: Path) -> None:
        shutil.copytree(random_autoencoder, tmp_path, dirs_exist_ok=True)
        file = tmp_path / "diffusion_pytorch_model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(ConfigError, match="cannot load"):
            Autoencoder.load(tmp_path)
