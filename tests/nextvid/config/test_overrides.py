"""Overrides reach every kind of place and refuse what is not there."""

import pytest

from nextvid.config.overrides import apply_how, apply_overrides
from nextvid.config.recipe import ExecutionConfig, MaskConfig, RecipeConfig, StageConfig
from storage.errors import ConfigError


def _recipe() -> RecipeConfig:
    stage = StageConfig(name="warmup", steps=4, frames=16, batch=8, tau_copies=1, lr_start=1e-4, lr_end=5e-4)
    return RecipeConfig(name="tiny", masks=MaskConfig(), stages=(stage, stage.model_copy(update={"name": "stable1"})))


def test_reaches_scalars_named_and_numbered_members() -> None:
    changed = apply_overrides(
        _recipe(),
        ["model.encoder.depth=6", "stages.stable1.steps=9", "masks.strategies.0.budget=50", "stages.0.decoder_lr=2e-3"],
    )
    assert changed.model.encoder.depth == 6
    assert [stage.steps for stage in changed.stages] == [4, 9]
    assert [strategy.budget for strategy in changed.masks.strategies] == [50, 15]
    assert changed.stages[0].decoder_lr == 2e-3
    assert changed.digest() != _recipe().digest()


def test_no_overrides_is_the_recipe_itself() -> None:
    assert apply_overrides(_recipe(), []) == _recipe()


def test_text_values_and_null() -> None:
    changed = apply_overrides(_recipe(), ["precision=fp32", "stages.warmup.decoder_lr=null"])
    assert changed.precision == "fp32"
    assert changed.stages[0].decoder_lr is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.encoder.dept=6", "did you mean 'depth'"),
        ("stages.warmpu.steps=6", "did you mean 'warmup'"),
        ("stages.7.steps=6", "there is no '7'"),
        ("seed", "key.path=value"),
        ("seed.deeper=1", "nothing below"),
        ("precision=fp8", "precision"),
        ("stages.warmup.frames=15", "tubelets"),
    ],
)
def test_refuses_with_the_remedy(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply_overrides(_recipe(), [override])


def test_how_is_overridden_as_strictly() -> None:
    assert apply_how(ExecutionConfig(), ()) == ExecutionConfig()
    found = apply_how(ExecutionConfig(), ["ranks=2", "device=cpu"])
    assert (found.ranks, found.device) == (2, "cpu")
    with pytest.raises(ConfigError, match="did you mean 'device'"):
        apply_how(ExecutionConfig(), ["devise=cpu"])
    with pytest.raises(ConfigError, match="ranks"):
        apply_how(ExecutionConfig(), ["ranks=many"])
