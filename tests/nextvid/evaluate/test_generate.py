"""Masked and autoregressive generation: what may be seen, what is kept, and that both agree where they must."""

import numpy as np
import pytest
import torch
from torch import Tensor

from nextvid.config.overrides import apply_overrides
from nextvid.config.recipe import ModelConfig
from nextvid.config.recipes import recipe
from nextvid.evaluate.generate import (
    ReadBack,
    generate_masked,
    generate_onward,
    random_tube,
    reading_back,
)
from nextvid.model.nextvid import NExTVid
from nextvid.model.tokens import (
    depth_to_space,
    gather_tokens,
    latent_tokens,
    pixel_bytes,
    pixel_tokens,
    pixel_values,
    tube_ids,
    unstack_target,
)

CLIPS, TUBELETS, CHANNELS, SIDE = 2, 4, 16, 8
TUBELET, CELLS, PATCH = 2, 64, 8
KEPT = 17


def broken_in(*overrides: str) -> NExTVid:
    """The demo's model with its zero-initialised gates and heads broken, so that everything reaches the output."""
    torch.manual_seed(0)
    found = NExTVid(apply_overrides(recipe("demo"), overrides)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return found


@pytest.fixture(scope="module")
def model() -> NExTVid:
    return broken_in()


@pytest.fixture(scope="module")
def of_pixels() -> NExTVid:
    """Pixels in, latents out, as in the paper."""
    return broken_in("model.encoder.input=pixels")


@pytest.fixture
def latents() -> Tensor:
    return random_latents()


def random_latents() -> Tensor:
    shape = (CLIPS, TUBELETS * TUBELET, CHANNELS, SIDE, SIDE)
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def noise(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def every_cell() -> Tensor:
    return torch.arange(CELLS).expand(CLIPS, -1)


def tokens_of(latents: Tensor) -> Tensor:
    return latent_tokens(latents, TUBELET)


def decode(latents: Tensor) -> Tensor:
    """Stands in for an autoencoder: a fixed map from 16 channels of a cell to its 8 x 8 pixels of three colours."""
    mix = torch.randn(3 * PATCH**2, CHANNELS, generator=torch.Generator().manual_seed(4), dtype=latents.dtype) / 8
    return pixel_bytes(depth_to_space(torch.einsum("oc,bfchw->bfohw", mix, latents), PATCH))


def anew(model: NExTVid, seed: Tensor, cells: Tensor, generator: torch.Generator, read_back: ReadBack) -> Tensor:
    """The slow way: after each tubelet everything so far is encoded again, and all but the last prediction dropped."""
    tokens, generated = seed, []
    for known in range(1, TUBELETS):
        ids = tube_ids(cells, known, CELLS)
        seen = model.condition(gather_tokens(tokens, ids), ids, known)
        frames = [torch.randn(1, CLIPS, 1, CELLS, TUBELET * CHANNELS, generator=generator).to(seed.dtype)]
        before = torch.zeros(1, CLIPS, known - 1, CELLS, TUBELET * CHANNELS, dtype=seed.dtype)
        h = torch.cat([before, *frames], dim=2)
        for step in range(3):
            velocity = model.velocity(seen, h, torch.full((1, CLIPS, known), step / 3))
            h = h + velocity / 3
        generated.append(unstack_target(h[0, :, -1:], TUBELET, SIDE))
        tokens = torch.cat([tokens, read_back(generated[-1])], dim=1)
    return torch.cat(generated, dim=1)


def read_back_of(config: ModelConfig) -> ReadBack:
    return reading_back(config, decode)


@pytest.mark.parametrize("kept", [CELLS, KEPT])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
@pytest.mark.parametrize("reads", ["latents", "pixels"])
def test_generating_onward_equals_encoding_everything_anew(
    reads: str, dtype: torch.dtype, tolerance: float, kept: int
) -> None:
    """In fp64 down to the last bit of the rotary tables, which are fp32 and are computed for other tokens at once."""
    model = broken_in(f"model.encoder.input={reads}").to(dtype)
    seed = random_latents()[:, :TUBELET].to(dtype)
    config = model.recipe.model
    read_back = read_back_of(config)
    cells = random_tube(CELLS, kept / CELLS, CLIPS, noise(7))
    fast = generate_onward(model, read_back(seed).to(dtype), TUBELETS, cells, noise(), cast(read_back, dtype), steps=3)
    with torch.no_grad():
        slow = anew(model, read_back(seed).to(dtype), cells, noise(), cast(read_back, dtype))
    assert fast.shape == (CLIPS, (TUBELETS - 1) * TUBELET, CHANNELS, SIDE, SIDE)
    torch.testing.assert_close(fast, slow, rtol=0, atol=tolerance)


def cast(read_back: ReadBack, dtype: torch.dtype) -> ReadBack:
    """Pixels come as float32 whatever the model is."""
    return lambda latents: read_back(latents).to(dtype)


def test_masked_cells_are_not_seen(model: NExTVid, latents: Tensor) -> None:
    hidden = latents.clone()
    hidden[:, :, :, SIDE // 2 :] += 5
    visible = every_cell()[:, : CELLS // 2]  # the upper half
    before, after = (generate_masked(model, tokens_of(x), visible, noise(), steps=2) for x in (latents, hidden))
    assert torch.equal(before, after)
    one, other = (generate_masked(model, tokens_of(x), every_cell(), noise(), steps=2) for x in (latents, hidden))
    assert not torch.allclose(one, other)


def test_masked_pixels_are_not_seen(of_pixels: NExTVid, latents: Tensor) -> None:
    frames = decode(latents)
    hidden = frames.clone()
    hidden[:, :, 4 * PATCH :] = 255 - hidden[:, :, 4 * PATCH :]  # the lower half
    inputs = [pixel_tokens(pixel_values(x), PATCH, TUBELET) for x in (frames, hidden)]
    visible = every_cell()[:, : CELLS // 2]
    before, after = (generate_masked(of_pixels, x, visible, noise(), steps=2) for x in inputs)
    assert before.shape == (CLIPS, 6, CHANNELS, SIDE, SIDE)
    assert torch.equal(before, after)
    one, other = (generate_masked(of_pixels, x, every_cell(), noise(), steps=2) for x in inputs)
    assert not torch.allclose(one, other)


def test_a_tubelet_is_generated_from_those_before_it(model: NExTVid, latents: Tensor) -> None:
    """Its own frames and later ones must not matter; the one before must."""
    changed = latents.clone()
    changed[:, 4:] += 5  # tubelets 2 and 3
    before, after = (generate_masked(model, tokens_of(x), every_cell(), noise(), steps=2) for x in (latents, changed))
    torch.testing.assert_close(before[:, :4], after[:, :4], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before[:, 4:], after[:, 4:], atol=1e-3)


def test_onward_from_one_tubelet_equals_masked_generation_of_the_next(model: NExTVid, latents: Tensor) -> None:
    two, read_back = latents[:, : 2 * TUBELET], reading_back(model.recipe.model, decode)
    masked = generate_masked(model, tokens_of(two), every_cell(), noise(), steps=3)
    onward = generate_onward(model, tokens_of(two[:, :TUBELET]), 2, every_cell(), noise(), read_back, steps=3)
    torch.testing.assert_close(masked, onward, rtol=1e-5, atol=1e-5)


def test_encoders_of_pixels_read_decoded_bytes(of_pixels: NExTVid, latents: Tensor) -> None:
    """What is read back are bytes: latents whose frames are equal give equal tokens."""
    config = of_pixels.recipe.model
    seen: list[Tensor] = []

    def noting(given: Tensor) -> Tensor:
        seen.append(decode(given))
        return seen[-1]

    seed = reading_back(config, decode)(latents[:, :TUBELET])
    generated = generate_onward(of_pixels, seed, TUBELETS, every_cell(), noise(), reading_back(config, noting), steps=2)
    assert len(seen) == TUBELETS - 2  # the last tubelet is read by nobody
    assert seen[0].dtype == torch.uint8
    assert torch.equal(seen[1], decode(generated[:, 2:4]))
    assert len(np.unique(seen[0])) > 100


def test_same_noise_same_clip_other_noise_another(model: NExTVid, latents: Tensor) -> None:
    first, second, other = (
        generate_masked(model, tokens_of(latents), every_cell(), noise(seed), steps=2) for seed in (3, 3, 4)
    )
    assert torch.equal(first, second)
    assert not torch.allclose(first, other)


def test_a_seed_of_another_length_is_a_programmers_mistake(model: NExTVid, latents: Tensor) -> None:
    read_back = reading_back(model.recipe.model, decode)
    with pytest.raises(AssertionError, match="one tubelet"):
        generate_onward(model, tokens_of(latents), 4, every_cell(), noise(), read_back)


@pytest.mark.parametrize(("share", "kept"), [(0.25, 16), (1.0, 64), (0.001, 1)])
def test_a_random_tube_is_ascending_and_differs_by_clip(share: float, kept: int) -> None:
    cells = random_tube(CELLS, share, 8, noise())
    assert cells.shape == (8, kept)
    assert (cells.diff(dim=1) > 0).all()
    assert torch.equal(cells, random_tube(CELLS, share, 8, noise()))
    assert kept == CELLS or len({tuple(row.tolist()) for row in cells}) > 1
