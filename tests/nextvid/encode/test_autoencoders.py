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
from nextvid.encode.weights import autoencoder_digest, facts
from storage.errors import ConfigError
from storage.spec import frames_shown, latent_frames, latent_of_frames
from tests.factories import flip
from tests.nextvid.encode.conftest import KEPT, PATCH, SCALE, cosine_basis, random_cosmos

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
        assert 0 < np.sqrt(((fast - exact) ** 2).mean()) < 0.05 * exact.std()  # measured: 0.3 to 2.3 %

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
    about = facts(tmp_path)
    assert (about.channels, about.stride, about.posterior) == (channels, stride, posterior)
    model = Autoencoder.load(tmp_path)
    encoded = model.encode(_frames(2, side=64))
    assert encoded.latents.shape == (2, channels, 64 // stride, 64 // stride)
    assert (encoded.posterior_std is not None) == posterior
    assert model.decode(encoded.latents).shape == (2, 64, 64, 3)


class TestCosmos:
    """Encoders over time: a causal group of frames is one latent frame."""

    @pytest.mark.parametrize(("over_time", "frames", "latents"), [(8, 16, 3), (8, 1, 1), (4, 16, 5), (4, 17, 5)])
    def test_latent_frames_are_those_that_the_time_map_says(
        self, tmp_path: Path, over_time: int, frames: int, latents: int
    ) -> None:
        model = Autoencoder.load(random_cosmos(tmp_path, over_time))
        assert model.about.time_map == f"causal{over_time}"
        clips = [_smooth(frames, 64), _frames(frames, 64)]
        encoded = model.start(clips).result()
        assert encoded.latents.shape == (2, latents, 4, 8, 8)
        assert encoded.latents.shape[1] == model.about.latent_frames(frames)
        assert encoded.posterior_std is None
        assert model.decode(encoded.latents[0], frames).shape == clips[0].shape

    @pytest.mark.parametrize("over_time", [4, 8])
    def test_a_frame_changes_its_latent_and_later_ones_only(self, tmp_path: Path, over_time: int) -> None:
        """What latent_of_frames says is what the encoder does."""
        model = Autoencoder.load(random_cosmos(tmp_path, over_time))
        clip = _frames(17, 64)
        before = model.encode(clip).latents
        covering = latent_of_frames(f"causal{over_time}", 17)
        for frame in (0, 1, 4, 5, 8, 9, 16):
            other = clip.copy()
            other[frame] = 255 - other[frame]
            moved = np.abs(model.encode(other).latents - before).max(axis=(1, 2, 3)) > 1e-6
            assert np.flatnonzero(moved)[0] == covering[frame], frame

    def test_short_clips_are_filled_up_with_their_last_frame(self, tmp_path: Path) -> None:
        model = Autoencoder.load(random_cosmos(tmp_path, 8))
        clip = _frames(16, 64)
        filled = np.concatenate([clip, clip[-1:]])
        np.testing.assert_array_equal(model.encode(clip).latents, model.encode(filled).latents)

    def test_clips_are_never_cut_and_each_stands_alone(self, tmp_path: Path) -> None:
        folder = random_cosmos(tmp_path, 8)
        few, many = Autoencoder.load(folder, frames_at_once=4), Autoencoder.load(folder, frames_at_once=64)
        clips = [_frames(9, 64, seed) for seed in range(3)]
        one, other = few.start(clips).result().latents, many.start(clips).result().latents
        np.testing.assert_allclose(one, other, atol=1e-5)
        np.testing.assert_allclose(one[2], few.encode(clips[2]).latents, atol=1e-5)

    def test_memory_for_less_than_a_clip_is_one_clear_error(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: object) -> None:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

        model = Autoencoder.load(random_cosmos(tmp_path, 8))
        monkeypatch.setattr("nextvid.encode.autoencoders.posterior", full)
        with pytest.raises(ConfigError, match="16 frames do not fit"):
            model.encode(_frames(16, 64))


@pytest.mark.parametrize("frames", range(1, 40))
def test_time_maps_agree_with_each_other(frames: int) -> None:
    for name, each in (("frame", 1), ("causal4", 4), ("causal8", 8)):
        covering = latent_of_frames(name, frames)
        assert latent_frames(name, frames) == max(covering) + 1
        assert frames_shown(name, max(covering) + 1) >= frames
        assert frames_shown(name, max(covering) + 1) < frames + each
        assert all(covering.count(latent) <= each for latent in set(covering))
        assert covering.count(0) == 1


class TestSiglip:
    def test_features_are_the_last_patch_features_on_their_grid(self, siglip: Path) -> None:
        from transformers import SiglipVisionModel

        frames = _frames(3, 64)
        encoded = Autoencoder.load(siglip).encode(frames)
        assert encoded.latents.shape == (3, 32, 4, 4)
        pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1  # mean and deviation .5 of [0, 1]
        with torch.no_grad():
            features = SiglipVisionModel.from_pretrained(siglip)(pixel_values=pixels).last_hidden_state
        for row in range(4):
            for column in range(4):
                wanted = features[:, 4 * row + column].numpy()
                np.testing.assert_allclose(encoded.latents[:, :, row, column], wanted, atol=1e-4)

    def test_facts_come_from_the_image_half_of_a_whole_checkpoint(self, siglip: Path, tmp_path: Path) -> None:
        shutil.copytree(siglip, tmp_path, dirs_exist_ok=True)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip", "vision_config": config}))
        assert facts(tmp_path) == facts(siglip)
        assert facts(siglip)[:4] == ("siglip", 32, 16, 1)
        assert not facts(siglip).decoder

    def test_there_are_no_pictures_and_no_other_side(self, siglip: Path) -> None:
        model = Autoencoder.load(siglip)
        with pytest.raises(ConfigError, match="no decoder"):
            model.decode(np.zeros((1, 32, 4, 4), np.float32))
        with pytest.raises(ConfigError, match="takes 64 only"):
            model.encode(_frames(1, 32))

    def test_a_missing_tensor_is_refused(self, siglip: Path, tmp_path: Path) -> None:
        shutil.copytree(siglip, tmp_path, dirs_exist_ok=True)
        held = load_file(tmp_path / "model.safetensors")
        held.pop(next(name for name in held if "fc1.weight" in name))
        save_file(held, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(ConfigError, match="1 tensors missing"):
            Autoencoder.load(tmp_path)

    def test_without_transformers_the_remedy_is_named(self, siglip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "transformers", None)
        with pytest.raises(ConfigError, match=r"nextvid\[targets\]"):
            Autoencoder.load(siglip)

    def test_nothing_else_needs_transformers(self, random_autoencoder: Path) -> None:
        code = (
            "import sys; sys.modules['transformers'] = None; from nextvid.encode.autoencoders import Autoencoder; "
            f"Autoencoder.load({str(random_autoencoder)!r})"
        )
        subprocess.run([sys.executable, "-c", code], check=True)


class TestPixels:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        (tmp_path / "nextvid.json").write_text(json.dumps({"kind": "pixels", "patch": 16}))
        return tmp_path

    def test_every_byte_comes_back_from_float16(self, folder: Path) -> None:
        model, frames = Autoencoder.load(folder), _frames(2, 32)
        encoded = model.encode(frames)
        assert encoded.latents.shape == (2, 3 * 16 * 16, 2, 2)
        assert facts(folder)[1:3] == (768, 16)
        np.testing.assert_array_equal(model.decode(encoded.latents.astype(np.float16).astype(np.float32)), frames)

    def test_digest_is_of_the_patch_alone(self, folder: Path) -> None:
        before = autoencoder_digest(folder)
        (folder / "nextvid.json").write_text(json.dumps({"patch": 16, "kind": "pixels"}))
        assert autoencoder_digest(folder) == before
        (folder / "nextvid.json").write_text(json.dumps({"kind": "pixels", "patch": 8}))
        assert autoencoder_digest(folder) != before


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
                flip(file)
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
    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="no folder of a diffusers"):
            autoencoder_digest(tmp_path)

    def test_unknown_class(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKLWan"}))
        with pytest.raises(ConfigError, match="AutoencoderKLWan is not supported"):
            facts(tmp_path)

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
            facts(tmp_path)

    def test_truncated_weights(self, random_autoencoder: Path, tmp_path: Path) -> None:
        shutil.copytree(random_autoencoder, tmp_path, dirs_exist_ok=True)
        file = tmp_path / "diffusion_pytorch_model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(ConfigError, match="cannot load"):
            Autoencoder.load(tmp_path)
