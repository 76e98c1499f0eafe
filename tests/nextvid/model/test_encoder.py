"""The encoder against a dense float64 one written out, its causality, and its initialisation."""

import math

import pytest
import torch
from torch import Tensor

from nextvid.config.recipe import EncoderConfig, ModelConfig
from nextvid.model.encoder import Encoder, EncoderBlock, all_ids, input_width, normed
from nextvid.model.tokens import gather_tokens, tube_ids
from tests.nextvid.model.tiny import (
    CELLS,
    HEIGHT,
    TUBELETS,
    WIDTH,
    clip,
    features,
    key,
    tiny_model,
    tiny_recipe,
    visible,
)

AXIS, HEAD = 4, 16  # of the tiny encoder: 2 * floor(floor(16 / 3) / 2)


def rotation(token: int) -> Tensor:
    """The whole rotation of one head as a matrix, float64."""
    matrix = torch.eye(HEAD, dtype=torch.float64)
    for part, place in enumerate((token // CELLS, token % CELLS // WIDTH, token % WIDTH)):
        for pair in range(AXIS // 2):
            angle, i = place * 10000 ** (-pair / (AXIS / 2)), part * AXIS + 2 * pair
            turn = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
            matrix[i : i + 2, i : i + 2] = torch.tensor(turn, dtype=torch.float64)
    return matrix


def dense(encoder: Encoder, tokens: Tensor, keep: Tensor) -> Tensor:
    """Every token of one clip [N, i] in float64; keys that are not kept, or later, get no weight."""
    encoder = encoder.double()
    x = encoder.embed(tokens.double())
    turns = torch.stack([rotation(token) for token in range(len(x))])
    tubelet = torch.arange(len(x)) // CELLS
    allow = (tubelet[None, :] <= tubelet[:, None]) & keep[None, :]
    allow |= torch.eye(len(x), dtype=torch.bool)  # dropped rows need some key; nobody reads them
    for block in encoder.blocks:
        assert isinstance(block, EncoderBlock)
        qkv = block.attn.qkv(block.norm1(x)).view(len(x), 3, -1, HEAD)
        heads = []
        for head in range(qkv.shape[2]):
            q, k = (torch.einsum("nij,nj->ni", turns, qkv[:, part, head]) for part in (0, 1))
            scores = (q @ k.T / HEAD**0.5).masked_fill(~allow, -torch.inf)
            heads.append(scores.softmax(dim=-1) @ qkv[:, 2, head])
        x = x + block.attn.proj(torch.cat(heads, dim=-1))
        x = x + block.mlp(block.norm2(x))
    return encoder.norm(x)


@pytest.mark.parametrize("backend", ["loop", "dense"])
def test_trap_02_packed_tokens_equal_masked_dense_ones(backend: str) -> None:
    recipe = tiny_recipe(model={"attention": backend})
    encoder = tiny_model(recipe).encoder
    tokens, _ = clip(recipe)
    for ids in visible():
        packed = encoder(gather_tokens(tokens, ids), TUBELETS, ids)
        ragged = encoder(gather_tokens(tokens, ids), None, ids)
        for row in range(len(tokens)):
            keep = torch.zeros(TUBELETS * CELLS, dtype=torch.bool)
            keep[ids[row]] = True
            expected = dense(tiny_model(recipe).encoder, tokens[row], keep)[ids[row]]
            assert (packed[row].double() - expected).abs().max() < 1e-5
            assert (ragged[row].double() - expected).abs().max() < 1e-5


def test_trap_03_positions_come_with_ids_not_with_order() -> None:
    encoder = tiny_model().encoder
    tokens, _ = clip()
    ids = visible()[0]
    order = torch.cat([t * 7 + torch.randperm(7, generator=torch.Generator().manual_seed(t)) for t in range(TUBELETS)])
    plain = encoder(gather_tokens(tokens, ids), TUBELETS, ids)
    permuted = encoder(gather_tokens(tokens, ids[:, order]), TUBELETS, ids[:, order])
    assert torch.allclose(permuted, plain[:, order], atol=1e-5)
    wrong = encoder(gather_tokens(tokens, ids[:, order]), TUBELETS, ids)
    assert not torch.allclose(wrong, plain[:, order], atol=1e-2)


def test_trap_09_a_tubelet_does_not_know_the_future() -> None:
    encoder = tiny_model().encoder
    tokens, _ = clip()
    before = encoder(tokens, TUBELETS)
    for t in range(TUBELETS):
        changed = tokens.clone()
        changed[:, t * CELLS :] = 9.0
        after = encoder(changed, TUBELETS)
        assert torch.equal(after[:, : t * CELLS], before[:, : t * CELLS])
        assert not torch.allclose(after[:, t * CELLS :], before[:, t * CELLS :], atol=1e-2)


def test_whole_clip_is_all_ids() -> None:
    encoder = tiny_model().encoder
    tokens, _ = clip()
    ids = all_ids(TUBELETS, CELLS).expand(2, -1)
    assert torch.equal(encoder(tokens, TUBELETS), encoder(tokens, TUBELETS, ids))


def test_one_cell_visible_gives_finite_numbers() -> None:
    encoder = tiny_model().encoder
    tokens, _ = clip()
    ids = tube_ids(torch.tensor([[5], [0]]), TUBELETS, CELLS)
    assert torch.isfinite(encoder(gather_tokens(tokens, ids), TUBELETS, ids)).all()


def test_levels_pass_the_final_norm() -> None:
    encoder = tiny_model().encoder
    tokens, _ = clip()
    first, last = encoder.levels(tokens, TUBELETS, (0, 1))
    assert torch.equal(last, encoder(tokens, TUBELETS))
    assert not torch.allclose(first, last, atol=1e-2)


def test_input_width_of_pixels_and_latents() -> None:
    assert input_width(ModelConfig()) == 1536  # docs/method.md 1
    assert input_width(ModelConfig(encoder=EncoderConfig(input="latents"))) == 64
    assert HEIGHT != WIDTH


@pytest.mark.parametrize(("width", "heads", "std"), [(128, 4, 128**-0.5), (512, 8, 0.02)])
def test_initialisation_by_width_and_depth(width: int, heads: int, std: float) -> None:
    """1/sqrt(fan_in) below width 512, else 0.02; residual outputs of block l over sqrt(2l) (docs/method.md 6.1)."""
    torch.manual_seed(0)
    encoder = Encoder(ModelConfig(encoder=EncoderConfig(depth=3, width=width, heads=heads, mlp_hidden=2 * width)))
    for number, block in enumerate(encoder.blocks, start=1):
        assert isinstance(block, EncoderBlock)
        assert float(block.attn.qkv.weight.detach().std()) == pytest.approx(std, rel=0.05)
        assert float(block.attn.proj.weight.detach().std()) == pytest.approx(std / math.sqrt(2 * number), rel=0.05)
        narrow = std if width == 512 else std / math.sqrt(2)  # fc2 reads 2 * width numbers
        assert float(block.mlp.fc2.weight.detach().std()) == pytest.approx(narrow / math.sqrt(2 * number), rel=0.05)
        assert not block.attn.qkv.bias.any()


def test_blocks_stay_in_bf16_under_autocast_with_statistics_in_fp32() -> None:
    """Residuals of all three parts; the norm of numbers that bf16 cannot sum is that of fp32, rounded once."""
    model, (tokens, targets) = tiny_model(), clip()
    dtypes: list[torch.dtype] = []
    for block in [b for part in (model.encoder, model.predictor, model.decoder) for b in part.blocks]:  # type: ignore[union-attr]
        block.register_forward_hook(lambda _block, _inputs, output: dtypes.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens, targets, features(model, tokens), visible(), key())
    assert dtypes
    assert set(dtypes) == {torch.bfloat16}
    layer, x = (
        torch.nn.LayerNorm(4096),
        100 + torch.randn(3, 4096, generator=torch.Generator().manual_seed(0)).bfloat16(),
    )
    with torch.autocast("cpu", torch.bfloat16):
        found = normed(layer, x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), layer(x.float()), rtol=2**-8, atol=1e-3)
