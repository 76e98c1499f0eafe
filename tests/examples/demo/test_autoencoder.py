"""The shipped autoencoder: small, honest about itself, sharp on held-out frames, white."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from examples.demo import files, plan, reconstruction
from examples.demo.scenes import Frames
from examples.demo.whitening import moments
from nextvid.encode.autoencoders import Autoencoder

FOLDER = Path(reconstruction.__file__).parent / "autoencoder"


@pytest.fixture(scope="module")
def held_out(corpus: Path) -> Frames:
    """Decoded frames of test digits, from the demo's own seed, which the training never saw."""
    videos = [video for video in plan.plan_videos(0, 12) if video.split == "test"]
    return np.concatenate([files.read_video(corpus / "videos" / f"{v.name}.{v.ending}")[4::11] for v in videos])


@pytest.fixture(scope="module")
def model() -> AutoencoderKL:
    return reconstruction.load(FOLDER)


def test_weights_are_small_safetensors_in_half_precision() -> None:
    weights = FOLDER / "diffusion_pytorch_model.safetensors"
    assert weights.stat().st_size < 3_000_000
    assert {path.suffix for path in FOLDER.iterdir()} == {".json", ".safetensors"}


def test_held_out_frames_come_back_at_32_db(model: AutoencoderKL, held_out: Frames) -> None:
    assert reconstruction.psnr_db(held_out, reconstruction.reconstruct(model, held_out)).mean() >= 32


def test_provenance_says_what_it_is_and_is_not(model: AutoencoderKL) -> None:
    told = json.loads((FOLDER / "provenance.json").read_text())
    assert "not VA-VAE" in told["note"]
    assert told["held_out_demo_frames"]["mean_psnr_db"] >= 32
    assert told["held_out_demo_frames"]["frames"] == 256
    assert told["real_photos"]["frames"] > 1000
    assert told["real_photos"]["set"] == "clothing10"
    assert told["data"]["generator_version"] == plan.VERSION
    assert told["parameters"] == sum(p.numel() for p in model.parameters())
    assert (
        abs(told["before_whitening"]["mean_psnr_db"] - told["held_out_demo_frames"]["mean_psnr_db"]) < 0.05
    )  # fp16 weights
    assert {"seed", "steps", "date", "training_seconds"} <= set(told)


def test_latents_are_white(model: AutoencoderKL) -> None:
    videos = [plan.render_video(video)[::5] for video in plan.plan_videos(11, 20)]
    mean, covariance = moments(reconstruction.encode(model, np.concatenate(videos)))
    values = torch.linalg.eigvalsh(covariance)
    assert mean.abs().max() < 0.3
    assert values.min() > 0.4
    assert values.max() < 2.0  # 100 other scenes; raw latents span four orders of magnitude


def test_the_pipelines_adapter_gives_the_same_latents_and_pictures(model: AutoencoderKL, held_out: Frames) -> None:
    adapter = Autoencoder.load(FOLDER)
    assert (adapter.channels, adapter.stride) == (16, 8)
    encoded = adapter.encode(held_out[:6])
    wanted = reconstruction.encode(model, held_out[:6]).numpy()
    assert encoded.latents.shape == (6, 16, 8, 8)
    assert np.abs(encoded.latents - wanted).max() < 1e-3  # of unit variance; memory formats differ
    decoded = adapter.decode(encoded.latents)
    assert np.abs(decoded.astype(int) - reconstruction.reconstruct(model, held_out[:6]).astype(int)).max() <= 1


def test_no_channel_died(model: AutoencoderKL, held_out: Frames) -> None:
    """A channel that the decoder ignores has a posterior wider than its unit variance; these are a tenth of it."""
    inputs = reconstruction.to_patches(torch.from_numpy(held_out[:4]).float())
    with torch.inference_mode():
        width = model.encode(inputs).latent_dist.std
    assert width.min() > 0
    assert width.max() < 0.2
