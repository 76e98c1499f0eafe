"""Colours of features: the same direction has the same colour everywhere, and lies over its own place."""

import numpy as np

from nextvid.features.dense import FITTED, PrincipalColours, over_frames


def test_colours_follow_three_directions_whatever_the_order_of_tokens() -> None:
    rng = np.random.default_rng(0)
    directions = np.linalg.qr(rng.normal(size=(12, 3)))[0].T * [[9.0], [4.0], [2.0]]
    parts = rng.uniform(-1, 1, size=(3000, 3))
    tokens = (parts @ directions + 0.01 * rng.normal(size=(3000, 12))).astype(np.float32)
    colours = PrincipalColours(tokens).of(tokens)
    for part, colour in zip(parts.T, colours.T, strict=True):
        assert abs(np.corrcoef(part, colour)[0, 1]) > 0.98
    again = PrincipalColours(tokens[rng.permutation(3000)]).of(tokens)
    assert abs(colours.astype(int) - again).max() <= 1, "signs and scales are the features' own"


def test_a_few_tokens_stand_for_many() -> None:
    tokens = np.random.default_rng(1).normal(size=(4 * FITTED, 6)).astype(np.float32) * [9, 6, 4, 1, 1, 1]
    few, all_of_them = PrincipalColours(tokens), PrincipalColours(tokens[:FITTED])
    shown = tokens.reshape(4, -1, 6)
    assert few.of(shown).shape == (*shown.shape[:2], 3)
    assert abs(few.of(shown).astype(int) - all_of_them.of(shown)).mean() < 16


def test_two_tokens_have_fewer_colours() -> None:
    assert PrincipalColours(np.eye(2, dtype=np.float32)).of(np.eye(2, dtype=np.float32))[:, 2].tolist() == [0, 0]


def test_colours_lie_over_their_cells() -> None:
    frames = np.zeros((4, 8, 8, 3), np.uint8)
    colours = np.zeros((2, 2, 4, 3), np.uint8)
    colours[1, 0, 3] = 200
    over = over_frames(frames, colours)
    assert over.shape == (2, 8, 8, 3)
    assert (over[1, :4, 6:] == 130).all()
    assert over.sum() == over[1, :4, 6:].sum()
    assert over_frames(frames[:1], colours).shape == (1, 8, 8, 3), "an image is one tubelet"
