"""Masked and autoregressive generation: what may be seen, what is kept, and that both agree where they must."""

import pytest
import torch
from torch import Tensor

from nextvid.model.nextvid import NExTVid
from nextvid.recipes import recipe
from nextvid.sample.autoregressive import generate_onward
from nextvid.sample.masked import generate_masked

CLIPS, FRAMES, CHANNELS, SIDE = 2, 8, 16, 8
TUBELET, CELLS = 2, 64


@pytest.fixture(scope="module")
def model() -> NExTVid:
    """The demo's model with its zero-initialised gates and heads broken, so that everything reaches the output."""
    torch.manual_seed(0)
    found = NExTVid(recipe("demo")).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return found


@pytest.fixture
def latents() -> Tensor:
    return torch.randn(CLIPS, FRAMES, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(2))


def noise(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def every_cell() -> Tensor:
    return torch.arange(CELLS).expand(CLIPS, -1)


def test_the_first_tubelet_is_given(model: NExTVid, latents: Tensor) -> None:
    masked = generate_masked(model, latents, every_cell()[:, :48], noise(), steps=2)
    onward = generate_onward(model, latents[:, :TUBELET], 4, every_cell(), noise(), steps=2)
    assert masked.shape == onward.shape == latents.shape
    assert torch.equal(masked[:, :TUBELET], latents[:, :TUBELET])
    assert torch.equal(onward[:, :TUBELET], latents[:, :TUBELET])


def test_masked_cells_are_not_seen(model: NExTVid, latents: Tensor) -> None:
    hidden = latents.clone()
    hidden[:, :, :, SIDE // 2 :] += 5
    visible = every_cell()[:, : CELLS // 2]  # the upper half
    before, after = (generate_masked(model, x, visible, noise(), steps=2)[:, TUBELET:] for x in (latents, hidden))
    assert torch.equal(before, after)
    shown = generate_masked(model, hidden, every_cell(), noise(), steps=2)[:, TUBELET:]
    assert not torch.allclose(shown, generate_masked(model, latents, every_cell(), noise(), steps=2)[:, TUBELET:])


def test_a_tubelet_is_generated_from_those_before_it(model: NExTVid, latents: Tensor) -> None:
    """Its own frames and later ones must not matter; the one before must."""
    changed = latents.clone()
    changed[:, 4:] += 5  # tubelets 2 and 3
    before, after = (generate_masked(model, x, every_cell(), noise(), steps=2) for x in (latents, changed))
    torch.testing.assert_close(before[:, :6], after[:, :6], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before[:, 6:], after[:, 6:], atol=1e-3)


def test_onward_from_one_tubelet_equals_masked_generation_of_the_next(model: NExTVid, latents: Tensor) -> None:
    two = latents[:, : 2 * TUBELET]
    masked = generate_masked(model, two, every_cell(), noise(), steps=3)
    onward = generate_onward(model, two[:, :TUBELET], 2, every_cell(), noise(), steps=3)
    torch.testing.assert_close(masked, onward, rtol=1e-5, atol=1e-5)


def test_onward_reads_what_it_generated(model: NExTVid, latents: Tensor) -> None:
    """Tubelet 2 follows from the generated tubelet 1: other noise there, another tubelet 2 under the same noise."""
    seed = latents[:, :TUBELET]
    generated = generate_onward(model, seed, 3, every_cell(), noise(), steps=3)
    replayed = noise()
    one = generate_masked(model, latents[:, : 2 * TUBELET], every_cell(), replayed, steps=3)
    context = torch.cat([one, torch.zeros_like(seed)], dim=1)
    seen = model.last(model.condition(*_tokens(context[:, : 2 * TUBELET]), 2))
    following = model.sample(seen, 3, replayed)
    from nextvid.model.tokens import unstack_target

    torch.testing.assert_close(generated[:, 4:6], unstack_target(following, TUBELET, SIDE), rtol=1e-4, atol=1e-4)


def _tokens(latents: Tensor) -> tuple[Tensor, Tensor]:
    from nextvid.model.tokens import latent_tokens

    tokens = latent_tokens(latents, TUBELET)
    return tokens, torch.arange(tokens.shape[1])[None]


def test_same_noise_same_clip_other_noise_another(model: NExTVid, latents: Tensor) -> None:
    first, second, other = (
        generate_masked(model, latents, every_cell(), noise(seed), steps=2)[:, TUBELET:] for seed in (3, 3, 4)
    )
    assert torch.equal(first, second)
    assert not torch.allclose(first, other)


def test_a_seed_of_another_length_is_a_programmers_mistake(model: NExTVid, latents: Tensor) -> None:
    with pytest.raises(AssertionError, match="one tubelet"):
        generate_onward(model, latents[:, :3], 4, every_cell(), noise())
