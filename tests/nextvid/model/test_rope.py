"""Rotation in three dimensions: norms, relative positions, precision, and axes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nextvid.model.attention import axis_width, rotary, rotate, rotate_by_parts

HEIGHT, WIDTH = 5, 7


def turned(x: torch.Tensor, t: int, h: int, w: int) -> torch.Tensor:
    """One vector [e] at one position."""
    ids = torch.tensor([[(t * HEIGHT + h) * WIDTH + w]])
    return rotate(x[None, None, None], rotary(ids, x.shape[0], HEIGHT, WIDTH))[0, 0, 0]


@pytest.mark.parametrize(("head_dim", "axis"), [(64, 20), (80, 26), (32, 10)])
def test_axis_widths_are_method_5s(head_dim: int, axis: int) -> None:
    assert axis_width(head_dim) == axis


positions = st.tuples(st.integers(0, 20), st.integers(0, HEIGHT - 1), st.integers(0, WIDTH - 1))


@given(positions, st.sampled_from([12, 32, 64, 80]))
def test_trap_05_rotation_keeps_norms(position: tuple[int, int, int], head_dim: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(head_dim)
    assert torch.allclose(turned(q, *position).norm(), q.norm(), rtol=1e-5)


@given(st.integers(0, 8), st.integers(0, 1), st.integers(0, 2), st.sampled_from([32, 80]))
def test_trap_05_scores_depend_on_relative_positions_alone(t: int, h: int, w: int, head_dim: int) -> None:
    torch.manual_seed(1)
    q, k = torch.randn(head_dim), torch.randn(head_dim)
    here = turned(q, 5, 2, 3) @ turned(k, 3, 1, 4)
    there = turned(q, 5 + t, 2 + h, 3 + w) @ turned(k, 3 + t, 1 + h, 4 + w)
    assert torch.allclose(here, there, atol=1e-4)
    moved = turned(q, 5 + t, 2 + h, 3 + w) @ turned(k, 4 + t, 1 + h, 4 + w)
    assert not torch.allclose(here, moved, atol=1e-4)


def test_against_two_by_two_rotations_in_float64() -> None:
    """Pair i of the first a dimensions turns by t * 10000^(-2i/a), then likewise h and w; the tail stays."""
    head_dim, position = 32, (9, 4, 6)
    axis = 10
    x = torch.randn(head_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = x.clone()
    for part, place in enumerate(position):
        for pair in range(axis // 2):
            angle = place * 10000 ** (-pair / (axis / 2))
            i = part * axis + 2 * pair
            a, b = float(x[i]), float(x[i + 1])
            expected[i] = a * math.cos(angle) - b * math.sin(angle)
            expected[i + 1] = a * math.sin(angle) + b * math.cos(angle)
    assert torch.allclose(turned(x.float(), *position).double(), expected, atol=1e-6)


def test_trap_06_phase_error_under_autocast() -> None:
    ids = torch.tensor([[31 * 256 + 15 * 16 + 15]])
    with torch.autocast("cpu", torch.bfloat16):
        table = rotary(ids, 64, 16, 16)[0, 0, 0]
    omega = 10000.0 ** -(torch.arange(10, dtype=torch.float64) / 10)
    angles = torch.cat((31 * omega, 15 * omega, 15 * omega, torch.zeros(2, dtype=torch.float64)))
    exact = torch.polar(torch.ones_like(angles), angles)
    assert (torch.view_as_complex(table) - exact).abs().max() < 1e-4


@pytest.mark.parametrize("head_dim", [12, 32, 80])
def test_written_out_it_is_the_complex_product(head_dim: int) -> None:
    """What compiled blocks compute."""
    x = torch.randn(2, 3, 9, head_dim, generator=torch.Generator().manual_seed(0))
    table = rotary(torch.arange(9)[None] * 11, head_dim, HEIGHT, WIDTH)
    assert torch.allclose(rotate_by_parts(x, table), rotate(x, table), atol=1e-6)


def test_dtype_of_activations_is_kept() -> None:
    table = rotary(torch.arange(4)[None], 12, 2, 2)
    assert rotate(torch.zeros(1, 1, 4, 12, dtype=torch.bfloat16), table).dtype == torch.bfloat16
