"""Blocks against a float64 softmax written out, forward and backward; masks from ids."""

import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from nextvid.config.recipe import ConfigError
from nextvid.model.attention import (
    Backend,
    allow_by_id,
    block_attention,
    flash_kernel,
    frame_attention,
    frame_mask,
    masked_attention,
    rotary,
    rotate,
)


def naive(q: Tensor, k: Tensor, v: Tensor, allow: Tensor) -> Tensor:
    """Softmax attention in float64, one line a step."""
    scores = q.double() @ k.double().transpose(-1, -2) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(~allow, -torch.inf)
    return torch.softmax(scores, dim=-1) @ v.double()


def blocks(frames: int, rows: int, keys: int) -> Tensor:
    row = torch.arange(frames).repeat_interleave(rows)
    column = torch.arange(frames).repeat_interleave(keys)
    return column[None, :] <= row[:, None]


@pytest.mark.parametrize("backend", ["loop", "dense", "block"])
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


@pytest.mark.parametrize("backend", ["loop", "dense"])
@pytest.mark.parametrize("frames", [2, 8, 32])
@pytest.mark.parametrize("head_dim", [32, 64, 80])
def test_method_s_sizes_equal_float64(head_dim: int, frames: int, backend: Backend) -> None:
    """13 queries and 7 keys a tubelet, multiples of nothing; forward and gradients."""
    rows, keys = 13, 7
    generator = torch.Generator().manual_seed(head_dim + frames)
    q = torch.randn(1, 2, frames * rows, head_dim, generator=generator, requires_grad=True)
    k, v = (torch.randn(1, 2, frames * keys, head_dim, generator=generator, requires_grad=True) for _ in range(2))
    weights = torch.randn(q.shape, generator=generator)
    out, expected = frame_attention(q, k, v, frames, backend), naive(q, k, v, blocks(frames, rows, keys))
    error = (out.double() - expected).abs().max() / expected.abs().max()
    assert float(error.detach()) < 2e-6  # measured: 3e-7 to 1e-6
    grads = torch.autograd.grad((out * weights).sum(), (q, k, v))
    wanted = torch.autograd.grad((expected * weights).sum(), (q, k, v))
    for grad, want in zip(grads, wanted, strict=True):
        assert float((grad.double() - want).abs().max() / want.abs().max()) < 5e-6


def flash_attn_of(attend: Any) -> ModuleType:
    """Stands in for the package: the same function on its axes [B, L, h, e], one dtype for all three."""
    module = ModuleType("flash_attn")

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert q.dtype == k.dtype == v.dtype
        assert q.shape[0::2] == k.shape[0::2], "heads stand third"
        return attend(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    module.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    return module


@pytest.mark.parametrize("frames", [2, 8])
@pytest.mark.parametrize("head_dim", [32, 64, 80])
def test_flash_hands_over_blocks_on_its_own_axes(head_dim: int, frames: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop and the axes around the kernel, not the kernel; q and k come from fp32 rotation, v decides the dtype."""
    monkeypatch.setitem(sys.modules, "flash_attn", flash_attn_of(scaled_dot_product_attention))
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, frames * 13, head_dim, generator=generator)
    k, v = (torch.randn(2, 3, frames * 7, head_dim, generator=generator) for _ in range(2))
    out = frame_attention(q, k, v, frames, "flash")
    assert torch.allclose(out.double(), naive(q, k, v, blocks(frames, 13, 7)), atol=1e-5)
    assert frame_attention(q, k, v.bfloat16(), frames, "flash").dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize(("frames", "rows", "keys"), [(1, 5, 3), (4, 13, 7), (3, 100, 60)])
def test_block_kernel_and_its_mask_equal_float64(
    frames: int, rows: int, keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a GPU calls it, but not compiled, and forward alone: flex attention has no backward on the CPU."""
    monkeypatch.setattr("nextvid.model.attention._compiled_flex", lambda: flex_attention)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 2, frames * rows, 16, generator=generator)
    k, v = (torch.randn(2, 2, frames * keys, 16, generator=generator) for _ in range(2))
    found = block_attention(q, k, v, frame_mask(frames, q.shape[2], k.shape[2], q.device))
    assert torch.allclose(found.double(), naive(q, k, v, blocks(frames, rows, keys)), atol=1e-5)


def test_flash_is_imported_only_when_asked_for() -> None:
    """Also where it is installed: importing the model must not load a CUDA extension."""
    code = (
        "import sys, nextvid.model.nextvid, nextvid.train.step\n"
        "assert not any(name.partition('.')[0] == 'flash_attn' for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_loop_in_bf16_is_close_to_float64() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 4 * 13, 32) for _ in range(3))
    out = frame_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), 4, "loop")
    expected = naive(q.bfloat16(), k.bfloat16(), v.bfloat16(), blocks(4, 13, 13))
    assert (out.double() - expected).abs().max() / expected.abs().max() < 2e-2  # measured: 3e-3 to 1e-2


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
