"""Splits: official first, then by group, then by media; shares, and that growth moves nothing."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextvid.config.datasets import SplitConfig
from nextvid.corpus.manifest import Split, split_of


def ids(n: int) -> list[bytes]:
    return [hashlib.blake2b(str(i).encode(), digest_size=16).digest() for i in range(n)]


@given(st.binary(min_size=16, max_size=16), st.binary(min_size=16, max_size=16), st.text(max_size=8))
def test_a_group_is_in_one_split(one: bytes, other: bytes, group: str) -> None:
    config = SplitConfig(val=0.3, test=0.3)
    assert split_of(config, None, group, one) == split_of(config, None, group, other)


@given(st.binary(min_size=16, max_size=16))
def test_the_official_split_wins(media: bytes) -> None:
    config = SplitConfig(val=0.5, test=0.5)
    assert split_of(config, "train", "anna", media) == "train"


def test_shares_are_as_configured() -> None:
    config = SplitConfig(val=0.1, test=0.2)
    found = [split_of(config, None, None, media) for media in ids(20_000)]
    shares: dict[Split, float] = {"test": 0.2, "val": 0.1, "train": 0.7}
    for name, share in shares.items():
        # four standard deviations of a binomial share over 20,000 files
        assert found.count(name) / 20_000 == pytest.approx(share, abs=4 * (share * (1 - share) / 20_000) ** 0.5)


def test_a_smaller_share_of_test_keeps_what_is_test() -> None:
    few, many = SplitConfig(test=0.1), SplitConfig(test=0.3)
    assert all(
        split_of(many, None, None, media) == "test" for media in ids(500) if split_of(few, None, None, media) == "test"
    )


@pytest.mark.parametrize(("test", "expected"), [(0.0, {"train"}), (1.0, {"test"})])
def test_shares_of_nothing_and_all(test: float, expected: set[str]) -> None:
    assert {split_of(SplitConfig(test=test), None, None, media) for media in ids(200)} == expected


def test_the_rule_never_changes() -> None:
    """Pinned: a change here would move files between train and test in every existing corpus."""
    config = SplitConfig(val=0.25, test=0.25)
    assert [split_of(config, None, None, media) for media in ids(6)] == PINNED_MEDIA
    assert [split_of(config, None, name, b"\0" * 16) for name in ("anna", "ben", "cleo", "dan")] == PINNED_GROUPS


PINNED_MEDIA = ["test", "test", "val", "val", "train", "test"]
PINNED_GROUPS = ["test", "val", "val", "train"]
