"""What the benchmark of number formats says of models that were trained on each: no model is trained here."""

from statistics import stdev
from typing import Any

import pytest

from benchmarks.trained_formats import differences, films
from examples.demo.scenes import MOTIONS

LOSSES = {0: (0.50, 0.52), 1: (0.60, 0.63), 2: (0.40, 0.41)}  # by seed: float16, int8


def _lines(seeds: int) -> list[dict[str, Any]]:
    return [
        {"seed": seed, "format": storage, "flow loss": LOSSES[seed][place], "motion": 0.2, "shape": 0.1 * place}
        for seed in range(seeds)
        for place, storage in enumerate(("float16", "int8"))
    ]


def test_formats_are_compared_seed_by_seed() -> None:
    float16, int8 = differences(_lines(3))
    assert float16["flow loss"] == pytest.approx(0.5)
    assert float16["flow loss, difference"] == 0
    assert int8["flow loss, difference"] == pytest.approx(0.02)
    assert int8["flow loss, ±"] == pytest.approx(4.303 * stdev([0.02, 0.03, 0.01]) / 3**0.5)
    assert int8["motion, difference"] == 0
    assert int8["shape, difference"] == pytest.approx(0.1)


def test_one_seed_has_no_interval() -> None:
    assert [line["flow loss, ±"] for line in differences(_lines(1))] == [None, None]


def test_films_show_what_their_labels_say_and_seeds_differ() -> None:
    some, others = films(3), films(3, seed=1)
    assert some.frames.shape == (3, 8, 64, 64, 3)
    assert set(some.motions) <= set(range(len(MOTIONS)))
    assert (some.frames == films(3).frames).all()
    assert (some.frames != others.frames).any()
