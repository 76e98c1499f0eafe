"""Strict configurations: misspelt keys, contradictions, digests."""

from typing import Any

import pytest

from nextvid.config.recipe import ExecutionConfig, MaskConfig, RecipeConfig
from nextvid.config.recipes import recipe
from nextvid.config.strict import parse
from storage.errors import ConfigError


def changed(*path: str, value: object) -> dict[str, Any]:
    """The demo recipe as plain values, with one of them replaced or added."""
    values = recipe("demo").model_dump()
    inside: Any = values
    for part in path[:-1]:
        inside = inside[part]
    inside[path[-1]] = value
    return values


def test_plain_values_round_trip() -> None:
    assert parse(RecipeConfig, recipe("demo").model_dump(), "here") == recipe("demo")


@pytest.mark.parametrize(
    ("path", "near"),
    [
        (("optimm",), "optim"),
        (("model", "grid_hight"), "grid_height"),
        (("model", "encoder", "widht"), "width"),
        (("losses", "flows"), "flow"),
    ],
)
def test_a_misspelt_key_is_refused_with_the_nearest(path: tuple[str, ...], near: str) -> None:
    with pytest.raises(ConfigError, match=f"corpus.yaml: unknown key '{'.'.join(path)}'; did you mean '{near}'"):
        parse(RecipeConfig, changed(*path, value=1), "corpus.yaml")


def test_a_misspelt_key_inside_a_list_is_found() -> None:
    values = MaskConfig().model_dump()
    values["strategies"] = [*values["strategies"][:1], {**values["strategies"][1], "budgett": 3}]
    with pytest.raises(ConfigError, match="did you mean 'budget'"):
        parse(MaskConfig, values, "here")


def test_an_impossible_value_names_its_place() -> None:
    with pytest.raises(ConfigError, match=r"there: 'device'.*got 'tpu'"):
        parse(ExecutionConfig, {"device": "tpu"}, "there")


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("model", "encoder", "heads"), 3, "encoder: width 128 is not 3 heads"),
        (("model", "predictor", "width"), 62, "predictor: width 62 is not 2 heads"),
        (("model", "decoder", "kind"), "none", "losses.flow > 0 needs a decoder"),
        (("losses", "flow"), 0.0, "losses.flow = 0 needs decoder.kind 'none'"),
        (("model", "predictor", "kind"), "none", "losses.align > 0 needs a predictor"),
        (("model", "decoder", "kind"), "xattn", "these with no predictor"),
        (("losses", "target"), "pixels", "encoder.input 'latents' needs losses.target = 'latents'"),
        (("losses", "target"), "pixels", r"frame_channels = 3 \* patch\^2 = 192"),
        (("masks", "strategies", 0, "budget"), 65, "budget 65 is not within 1..64 cells"),
        (("stages", 0, "frames"), 7, "7 frames are not whole tubelets of 2"),
        (("optim", "spikes"), {"deviations": 1.0}, "deviations 1 would skip every step in the end"),
        (("optim", "spikes"), {"window": 1}, "a window of 1 step has no deviation"),
        (("optim", "spikes"), {"stop_after": 1000}, "stop_after = 1000 never ends these 1000 steps, .* at most 900"),
    ],
)
def test_contradictions_are_refused(path: tuple[Any, ...], value: object, says: str) -> None:
    values = changed("seed", value=0)
    values["stages"], values["masks"]["strategies"] = list(values["stages"]), list(values["masks"]["strategies"])
    inside: Any = values
    for part in path[:-1]:
        inside = inside[part]
    inside[path[-1]] = value
    with pytest.raises(ConfigError, match=says):
        parse(RecipeConfig, values, "here")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("model", "encoder", "heads"), 0),
        (("model", "predictor", "depth"), -1),
        (("model", "grid_height"), 0),
        (("model", "patch"), 0),
        (("losses", "flow"), -0.5),
        (("losses", "align"), float("inf")),
        (("losses", "timesteps"), 0),
        (("optim", "ema"), 1.5),
        (("masks", "entries"), 0),
    ],
)
def test_numbers_out_of_bounds_name_their_place(path: tuple[str, ...], value: float) -> None:
    with pytest.raises(ConfigError, match=rf"^here: '{'.'.join(path)}': Input should be .*\(got {value}\)$"):
        parse(RecipeConfig, changed(*path, value=value), "here")


def test_ways_to_carry_out_that_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="choose one"):
        parse(ExecutionConfig, {"shard": True, "fold_copies": True}, "how")
    for alone in ({"nodes": 2, "ranks": 3, "rendezvous": "a:1"}, {"rendezvous": "a:1"}):
        with pytest.raises(ConfigError, match="nodes must divide the number of ranks"):
            parse(ExecutionConfig, alone, "how")


def test_a_recipe_has_stages_and_strategies() -> None:
    with pytest.raises(ConfigError, match="at least one stage"):
        parse(RecipeConfig, changed("stages", value=[]), "here")
    with pytest.raises(ConfigError, match=r"set masks\.keep = 'all'"):
        parse(RecipeConfig, changed("masks", "strategies", value=[]), "here")


def test_masked_support_needs_masks_and_joined_decoder_one_time() -> None:
    values = changed("masks", "keep", value="all")
    values["model"]["predictor"]["support"] = "masked"
    with pytest.raises(ConfigError, match="needs masked tubes"):
        parse(RecipeConfig, values, "here")
    values = changed("model", "decoder", "kind", value="xattn_self")
    with pytest.raises(ConfigError, match="tau_share = 'clip'"):
        parse(RecipeConfig, values, "here")


def test_digest_changes_with_any_value_and_only_then() -> None:
    base = recipe("demo").digest()
    assert parse(RecipeConfig, recipe("demo").model_dump(), "here").digest() == base
    for path, value in ((("seed",), 1), (("optim", "ema"), 0.99001), (("model", "decoder", "depth"), 3)):
        assert parse(RecipeConfig, changed(*path, value=value), "here").digest() != base


def test_sums_over_stages() -> None:
    config = recipe("nextvid_l")
    assert config.steps == 132_000
    assert config.clip_lengths == (16, 64)
    assert (config.model.cells, config.model.target_channels) == (256, 64)
