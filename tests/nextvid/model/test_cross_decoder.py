"""The simplified model's decoders: what a noisy token may see (docs/method.md 10)."""

import torch
from torch import Tensor

from nextvid.model.decoder import CrossFlowDecoder, Positions
from nextvid.model.encoder import all_ids
from tests.nextvid.model.tiny import CELLS, TUBELETS, s_model, tiny_model, tiny_recipe, visible

FRAMES, COPIES = TUBELETS - 1, 2


def parts(kind: str) -> tuple[CrossFlowDecoder, Tensor, Tensor, Tensor, Positions]:
    decoder = tiny_model(tiny_recipe(**s_model(kind))).decoder
    assert isinstance(decoder, CrossFlowDecoder)
    generator = torch.Generator().manual_seed(0)
    ids = visible()[0][:, : FRAMES * 7]
    context = torch.randn(2, FRAMES * 7, 32, generator=generator)
    noisy = torch.randn(COPIES, 2, FRAMES, CELLS, 10, generator=generator)
    tau = torch.rand(COPIES, 2, 1, generator=generator).expand(-1, -1, FRAMES)
    return decoder, context, noisy, tau, Positions(all_ids(FRAMES, CELLS) + CELLS, ids, FRAMES)


def test_tokens_read_strictly_earlier_context_alone() -> None:
    decoder, context, noisy, tau, positions = parts("xattn")
    before = decoder(context, noisy, tau, positions)
    for t in range(FRAMES):
        changed = context.clone()
        changed[:, t * 7 :] += 1.0
        after = decoder(changed, noisy, tau, positions)
        assert torch.equal(after[:, :, :t], before[:, :, :t])
        assert not torch.allclose(after[:, :, t], before[:, :, t], atol=1e-3)


def test_noisy_tokens_are_alone_in_xattn_and_together_in_xattn_self() -> None:
    for kind in ("xattn", "xattn_self"):
        decoder, context, noisy, tau, positions = parts(kind)
        before = decoder(context, noisy, tau, positions)
        changed = noisy.clone()
        changed[1, 0, 1, 5] += 1.0
        moved = (decoder(context, changed, tau, positions) != before).any(dim=-1)
        expected = torch.zeros_like(moved)
        expected[1, 0] = kind == "xattn_self"
        expected[1, 0, 1, 5] = True
        assert torch.equal(moved, expected)


def test_blocks_equal_masks_from_ids_and_copies_fold() -> None:
    decoder, context, noisy, tau, positions = parts("xattn")
    together = decoder(context, noisy, tau, positions)
    by_ids = decoder(context, noisy, tau, Positions(positions.query_ids, positions.context_ids, None))
    assert torch.allclose(together, by_ids, atol=1e-5)
    for copy in range(COPIES):
        alone = decoder(context, noisy[copy : copy + 1], tau[copy : copy + 1], positions)
        assert torch.allclose(together[copy : copy + 1], alone, atol=1e-5)
