"""Blocks against a float64 softmax written out, forward and backward; masks from ids."""

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nextvid.config import ConfigError
from nextvid.model.attention import Backend, allow_by_id, flash_kernel, frame_attention, masked_attention
from nextvid.model.rope import rotary, rotate


def naive(q: Tensor, k: Tensor, v: Tensor, allow: Tensor) -> Tensor:
    """Softmax attention in float64, one line a step."""
    scores = q.double() @ k.double().transpose(-1, -2) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(~allow, -torch.inf)
    return torch.softmax(scores, dim=-1) @ v.double()


def blocks(frames: int, rows: int, keys: int) -> Tensor:
    row = torch.arange(frames).repeat_interleave(rows)
    column = torch.arange(frames).repeat_interleave(keys)
    return column[None, :] <= row[:, None]


@pytest.mark.parametrize("backend", ["loop", "dense"])
@given(
    frames=st.integers(1, 5),
    rows=st.integers(1, 6),
    keys=st.integers(1, 6),
    head_dim=st.sampled_from([32, 64, 80]),
    seed=st.integers(0, 99),
)
def test_equals_float64_forward_and_backward(
    backend: Backend, frames: int, rows: int, keys: int, head_dim: int, seed: int
) -> None:
    torch.manual_seed(seed)
    q = torch.randn(2, 2, frames * rows, head_dim, requires_grad=True)
    k, v = (torch.randn(2, 2, frames * keys, head_dim, requires_grad=True) for _ in range(2))
    weights = torch.randn(2, 2, frames * rows, head_dim)
    out = frame_attention(q, k, v, frames, backend)
    expected = naive(q, k, v, blocks(frames, rows, keys))
    assert torch.allclose(out.double(), expected, atol=1e-5)
    grads = torch.autograd.grad((out * weights).sum(), (q, k, v))
    wanted = torch.autograd.grad((expected * weights).sum(), (q, k, v))
    for grad, want in zip(grads, wanted, strict=True):
        assert torch.allclose(grad.double(), want.double(), atol=1e-4)


def test_loop_in_bf16_is_close_to_float64() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 4 * 13, 32) for _ in range(3))
    out = frame_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), 4, "loop")
    expected = naive(q.bfloat16(), k.bfloat16(), v.bfloat16(), blocks(4, 13, 13))
    assert (out.double() - expected).abs().max() / expected.abs().max() < 2e-2  # research: training 1, 3e-3 to 1e-2


def test_unequal_blocks_are_refused() -> None:
    q = torch.zeros(1, 1, 7, 4)
    with pytest.raises(AssertionError, match="7 queries"):
        frame_attention(q, q, q, 2)


def test_ids_decide_earlier_and_not_later() -> None:
    queries, keys = torch.tensor([[4, 7, 8]]), torch.tensor([[0, 3, 4, 11]])
    not_later = allow_by_id(queries, keys, cells=4, strict=False)
    assert not_later.tolist() == [[[True, True, True, False]] * 2 + [[True, True, True, True]]]
    earlier = allow_by_id(queries, keys, cells=4, strict=True)
    assert earlier.tolist() == [[[True, True, False, False]] * 2 + [[True, True, True, False]]]


def test_masked_attention_equals_float64() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 2, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    allow = torch.rand(2, 5, 7) < 0.5
    allow[..., 0] = True
    assert torch.allclose(masked_attention(q, k, v, allow).double(), naive(q, k, v, allow[:, None]), atol=1e-5)


def test_strictly_earlier_is_the_block_structure_after_the_shift() -> None:
    """Queries 1..T-1 against context 0..T-2: `loop` equals the mask f(j) < f(i) on original ids."""
    torch.manual_seed(0)
    cells, tubelets, kept = 6, 4, 2
    context = torch.tensor([[t * cells + cell for t in range(tubelets - 1) for cell in (1, 4)]])
    queries = torch.arange(cells, tubelets * cells)[None]
    q = rotate(torch.randn(1, 2, queries.shape[1], 12), rotary(queries, 12, 2, 3))
    k = rotate(torch.randn(1, 2, context.shape[1], 12), rotary(context, 12, 2, 3))
    v = torch.randn(1, 2, (tubelets - 1) * kept, 12)
    allow = allow_by_id(queries, context, cells, strict=True)
    assert torch.allclose(frame_attention(q, k, v, tubelets - 1).double(), naive(q, k, v, allow[:, None]), atol=1e-5)


def test_flash_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(ConfigError, match="nextvid\\[flash\\]"):
        flash_kernel()
