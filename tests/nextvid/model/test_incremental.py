"""Keys and values that are kept give what encoding all tubelets anew gives, for every predictor and decoder."""

from typing import Any

import pytest
import torch
from torch import Tensor

from nextvid.model.decoder import Positions
from nextvid.model.incremental import IncrementalPredictor, KeyValueCache
from nextvid.model.nextvid import Conditioned, NExTVid
from nextvid.model.tokens import gather_tokens, tube_ids
from tests.nextvid.model.tiny import CELLS, TUBELETS, clip, s_model, tiny_model, tiny_recipe

KINDS: dict[str, dict[str, Any]] = {
    "cross": {},
    "hidden": {"model": {"decoder": {"condition": "hidden"}}},
    "joint": {"model": {"predictor": {"kind": "joint"}}},
    "xattn": s_model("xattn"),
    "xattn_self": s_model("xattn_self"),
}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}  # of values of order one; rotary tables are fp32 in both


def anew(model: NExTVid, tokens: Tensor, cells: Tensor, known: int) -> Conditioned:
    """The slow way: encode tubelets 0..known-1 and keep of all predictions that of tubelet `known`."""
    ids = tube_ids(cells, known, CELLS)
    seen = model.condition(gather_tokens(tokens, ids), ids, known)
    positions = Positions(seen.positions.query_ids[:, -CELLS:], seen.positions.context_ids, frames=1)
    condition = seen.condition if seen.z is None else seen.condition[:, -CELLS:]
    return Conditioned(None if seen.z is None else seen.z[:, -CELLS:], condition, positions, frames=1)


def some_cells(kept: int) -> Tensor:
    """Other cells for each of two clips."""
    generator = torch.Generator().manual_seed(5)
    return torch.stack([torch.randperm(CELLS, generator=generator)[:kept].sort()[0] for _ in range(2)])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kept", [CELLS, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_kept_equals_anew(kind: str, kept: int, dtype: torch.dtype) -> None:
    model = tiny_model(tiny_recipe(**KINDS[kind])).to(dtype)
    tokens, cells = clip(model.recipe)[0].to(dtype), some_cells(kept)
    noisy = torch.randn(1, 2, 1, CELLS, 10, generator=torch.Generator().manual_seed(0)).to(dtype)
    tau = torch.full((1, 2, 1), 0.3)
    predictor = IncrementalPredictor(model)
    for known in range(1, TUBELETS):
        own = tokens[:, (known - 1) * CELLS : known * CELLS]
        kept_on, slow = predictor.predict(gather_tokens(own, cells), cells), anew(model, tokens, cells, known)
        assert torch.equal(kept_on.positions.query_ids, slow.positions.query_ids)
        torch.testing.assert_close(kept_on.condition, slow.condition, rtol=0, atol=TOLERANCE[dtype])
        fast, wanted = (model.velocity(seen, noisy, tau).detach() for seen in (kept_on, slow))
        assert float(wanted.std()) > 0.1
        torch.testing.assert_close(fast, wanted, rtol=0, atol=TOLERANCE[dtype])


def test_a_tubelet_costs_its_own_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    counted: list[int] = []
    model.encoder.blocks[0].register_forward_hook(lambda _, given, __: counted.append(given[0].shape[1]))
    tokens, predictor = clip(model.recipe)[0], IncrementalPredictor(model)
    for t in range(3):
        predictor.predict(tokens[:, t * CELLS : (t + 1) * CELLS], torch.arange(CELLS).expand(2, -1))
    assert counted == [CELLS] * 3


def test_queries_of_the_joint_predictor_are_not_kept() -> None:
    q, k, v = torch.randn(3, 1, 1, 5, 4, generator=torch.Generator().manual_seed(0))
    past = KeyValueCache()
    first = past.attend_joint(q, k, v, context=2)
    changed = k.clone()
    changed[:, :, 2:] += 1.0  # keys of queries, which only they themselves see
    other = KeyValueCache()
    other.attend_joint(q, changed, v, context=2)
    assert torch.equal(past.attend(q, k, v), other.attend(q, k, v))
    scores = torch.softmax(q[0, 0, 3] @ torch.cat((k[0, 0, :2], k[0, 0, 3:4])).T / 2, dim=-1)
    assert torch.allclose(first[0, 0, 3], scores @ torch.cat((v[0, 0, :2], v[0, 0, 3:4])), atol=1e-6)
