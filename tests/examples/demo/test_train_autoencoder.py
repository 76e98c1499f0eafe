"""Training and whitening: a short run learns, and folding changes latents but not pictures."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from examples.demo import plan, reconstruction, train_autoencoder
from examples.demo.scenes import Frames
from examples.demo.whitening import fold_whitening, moments


@pytest.fixture(scope="module")
def frames() -> Frames:
    return np.concatenate([plan.render_video(video)[::3] for video in plan.plan_videos(7, 8)])


@pytest.fixture(scope="module")
def trained(frames: Frames) -> train_autoencoder.Trained:
    return train_autoencoder.train(frames, steps=30, seed=0)


def test_thirty_steps_learn(trained: train_autoencoder.Trained, frames: Frames) -> None:
    assert len(trained.losses) == 30
    assert np.mean(trained.losses[-5:]) < 0.7 * np.mean(trained.losses[:5])
    assert all(torch.isfinite(p).all() for p in trained.model.parameters())
    torch.manual_seed(0)
    fresh = train_autoencoder.quality(reconstruction.build().eval(), frames[:32])
    assert float(str(train_autoencoder.quality(trained.model, frames[:32])["mean_psnr_db"])) > float(
        str(fresh["mean_psnr_db"])
    )


def test_patches_are_pixel_unshuffle_and_come_back(frames: Frames) -> None:
    pixels = torch.from_numpy(frames[:3]).float()
    patches = reconstruction.to_patches(pixels)
    wanted = torch.nn.functional.pixel_unshuffle(pixels.permute(0, 3, 1, 2) / 127.5 - 1, reconstruction.PATCH)
    assert torch.equal(patches, wanted)
    assert torch.allclose(reconstruction.to_frames(patches), pixels, atol=1e-4)


def test_psnr_is_that_of_its_formula() -> None:
    black = np.zeros((2, 64, 64, 3), np.uint8)
    grey = black + np.array([5, 50], np.uint8)[:, None, None, None]
    assert reconstruction.psnr_db(black, grey) == pytest.approx([20 * np.log10(255 / 5), 20 * np.log10(255 / 50)])


def test_whitening_gives_unit_covariance_and_the_same_pictures(
    trained: train_autoencoder.Trained, frames: Frames
) -> None:
    torch.manual_seed(1)
    model = reconstruction.build().eval()
    model.load_state_dict(trained.model.state_dict())
    inputs = reconstruction.to_patches(torch.from_numpy(frames[:64]).float())
    with torch.inference_mode():
        before = model.decode(model.encode(inputs).latent_dist.mean).sample
    train_autoencoder.whiten(model, frames)
    mean, covariance = moments(reconstruction.encode(model, frames))
    assert mean.abs().max() < 1e-2
    assert (covariance - torch.eye(reconstruction.CHANNELS)).abs().max() < 2e-2
    with torch.inference_mode():
        after = model.decode(model.encode(inputs).latent_dist.mean).sample
    assert (after - before).abs().max() < 1e-2  # of a range of 2; thirty steps leave nearly singular latents
    assert (after - before).square().mean().sqrt() < 1e-3


def test_folded_posterior_width_is_the_diagonal_of_the_turned_one() -> None:
    torch.manual_seed(2)
    model = reconstruction.build().eval()
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(16, 16, generator=generator, dtype=torch.float64) + 3 * torch.eye(16)
    covariance, variance = mixing @ mixing.T, torch.rand(16, generator=generator) + 0.1
    fold_whitening(model, torch.zeros(16), covariance, variance)
    posterior = model.encode(torch.randn(2, 48, 16, 16, generator=generator)).latent_dist
    values, vectors = torch.linalg.eigh(covariance)
    whiten = vectors @ torch.diag(values**-0.5) @ vectors.T
    noise = torch.randn(200_000, 16, generator=generator, dtype=torch.float64) * variance.sqrt()
    assert torch.allclose((noise @ whiten.T).var(dim=0), posterior.var[0, :, 0, 0].double(), rtol=0.03)
    assert (posterior.var == posterior.var[:1, :, :1, :1]).all()


def test_saved_folder_holds_what_the_adapter_and_a_reader_need(
    trained: train_autoencoder.Trained, frames: Frames, tmp_path: Path
) -> None:
    train_autoencoder.save(trained.model, tmp_path / "saved", {"steps": 30})
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert names == {"config.json", "diffusion_pytorch_model.safetensors", "nextvid.json", "provenance.json"}
    assert json.loads((tmp_path / "saved" / "nextvid.json").read_text()) == {"kind": "autoencoder_kl", "patch": 4}
    loaded = reconstruction.load(tmp_path / "saved")
    assert isinstance(loaded, AutoencoderKL)
    assert next(loaded.parameters()).dtype == torch.float32
    pairs = (reconstruction.reconstruct(model, frames[:8]) for model in (loaded, trained.model))
    assert reconstruction.psnr_db(*pairs).min() > 45  # fp16 weights
    assert next(trained.model.parameters()).dtype == torch.float32  # saving a half-precision copy left the original


def test_schedule_warms_up_to_one_and_falls_to_zero() -> None:
    rates = [train_autoencoder._schedule(step, 1000) for step in range(1000)]
    assert rates[0] == pytest.approx(1 / 50)
    assert max(rates) == 1.0
    assert rates.index(1.0) in (49, 50)
    assert rates[-1] == pytest.approx(1 / 950)
    assert rates[50:] == sorted(rates[50:], reverse=True)


def test_same_seed_same_losses(frames: Frames) -> None:
    first, second = (train_autoencoder.train(frames[:32], steps=3, seed=5).losses for _ in range(2))
    assert first == second


def test_training_further_begins_where_the_start_ended(trained: train_autoencoder.Trained, frames: Frames) -> None:
    start = copy.deepcopy(trained.model)
    further = train_autoencoder.train(frames, steps=2, seed=0, start=start)
    assert further.losses[0] < 0.8 * trained.losses[0]


def test_frames_are_read_from_own_videos_of_the_split(corpus: Path) -> None:
    test = train_autoencoder.read_frames(corpus, "test", stride=10)
    videos = [video for video in plan.plan_videos(0, 12) if video.split == "test"]
    wanted = np.concatenate([plan.render_video(video)[::10] for video in videos])
    assert test.shape == wanted.shape
    assert reconstruction.psnr_db(test, wanted).mean() > 26
