"""What encoder and decoder are given of a batch, by what the recipe reads and predicts."""

from dataclasses import replace

import pytest
import torch

from nextvid.config.overrides import apply_overrides
from nextvid.config.recipe import RecipeConfig
from nextvid.model.tokens import latent_tokens, stack_target
from nextvid.train.loader import Batch
from nextvid.train.step import build, encoder_tokens, flow_targets, take_step
from storage.errors import ConfigError
from tests.nextvid.train.tiny import ALONE, CHANNELS, GRID, latents_of, tiny_recipe

PATCH = 8
READS_PIXELS = "model.encoder.input=pixels"
PREDICTS_PIXELS = ("losses.target=pixels", f"model.frame_channels={3 * PATCH**2}")


def recipe(*overrides: str) -> RecipeConfig:
    return apply_overrides(tiny_recipe(), overrides)


def batch(clips: int = 2, frames: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(clips, frames, CHANNELS, GRID, GRID, generator=generator)
    shape = (clips, frames, GRID * PATCH, GRID * PATCH, 3)
    pixels = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    ids = [torch.arange(frames // 2 * GRID**2).expand(clips, -1) for _ in range(2)]
    return Batch(0, tuple(range(clips)), latents, ids, pixels)


def test_latents_are_both_input_and_target() -> None:
    found = batch()
    assert torch.equal(encoder_tokens(found, recipe().model), latent_tokens(latents_of(found), 2))
    targets = flow_targets(found, recipe())
    assert targets is not None
    assert torch.equal(targets, stack_target(latents_of(found), 2))


def test_pixels_of_a_cell_are_its_token() -> None:
    """Token t*S + h*W + w holds the square at (h, w) of both frames of tubelet t, as (colour, frame, y, x)."""
    found = batch()
    tokens = encoder_tokens(found, recipe(READS_PIXELS).model)
    assert tokens.shape == (2, 2 * GRID**2, 2 * 3 * PATCH**2)
    assert found.pixels is not None
    t, h, w = 1, 2, 3
    square = found.pixels[1, 2 * t : 2 * t + 2, PATCH * h : PATCH * (h + 1), PATCH * w : PATCH * (w + 1)]
    wanted = ((square.permute(3, 0, 1, 2).double() / 255 - 0.5) / 0.5).flatten()
    assert torch.allclose(tokens[1, t * GRID**2 + h * GRID + w].double(), wanted, atol=1e-6)


def test_pixel_targets_run_frame_by_frame() -> None:
    """Trap 15 for pixels: the first half of a target's channels is the first frame of its tubelet."""
    found = batch()
    targets = flow_targets(found, recipe(READS_PIXELS, *PREDICTS_PIXELS))
    assert targets is not None
    assert found.pixels is not None
    square = found.pixels[0, 3, PATCH : 2 * PATCH, :PATCH]  # second frame of tubelet 1, cell (1, 0)
    wanted = (square.permute(2, 0, 1).float() / 127.5 - 1).flatten()
    assert torch.allclose(targets[0, 1, GRID, 3 * PATCH**2 :], wanted)


def test_no_flow_loss_no_targets() -> None:
    off = recipe("losses.flow=0", "model.decoder.kind=none")
    assert flow_targets(batch(), off) is None


@pytest.mark.parametrize("overrides", [(READS_PIXELS,), (READS_PIXELS, *PREDICTS_PIXELS), ()])
def test_a_step_trains_and_micro_batches_are_its_parts(overrides: tuple[str, ...]) -> None:
    config = recipe(*overrides)
    drawn = batch()
    if config.losses.target == "pixels":
        drawn = replace(drawn, latents=None)
    whole, parts = (take_step(build(config, ALONE), drawn, 0, micro) for micro in (0, 1))
    assert whole.taken
    for name, value in whole.losses.items():
        torch.testing.assert_close(parts.losses[name], value, rtol=1e-4, atol=1e-5)


def test_micro_batches_divide_the_batch() -> None:
    found = batch(4)
    first, second = found.split(2)
    assert (first.draws, second.draws) == ((0, 1), (2, 3))
    assert found.pixels is not None
    assert second.pixels is not None
    assert torch.equal(second.pixels, found.pixels[2:])
    with pytest.raises(ConfigError, match="micro_batch 3 does not divide the 4 clips"):
        found.split(3)


@pytest.mark.parametrize(
    ("missing", "overrides", "message"),
    [
        ("latents", (), "reads latents"),
        ("pixels", (READS_PIXELS,), "reads pixels"),
        ("latents", (READS_PIXELS,), "predicts latents"),
        ("pixels", (READS_PIXELS, *PREDICTS_PIXELS), "predicts pixels"),
    ],
)
def test_what_the_recipe_reads_must_be_there(missing: str, overrides: tuple[str, ...], message: str) -> None:
    whole, config = batch(), recipe(*overrides)
    found = replace(whole, latents=None) if missing == "latents" else replace(whole, pixels=None)
    with pytest.raises(AssertionError, match=message):
        encoder_tokens(found, config.model) if message.startswith("reads") else flow_targets(found, config)
