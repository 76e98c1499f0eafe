"""Intervals against textbook values, and the page of results that are written by hand."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from examples.demo.scenes import MOTIONS
from examples.study.drawing import draw_clip
from examples.study.page import interval, paired, write_page
from examples.study.runs import result_file
from examples.study.tables import DATA, FULL, QUICK, TABLES, Cell, cells, overrides
from nextvid.config.overrides import apply_overrides
from nextvid.config.recipes import recipe
from storage.atomic import publish_json

SIZE = replace(QUICK, seeds=3, data=("stills",))


def write_results(root: Path, arms: dict[str, list[float]]) -> None:
    """Results of some arms on stills, one a seed."""
    for arm, accuracies in arms.items():
        for seed, accuracy in enumerate(accuracies):
            scores = {"shape": {"accuracy": accuracy}}
            found = {"scores": scores, "tested": {"shape": 10}, "cpu_s": 60.0, "flow": {"first": 2.0, "last": 0.5}}
            publish_json(str(result_file(root, Cell("stills", arm, seed), SIZE)), found)


def test_an_interval_is_students() -> None:
    found = interval([1.0, 2.0, 3.0, 4.0])
    assert found.mean == 2.5
    assert found.half == pytest.approx(3.182 * np.std([1, 2, 3, 4], ddof=1) / 2, rel=1e-3)  # t of 3 degrees at .975
    assert found.verdict == "above zero"
    assert interval([-1.0, 2.0]).verdict == "undecided"
    assert math.isnan(interval([1.0]).half)


def test_differences_are_of_the_seeds_that_both_have() -> None:
    assert paired({0: 1.0, 1: 5.0, 2: 2.0}, {1: 3.0, 2: 4.0, 3: 0.0}) == {1: 2.0, 2: -2.0}


def test_the_page_says_what_is_in_and_which_side_a_difference_is_on(tmp_path: Path) -> None:
    write_results(tmp_path, {"s_masked": [0.38, 0.39, 0.40], "s_unmasked": [0.30, 0.32, 0.31], "random": [0.35]})
    write_page(tmp_path, tmp_path / "page", SIZE)
    page = (tmp_path / "page" / "study.md").read_text()
    assert "| stills | shape | `s_masked` - `s_unmasked` | +8.0 ± 2.5 | +8.0, +7.0, +9.0 | 3 | above zero |" in page
    assert "| `s_masked` - `random` | +3.0 | +3.0 | 1 | one seed |" in page
    assert "7 of 9 runs are in: **unfinished**" in page
    assert (tmp_path / "page" / "study.png").read_bytes()[:4] == b"\x89PNG"


def test_the_page_of_nothing_says_so(tmp_path: Path) -> None:
    write_page(tmp_path, tmp_path, SIZE)
    assert "**It is unfinished" in (tmp_path / "study.md").read_text()


def test_every_declared_run_has_a_recipe_and_its_own_result() -> None:
    wanted = list(cells(FULL))
    assert len({cell.file(FULL) for cell in wanted}) == len(wanted)
    assert {arm for table in TABLES.values() for arm in table.arms} == {cell.arm for cell in wanted}
    assert wanted[0].file(FULL) != wanted[0].file(replace(FULL, steps=330))
    assert wanted[0].file(FULL) == wanted[0].file(replace(FULL, seeds=9))  # more seeds keep what there is
    for cell in {cell.arm: cell for cell in wanted}.values():
        assert apply_overrides(recipe("demo"), overrides(cell, FULL)).steps == FULL.steps


def test_differences_name_arms_of_their_table() -> None:
    for table in TABLES.values():
        assert {arm for pair in table.differences for arm in pair} <= set(table.arms)
        assert set(table.data) <= set(DATA)


@pytest.mark.parametrize("motion", MOTIONS)
def test_clips_differ_in_speed_alone(motion: str) -> None:
    clips = {
        name: draw_clip(np.random.default_rng(3), 7, motion, DATA[name].speed, DATA[name].drift)
        for name in ("stills", "drift", "moving")
    }
    moved = {name: np.abs(np.diff(clip.astype(float), axis=0)).mean() for name, clip in clips.items()}
    assert moved["stills"] == 0 < moved["drift"] < moved["moving"]
    middles = [clip[4:6].astype(float).mean(0) for clip in clips.values()]
    assert max(np.abs(middle - middles[0]).mean() for middle in middles) < 6  # grey levels: half a frame's motion
