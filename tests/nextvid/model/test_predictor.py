"""Context isolation: what a prediction may know, where it stands, and that it writes nothing back."""

import pytest
import torch
from torch import Tensor

from nextvid.model.attention import allow_by_id
from nextvid.model.encoder import all_ids
from nextvid.model.nextvid import NExTVid
from nextvid.model.predictor import joint_mask
from nextvid.model.tokens import gather_tokens
from tests.nextvid.model.tiny import CELLS, TUBELETS, clip, tiny_model, tiny_recipe, visible

FRAMES = TUBELETS - 1


def predictions(model: NExTVid, tokens: Tensor, ids: Tensor) -> Tensor:
    """z of tubelets 1..T-1 as [B, T-1, S, D]."""
    context_ids = ids[:, : ids.shape[1] // TUBELETS * FRAMES]
    seen = model.condition(gather_tokens(tokens, context_ids), context_ids, FRAMES)
    assert seen.z is not None
    return seen.z.unflatten(1, (FRAMES, CELLS))


@pytest.mark.parametrize("kind", ["cross", "joint"])
def test_trap_01_a_query_sees_strictly_earlier_tubelets(kind: str) -> None:
    recipe = tiny_recipe(model={"predictor": {"kind": kind}})
    model = tiny_model(recipe)
    tokens, _ = clip(recipe)
    ids = visible()[0]
    before = predictions(model, tokens, ids)
    for t in range(1, TUBELETS):
        changed = tokens.clone()
        changed[:, t * CELLS :] = torch.randn(changed[:, t * CELLS :].shape, generator=torch.Generator().manual_seed(t))
        after = predictions(model, changed, ids)
        assert torch.equal(after[:, :t], before[:, :t])  # z_1..z_t
        if t < FRAMES:
            assert not torch.allclose(after[:, t], before[:, t], atol=1e-3)  # z_{t+1} reads tubelet t


def test_trap_02_packed_context_equals_masks_from_ids() -> None:
    model = tiny_model()
    assert model.predictor is not None
    queries = all_ids(FRAMES, CELLS) + CELLS
    for ids in visible():
        context_ids = ids[:, : ids.shape[1] // TUBELETS * FRAMES]
        context = torch.randn(2, context_ids.shape[1], 32, generator=torch.Generator().manual_seed(0))
        packed = model.predictor(context, context_ids, queries, FRAMES)
        masked = model.predictor(context, context_ids, queries, None)
        assert torch.allclose(packed.z, masked.z, atol=1e-5)


def shifted(model: NExTVid, rows_of_queries: int, rows_of_context: int) -> Tensor:
    """z with rows (h) of the ids moved down; the attention's blocks stay what they were."""
    assert model.predictor is not None
    generator = torch.Generator().manual_seed(0)
    tall = tiny_recipe(model={"grid_height": 9}).model  # room to shift without leaving the tubelet
    model.predictor.model = tall
    cells = torch.tensor([0, 3, 5, 10])
    context_ids = (torch.arange(FRAMES)[:, None] * tall.cells + cells + 4 * rows_of_context).flatten()[None]
    query_ids = (torch.arange(1, TUBELETS)[:, None] * tall.cells + torch.arange(12) + 4 * rows_of_queries).flatten()
    context = torch.randn(2, context_ids.shape[1], 32, generator=generator)
    z: Tensor = model.predictor(context, context_ids, query_ids[None], FRAMES).z
    return z


def test_trap_04_both_sides_of_cross_attention_turn_by_their_own_ids() -> None:
    model = tiny_model()
    here = shifted(model, 0, 0)
    assert torch.allclose(shifted(model, 2, 2), here, atol=1e-5)
    assert not torch.allclose(shifted(model, 0, 2), here, atol=1e-3)


def test_trap_08_context_is_read_and_never_written() -> None:
    recipe = tiny_recipe()
    model = tiny_model(recipe)
    assert model.predictor is not None
    taken: list[Tensor] = []
    for block in model.predictor.blocks:
        block.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[1].clone()))
        block.register_forward_hook(lambda _, inputs, __: taken.append(inputs[1].clone()))
    predictions(model, clip(recipe)[0], visible()[0])
    assert len(taken) == 2 * recipe.model.predictor.depth
    assert all(torch.equal(each, taken[0]) for each in taken)
    context = torch.randn(2, FRAMES * 3, 32, generator=torch.Generator().manual_seed(0))
    before, ids = context.clone(), visible()[1][:, : FRAMES * 3]
    model.predictor(context, ids, all_ids(FRAMES, CELLS) + CELLS, FRAMES)
    assert torch.equal(context, before)


def test_queries_do_not_see_each_other() -> None:
    model = tiny_model()
    assert model.predictor is not None
    context = torch.randn(2, FRAMES * 3, 32, generator=torch.Generator().manual_seed(0))
    ids = visible()[1][:, : FRAMES * 3]
    queries = all_ids(FRAMES, CELLS) + CELLS
    few = queries.unflatten(1, (FRAMES, CELLS))[:, :, [1, 6]].flatten(1)
    alone = model.predictor(context, ids, few, FRAMES).z
    together = (
        model.predictor(context, ids, queries, FRAMES).z.unflatten(1, (FRAMES, CELLS))[:, :, [1, 6]].flatten(1, 2)
    )
    assert torch.allclose(alone, together, atol=1e-5)


def test_query_token_starts_at_zero_and_learns() -> None:
    recipe = tiny_recipe()
    model = tiny_model(recipe, trained=False)
    assert model.predictor is not None
    assert not model.predictor.query.any()
    predictions(model, clip(recipe)[0], visible()[0]).square().mean().backward()
    assert model.predictor.query.grad is not None
    assert float(model.predictor.query.grad.norm()) > 0


def test_joint_mask() -> None:
    context, queries = torch.tensor([[0, 3, 5]]), torch.tensor([[4, 5, 9]])
    allow = joint_mask(context, queries, cells=4)[0]
    assert torch.equal(allow[:3, :3], allow_by_id(context, context, 4, strict=False)[0])
    assert not allow[:3, 3:].any()
    assert allow[3:, :3].tolist() == [[True, True, False]] * 2 + [[True, True, True]]
    assert torch.equal(allow[3:, 3:], torch.eye(3, dtype=torch.bool))


def test_joint_has_as_many_weights_as_cross() -> None:
    """Same but for the context's own norm and its projection's rows: docs/method.md 10."""
    counts = []
    for kind in ("cross", "joint"):
        predictor = tiny_model(tiny_recipe(model={"predictor": {"kind": kind}})).predictor
        assert predictor is not None
        counts.append(sum(parameter.numel() for parameter in predictor.parameters()))
    depth, width = 2, 32
    assert counts[0] - counts[1] == depth * 2 * width
