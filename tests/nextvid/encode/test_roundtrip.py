"""The round trip's rules: every planted slip is caught, stills and symmetric clips pass."""

from pathlib import Path

import numpy as np
import pytest

from nextvid.encode.autoencoders import Autoencoder
from nextvid.encode.roundtrip import (
    FRAMES_PER_ROW,
    IMAGES_PER_SHARD,
    LOSS_DB,
    PSNR_CEILING_DB,
    ROWS_PER_SHARD,
    Trip,
    error_bound,
    judge,
    psnr_db,
    sampled,
    window,
)

BOUND = error_bound("float16", "fp32")
SIDE = 64


@pytest.fixture(scope="module")
def autoencoder(cosine_autoencoder: Path) -> Autoencoder:
    return Autoencoder.load(cosine_autoencoder)


def scene(frames: int, seed: int, speed: float = 2.0, symmetric: bool = False, margin: int = 0) -> np.ndarray:
    """Smooth random texture that drifts by `speed` pixels a frame; uint8 [F, SIDE + margin, SIDE + margin, 3]."""
    rng = np.random.default_rng(seed)
    side = SIDE + margin
    y, x = np.mgrid[:side, :side].astype(np.float64)
    waves = rng.uniform(-0.12, 0.12, (6, 3, 2)), rng.uniform(0, 2 * np.pi, (6, 3)), rng.uniform(8, 22, (6, 3))
    out = np.empty((frames, side, side, 3))
    for frame in range(frames):
        drift = x + speed * frame
        for colour in range(3):
            parts = [
                waves[2][i, colour]
                * np.sin(
                    2 * np.pi * (waves[0][i, colour, 0] * drift + waves[0][i, colour, 1] * y) + waves[1][i, colour]
                )
                for i in range(6)
            ]
            out[frame, :, :, colour] = 128 + np.sum(parts, axis=0)
    if symmetric:
        out = (out + out[:, :, ::-1]) / 2
    return out.clip(0, 255).round().astype(np.uint8)


def trip(model: Autoencoder, encoded: np.ndarray, truth: np.ndarray) -> Trip:
    """Verdict when `encoded` frames were stored for a row whose file shows `truth`."""
    stored = model.encode(encoded).latents.astype(np.float16)
    return judge(stored, model.encode(truth).latents, model.decode(stored.astype(np.float32)), truth, BOUND)


@pytest.mark.parametrize("seed", range(5))
def test_trap_17_and_18_true_moving_clip_passes_with_everything_decided(autoencoder: Autoencoder, seed: int) -> None:
    clip = scene(8, seed)
    verdict = trip(autoencoder, clip, clip)
    assert verdict.faults == ()
    assert verdict.undecidable == ()
    assert verdict.psnr_db > 30


@pytest.mark.parametrize("slip", ["late", "early", "flipped", "crop", "other row", "channels", "frames reversed"])
@pytest.mark.parametrize("seed", range(3))
def test_trap_18_and_19_planted_slips_are_caught(autoencoder: Autoencoder, slip: str, seed: int) -> None:
    longer = scene(10, seed, margin=8)
    truth = longer[1:9, :SIDE, :SIDE]
    wrong = {
        "late": longer[2:, :SIDE, :SIDE],
        "early": longer[:8, :SIDE, :SIDE],
        "flipped": truth[:, :, ::-1],
        "crop": longer[1:9, 2 : SIDE + 2, 3 : SIDE + 3],
        "other row": scene(8, seed + 100),
        "channels": truth[..., ::-1],
        "frames reversed": truth[::-1],
    }[slip]
    verdict = trip(autoencoder, np.ascontiguousarray(wrong), truth)
    assert any("encoded again" in fault for fault in verdict.faults)


@pytest.mark.parametrize("slip", ["late", "early", "flipped", "crop"])
def test_trap_19_decoded_pixels_alone_catch_what_they_are_for(autoencoder: Autoencoder, slip: str) -> None:
    longer = scene(10, 0, margin=8)
    truth = longer[1:9, :SIDE, :SIDE]
    wrong = {
        "late": longer[2:, :SIDE, :SIDE],
        "early": longer[:8, :SIDE, :SIDE],
        "flipped": truth[:, :, ::-1],
        "crop": longer[1:9, 8 : SIDE + 8, :SIDE],
    }[slip]
    stored = autoencoder.encode(np.ascontiguousarray(wrong)).latents
    verdict = judge(stored, stored, autoencoder.decode(stored), truth, BOUND)  # the first rule sees equal latents
    assert verdict.error == 0
    assert any("looks like" in fault for fault in verdict.faults)


def test_permuted_latent_channels_are_caught(autoencoder: Autoencoder) -> None:
    clip = scene(8, 0)
    stored = autoencoder.encode(clip).latents
    verdict = judge(stored[:, ::-1], stored, autoencoder.decode(stored[:, ::-1]), clip, BOUND)
    assert any("encoded again" in fault for fault in verdict.faults)


def test_rows_that_are_nan_fail(autoencoder: Autoencoder) -> None:
    clip = scene(4, 0)
    stored = np.full_like(autoencoder.encode(clip).latents, np.nan)
    assert judge(stored, stored, clip, clip, BOUND).faults


@pytest.mark.parametrize(("kind", "names"), [("still", "frames one"), ("symmetric", "flipped"), ("flat", "crop")])
def test_what_cannot_be_told_passes_as_undecidable(autoencoder: Autoencoder, kind: str, names: str) -> None:
    clip = {
        "still": scene(1, 3).repeat(8, axis=0),
        "symmetric": scene(8, 3, symmetric=True),
        "flat": np.full((8, SIDE, SIDE, 3), 90, np.uint8),
    }[kind]
    verdict = trip(autoencoder, clip, clip)
    assert verdict.faults == ()
    assert any(name.startswith(names) or names in name for name in verdict.undecidable)


def test_a_fade_is_not_taken_for_a_slip() -> None:
    """A reconstruction paler than the truth is nearer to the next frame, which is paler itself."""
    fade = np.linspace(1.0, 0.9, 8)[:, None, None, None]
    picture = scene(1, 3).astype(np.float64) - 128
    noise = np.random.default_rng(0).normal(0, 6, (8, SIDE, SIDE, 3))
    truth = (128 + fade * picture).clip(0, 255).astype(np.uint8)
    paler = (128 + 0.85 * fade * picture + noise).clip(0, 255).astype(np.uint8)
    stored = np.zeros((8, 1, 1, 1), np.float32)
    assert psnr_db(paler[:-1], truth[1:]) - psnr_db(paler[:-1], truth[:-1]) > LOSS_DB
    verdict = judge(stored, stored, paler, truth, BOUND)
    assert verdict.faults == ()
    assert "frames one later" in verdict.undecidable


def test_one_frame_clip_skips_time(autoencoder: Autoencoder) -> None:
    clip = scene(1, 1)
    verdict = trip(autoencoder, clip, clip)
    assert verdict.faults == ()
    assert verdict.undecidable == ()
    wrong = trip(autoencoder, clip[:, :, ::-1].copy(), clip)
    assert len(wrong.faults) >= 2


def test_bound_leaves_room_for_its_storage_and_no_more() -> None:
    values = np.random.default_rng(0).standard_normal(100_000)
    exponent = np.exp2(np.floor(np.log2(np.abs(values))) + 1 - 11)
    rounded = np.round(values / exponent) * exponent
    error = np.sqrt(np.mean((rounded - values) ** 2)) / values.std()
    bound = error_bound("float16", "fp32")
    assert error < bound / 2
    assert bound < 0.02


def test_psnr_is_the_textbook_value() -> None:
    a = np.zeros((4, 4), np.uint8)
    assert psnr_db(a, a) == PSNR_CEILING_DB
    assert psnr_db(a, a + 5) == pytest.approx(20 * np.log10(255 / 5))
    assert psnr_db(a + 250, a) == psnr_db(a, a + 250)  # bytes do not wrap


def test_sampled_rows_depend_on_ids_alone() -> None:
    ids = [bytes([i]) * 16 for i in range(20)]
    assert sampled(ids[::-1], 16) == ids[:ROWS_PER_SHARD]
    assert sampled(ids, 1) == ids[:IMAGES_PER_SHARD]
    assert sampled(ids[:2], 16) == ids[:2]
    assert sampled([], 16) == []


def test_windows_lie_inside_and_reach_every_frame() -> None:
    reached = set()
    for i in range(50):
        found = window(bytes([i]) * 16, 16)
        assert found.stop - found.start == FRAMES_PER_ROW
        assert found.start >= 0
        assert found.stop <= 16
        reached |= set(range(16)[found])
    assert reached == set(range(16))
    assert window(bytes(16), 4) == slice(0, 4)
