"""Effective rank and spread on features whose answer is known."""

import pytest
import torch

from nextvid.train.diagnose import CLIPS, effective_rank, feature_std, features_of, share
from nextvid.train.distributed import Ranks
from nextvid.train.step import build_model
from tests.nextvid.train.tiny import ALONE, tiny_recipe


def test_rank_of_equal_directions_counts_them() -> None:
    """Signs of k independent directions and their negatives: LayerNorm changes nothing, k equal eigenvalues."""
    generator = torch.Generator().manual_seed(0)
    for count in (1, 4, 16):
        hadamard = torch.tensor([[1.0]])
        while len(hadamard) < 32:
            hadamard = torch.cat((torch.cat((hadamard, hadamard), 1), torch.cat((hadamard, -hadamard), 1)))
        rows = hadamard[1 : count + 1]  # orthogonal, zero mean, unit variance
        tokens = torch.cat((rows, -rows))[torch.randperm(2 * count, generator=generator)]
        assert effective_rank(tokens) == pytest.approx(count, rel=1e-3)


def test_rank_of_noise_is_nearly_the_width_and_of_a_line_is_one() -> None:
    torch.manual_seed(0)
    assert effective_rank(torch.randn(4, 1000, 16)) == pytest.approx(15, abs=0.2)  # LayerNorm takes one direction
    direction = torch.randn(16)
    assert effective_rank(torch.randn(500, 1) * direction) == pytest.approx(1, abs=0.05)


def test_collapse_to_a_point() -> None:
    point = torch.randn(1, 8).expand(100, -1)
    assert effective_rank(point) == pytest.approx(1.0)
    assert feature_std(point) == pytest.approx(0.0, abs=1e-6)


def test_std_is_over_tokens() -> None:
    torch.manual_seed(0)
    scale = torch.tensor([1.0, 3.0])
    assert feature_std(torch.randn(2, 20000, 2) * scale + 100) == pytest.approx(2.0, rel=0.02)


@pytest.mark.parametrize(("count", "most"), [(2, 16384), (5, 100), (64, 7)])
def test_shares_of_all_ranks_are_the_features_of_one(count: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where ranks have unequal shares, or none, and where tokens are left out."""
    monkeypatch.setattr("nextvid.train.diagnose.MAX_TOKENS", most)
    encoder = build_model(tiny_recipe()).encoder
    tokens = torch.randn(CLIPS, 32, 8, generator=torch.Generator().manual_seed(0))
    wanted = features_of(encoder, tokens, 7, ALONE)
    assert len(wanted) <= most
    parts = []
    monkeypatch.setattr(Ranks, "sum", lambda _, values: values)
    for rank in range(count):
        ranks = Ranks(rank, count, ALONE.device)
        parts.append(features_of(encoder, tokens[share(ranks).start : share(ranks).stop], 7, ranks))
    torch.testing.assert_close(sum(parts), wanted)
