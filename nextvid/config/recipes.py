"""Named, complete training configurations: functions that return recipes; every value cites its source.

The paper's three models, scaled ones for one GPU and one day, each also with latents as encoder input, the demo's, and
by name the ablations (ablations.py). A project's own are YAML files beside its corpus.yaml.
"""

import difflib
import math
from pathlib import Path
from typing import Any

from pydantic import Field

from nextvid.config.ablations import ABLATIONS, ablation
from nextvid.config.corpus import NAME
from nextvid.config.overrides import apply_overrides, as_overrides
from nextvid.config.recipe import (
    DecoderConfig,
    EncoderConfig,
    MaskConfig,
    MaskStrategy,
    ModelConfig,
    OptimConfig,
    PredictorConfig,
    RecipeConfig,
    StageConfig,
)
from nextvid.config.strict import Strict, parse
from nextvid.config.yaml_file import read_yaml
from storage.errors import ConfigError

PAPER_BATCH = 3072  # clips, Tab. 8
STAGE_NAMES = ("warmup", "stable1", "stable2", "cooldown")
STAGE_SHARES = (1 / 11, 7 / 33, 20 / 33, 1 / 11)  # of all steps: 12K, 28K, 80K, 12K of 132K, Tab. 8
PAPER_PEAK = 5e-4  # main learning rate, Tab. 8
RATES = (0.2, 1.0, 0.9, 0.2, 0.002)  # main rate at the stages' edges over the peak, Tab. 8
DECODER_RATES = (None, None, 1.6, 0.6)  # 8e-4 and 3e-4 over the peak, Tab. 8; None follows the main rate
COOLDOWN_SPAN = 4  # cool-down clips are 4 times as long and a quarter as many, Tab. 8
EMA_SHARE = 0.0101  # the average's horizon over all steps: 1333 of 132K, docs/method.md 7.3
EMA_SHORTEST = 100  # steps, docs/method.md 7.3

FOLDER = "recipes"  # beside corpus.yaml: a project's own
RECIPES: tuple[str, ...] = (
    *(f"nextvid_{size}{suffix}" for suffix in ("", "_latent") for size in "lhgbs"),
    "demo",
    *ABLATIONS,
)


class OwnRecipe(Strict):
    """A project's own recipe, recipes/<name>.yaml beside corpus.yaml: one that is built in, with changes."""

    base: str
    overrides: dict[str, Any] = Field(default_factory=dict)  # nested as in a recipe, or by paths such as `a.b: 1`


def own_recipes(corpus: Path) -> tuple[str, ...]:
    """Names of the recipes in the folder recipes/ beside this corpus.yaml; a file is read only when it is used."""
    found = (path.stem for path in (corpus.parent / FOLDER).glob("*.yaml"))
    return tuple(sorted(name for name in found if NAME.fullmatch(name)))


def recipe(name: str, corpus: Path | None = None) -> RecipeConfig:
    """The recipe of that name; beside `corpus`, also a project's own. Raises ConfigError with the nearest name."""
    own = own_recipes(corpus) if corpus else ()
    if corpus and name in own:
        file = corpus.parent / FOLDER / f"{name}.yaml"
        if name in RECIPES:
            raise ConfigError(f"{file}: there is a recipe '{name}' already: give yours another name")
        values = parse(OwnRecipe, read_yaml(file), str(file))
        try:
            changed = apply_overrides(recipe(values.base), as_overrides(values.overrides))
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from None
        return changed.model_copy(update={"name": name})
    if name not in RECIPES:
        near = difflib.get_close_matches(name, (*RECIPES, *own), n=1)
        remedy = f"did you mean '{near[0]}'?" if near else f"known recipes: {', '.join((*RECIPES, *own))}"
        raise ConfigError(f"unknown recipe '{name}'; {remedy}")
    if name in ABLATIONS:
        return ablation(name, recipe("nextvid_b_latent"))
    if name.endswith("_latent"):
        return latent(recipe(name.removesuffix("_latent")))
    match name:
        case "nextvid_l":  # Tab. 7
            return _paper(name, EncoderConfig(depth=24, width=1024, heads=16, mlp_hidden=4096))
        case "nextvid_h":  # Tab. 7
            return _paper(name, EncoderConfig(depth=32, width=1280, heads=16, mlp_hidden=5120))
        case "nextvid_g":  # Tab. 7: width 1408 (the text's 1048 is a slip), MLP 48/11 of it (docs/method.md 6.2)
            return _paper(name, EncoderConfig(depth=40, width=1408, heads=22, mlp_hidden=6144))
        case "nextvid_b":
            return _one_day(name, EncoderConfig(depth=12, width=768, heads=12, mlp_hidden=3072))
        case "nextvid_s":
            return _one_day(name, EncoderConfig(depth=12, width=384, heads=6, mlp_hidden=1536))
        case _:
            return demo()


def latent(base: RecipeConfig) -> RecipeConfig:
    """The same recipe with stored latents as encoder input; one cell of VA-VAE's stride 16 is one patch."""
    encoder = base.model.encoder.model_copy(update={"input": "latents"})
    model = base.model.model_copy(update={"encoder": encoder})
    return base.model_copy(update={"name": f"{base.name}_latent", "model": model})


def demo() -> RecipeConfig:
    """The demo's recipe, for a laptop without a GPU (docs/demo.md).

    Masks are milder than the paper's, whose severity (15 and 4 of 64 cells) collapses at this length.
    """
    steps, frames, batch = 1000, 8, 8
    return RecipeConfig(
        name="demo",
        model=ModelConfig(
            grid_height=8,  # 64 pixels at stride 8
            grid_width=8,
            patch=8,
            frame_channels=16,  # f8d16 latents
            encoder=EncoderConfig(input="latents", depth=4, width=128, heads=4, mlp_hidden=512),
            predictor=PredictorConfig(depth=2, width=64, heads=2),
            decoder=DecoderConfig(depth=2, width=64, heads=2),
        ),
        masks=MaskConfig(
            strategies=(
                MaskStrategy(name="short", blocks=2, scale=0.15, budget=48),
                MaskStrategy(name="long", blocks=1, scale=0.45, budget=32),
            )
        ),
        optim=OptimConfig(ema=0.99),
        stages=_stages(steps, 2e-3, [frames] * 4, [batch] * 4, [1] * 4),
        precision="fp32",
    )


def _paper(name: str, encoder: EncoderConfig) -> RecipeConfig:
    """The schedule of Tab. 8."""
    frames, batch = 16, PAPER_BATCH
    return RecipeConfig(
        name=name,
        model=ModelConfig(encoder=encoder),
        stages=_stages(
            132_000,
            PAPER_PEAK,
            [frames, frames, frames, COOLDOWN_SPAN * frames],
            [batch, batch, batch, batch // COOLDOWN_SPAN],
            [4, 4, 1, 1],
        ),
    )


def _one_day(name: str, encoder: EncoderConfig) -> RecipeConfig:
    """The paper's recipe by the rules of docs/method.md 7.3 for 33,000 steps of 256 clips.

    7.9 million clips, 9.9e18 FLOP for `nextvid_s` and 1.45e19 for `nextvid_b` (cost.py): a day at 115 and 167 TFLOP/s,
    12 and 17 % of what one H100 has in bf16 (989, docs/method.md 12). That is arithmetic, not a measurement.
    """
    steps, frames, batch = 33_000, 16, 256
    return RecipeConfig(
        name=name,
        model=ModelConfig(encoder=encoder),
        optim=OptimConfig(ema=scaled_ema(steps)),
        stages=_stages(
            steps,
            PAPER_PEAK * math.sqrt(batch / PAPER_BATCH),
            [frames, frames, frames, COOLDOWN_SPAN * frames],
            [batch, batch, batch, batch // COOLDOWN_SPAN],
            [1, 1, 1, 1],  # four copies would be 63 to 76 % of the step of a small encoder, docs/method.md 12
        ),
    )


def scaled_ema(steps: int) -> float:
    """The average's momentum whose horizon is the paper's share of the run (docs/method.md 7.3)."""
    return 1.0 - 1.0 / max(EMA_SHORTEST, EMA_SHARE * steps)


def _stages(steps: int, peak: float, frames: list[int], batch: list[int], copies: list[int]) -> tuple[StageConfig, ...]:
    """The four stages by their shares, with rates as multiples of the peak."""
    counts = [round(share * steps) for share in STAGE_SHARES]
    assert sum(counts) == steps, f"{steps} steps do not divide into stages: {counts}"
    return tuple(
        StageConfig(
            name=STAGE_NAMES[i],
            steps=counts[i],
            frames=frames[i],
            batch=batch[i],
            tau_copies=copies[i],
            lr_start=_rate(RATES[i], peak),
            lr_end=_rate(RATES[i + 1], peak),
            decoder_lr=None if (rate := DECODER_RATES[i]) is None else _rate(rate, peak),
        )
        for i in range(len(counts))
    )


def _rate(share: float, peak: float) -> float:
    """Rounded to ten digits, so that 0.9 * 5e-4 is written 4.5e-4 in every file and digest."""
    return float(f"{share * peak:.10g}")
