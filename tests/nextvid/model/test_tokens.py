"""Rearrangements between arrays and tokens, each against the plain indexing it stands for."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nextvid.model.tokens import (
    denormalise,
    depth_to_space,
    gather_tokens,
    latent_tokens,
    normalise,
    pixel_tokens,
    pixel_values,
    space_to_depth,
    stack_target,
    tube_ids,
    unstack_target,
)

B, F, C, H, W = 2, 6, 5, 3, 4


def latents() -> torch.Tensor:
    return torch.arange(B * F * C * H * W, dtype=torch.float32).reshape(B, F, C, H, W)


@pytest.mark.parametrize("tubelet", [1, 2, 3])
def test_trap_15_stack_and_unstack_are_inverses(tubelet: int) -> None:
    stacked = stack_target(latents(), tubelet)
    assert stacked.shape == (B, F // tubelet, H * W, tubelet * C)
    assert torch.equal(unstack_target(stacked, tubelet, H), latents())


def test_trap_15_channels_run_frame_by_frame_and_cells_row_by_row() -> None:
    x = latents()
    stacked = stack_target(x, 2)
    for t, row, column in ((0, 0, 0), (1, 2, 1), (2, 1, 3)):
        token = stacked[1, t, row * W + column]
        assert torch.equal(token[:C], x[1, 2 * t, :, row, column])
        assert torch.equal(token[C:], x[1, 2 * t + 1, :, row, column])


def test_trap_15_a_white_square_lights_its_own_token_and_half() -> None:
    x = torch.zeros(1, 4, C, H, W)
    x[0, 3, :, 2, 1] = 1.0
    where = stack_target(x, 2).nonzero()
    assert where[:, 1].unique().tolist() == [1]
    assert where[:, 2].unique().tolist() == [2 * W + 1]
    assert where[:, 3].tolist() == list(range(C, 2 * C))


def test_trap_16_input_and_target_tokens_of_one_id_are_one_cell() -> None:
    """A watermark of flat ids through both paths; targets [:, 1:] start at id S, where queries do."""
    ids = torch.arange(3 * H * W, dtype=torch.float32).reshape(3, 1, H, W)
    watermark = ids.repeat_interleave(2, dim=0)[None]  # both frames of a tubelet
    tokens, target = latent_tokens(watermark, 2), stack_target(watermark, 2)
    assert torch.equal(tokens[0, :, 0], torch.arange(3.0 * H * W))
    assert torch.equal(target[:, 1:].flatten(1, 2)[..., 0], tokens[:, H * W :, 0])
    pixels = watermark.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4).expand(-1, -1, 3, -1, -1)
    assert torch.equal(pixel_tokens(pixels, 2, 2)[..., 0], tokens[..., 0])


def test_pixel_tokens_are_a_convolutions_patches() -> None:
    torch.manual_seed(0)
    convolution = nn.Conv3d(3, 7, kernel_size=(2, 4, 4), stride=(2, 4, 4)).double()
    pixels = torch.randn(2, 3, 4, 8, 12, dtype=torch.float64)
    expected = convolution(pixels).flatten(2).transpose(1, 2)
    patches = pixel_tokens(pixels.transpose(1, 2), 4, 2)
    assert convolution.bias is not None
    assert torch.allclose(patches @ convolution.weight.flatten(1).T + convolution.bias, expected)


def test_trap_18_pixels_are_rgb_between_minus_one_and_one() -> None:
    frames = torch.arange(256, dtype=torch.uint8).reshape(1, 2, 8, 16, 1).repeat(1, 1, 1, 1, 3)
    frames[..., 2] = 255
    values = pixel_values(frames)
    assert values.shape == (1, 2, 3, 8, 16)
    assert torch.allclose(values[:, :, 0].flatten(), (torch.arange(256) / 255 - 0.5) / 0.5, atol=1e-6)
    assert (values[:, :, 2] == 1).all()
    assert (float(values.min()), float(values.max())) == (-1.0, 1.0)


@given(st.integers(1, 3))
def test_space_to_depth_folds_and_unfolds(factor: int) -> None:
    x = torch.randn(2, 3, 4, 2 * factor, 3 * factor)
    folded = space_to_depth(x, factor)
    assert folded.shape == (2, 3, 4 * factor**2, 2, 3)
    assert torch.equal(depth_to_space(folded, factor), x)
    assert torch.equal(folded[1, 2, :, 1, 2].reshape(4, factor, factor), x[1, 2, :, factor:, 2 * factor :])


def test_trap_30_an_image_repeated_has_equal_halves() -> None:
    image = torch.randn(2, 1, C, H, W).expand(-1, F, -1, -1, -1)
    target = stack_target(image, 2)
    assert torch.equal(target[..., :C], target[..., C:])
    assert torch.equal(target, target[:, :1].expand_as(target))


@given(st.integers(1, 4), st.data())
def test_tube_ids_and_gather(tubelets: int, data: st.DataObject) -> None:
    cells = sorted(data.draw(st.sets(st.integers(0, H * W - 1), min_size=1)))
    ids = tube_ids(torch.tensor([cells]), tubelets, H * W)
    assert ids[0].tolist() == [t * H * W + cell for t in range(tubelets) for cell in cells]
    tokens = torch.arange(2.0 * tubelets * H * W).reshape(2, -1, 1)
    one, each = gather_tokens(tokens, ids), gather_tokens(tokens, ids.expand(2, -1))
    assert torch.equal(one, each)
    assert one[1, :, 0].tolist() == [tubelets * H * W + i for i in ids[0].tolist()]


def test_trap_17_normalisation_is_per_channel_and_undone() -> None:
    mean, std = torch.arange(5.0), torch.arange(1.0, 6.0)
    x = torch.randn(2, 400, C, H, W) * std[:, None, None] + mean[:, None, None]
    normal = normalise(x, mean, std)
    assert normal.mean(dim=(0, 1, 3, 4)).abs().max() < 0.1
    assert (normal.std(dim=(0, 1, 3, 4)) - 1).abs().max() < 0.1
    assert torch.allclose(denormalise(normal, mean, std), x, atol=1e-5)
