"""What a recipe costs: parameters, tokens, FLOPs and numbers kept for backward, before anything is allocated.

`nextvid inspect RECIPE` prints it, and the memory of a rank (memory.py).

FLOPs are the formulas of docs/method.md 12 (a multiply-add is 2; backward is twice forward) with T-1 tubelets in the
online encoder; tests compare them with torch's counter. Numbers kept for backward follow one rule, `_kept`. Parameters
are counted on the meta device. `flat` and `bucket` draw their counts; their strategies' budgets are used here.

Letters: T tubelets, F = T-1 predicted ones, S cells, n visible cells a tubelet, D and H width and MLP of the encoder,
d width of predictor or decoder, C target channels, k copies.
"""

from dataclasses import dataclass
from functools import cache

import torch

from nextvid.config.recipe import ModelConfig, RecipeConfig, StageConfig
from nextvid.model.decoder import MLP_RATIO, SINUSOID, condition_width
from nextvid.model.encoder import input_width
from nextvid.model.nextvid import NExTVid

BACKWARD = 3  # forward and backward over forward, docs/method.md 12
# Numbers kept for backward per token and block, in widths; test_cost.py counts what autograd keeps
ATTENTION = 7  # input and output of the norm, rotated q and k, v, the attention's output twice
CROSS_ATTENTION = 5  # as above without keys and values, which are counted by context token
FEED_FORWARD = 2  # input and output of the norm; beside it the hidden layer before and after GELU
MODULATED = 2  # normalised and gated inputs that AdaLN multiplies
TERA, GIGA = 1e12, 1e9  # the summary's units


@dataclass(frozen=True)
class Part:
    """One part in one pass over one clip: input tokens, forward FLOPs, numbers kept for backward.

    `ends` are kept outside of blocks, `block` by each block; `entry` is a block's input.
    """

    tokens: int = 0
    flops: int = 0
    depth: int = 0
    ends: int = 0
    block: int = 0
    entry: int = 0

    @property
    def kept(self) -> int:
        """Numbers kept for backward."""
        return self.ends + self.depth * self.block


@dataclass(frozen=True)
class Pass:
    """One mask strategy of one clip; a part that the recipe does not have costs 0."""

    name: str
    visible: int  # cells a tubelet
    encoder: Part
    predictor: Part
    decoder: Part

    @property
    def flops(self) -> int:
        """Forward FLOPs of all parts."""
        return self.encoder.flops + self.predictor.flops + self.decoder.flops

    @property
    def kept(self) -> int:
        """Numbers kept for backward."""
        return self.encoder.kept + self.predictor.kept + self.decoder.kept


@dataclass(frozen=True)
class StageCost:
    """A clip and a step of one stage."""

    name: str
    clips: int
    frames: int
    reference: int  # FLOPs forward, 0 without alignment
    passes: tuple[Pass, ...]

    @property
    def clip_flops(self) -> int:
        """Forward and backward of one clip, reference included."""
        return self.reference + BACKWARD * sum(each.flops for each in self.passes)

    @property
    def step_flops(self) -> int:
        """All clips of a global batch."""
        return self.clips * self.clip_flops


@dataclass(frozen=True)
class Cost:
    """All costs of a recipe; `parameters` by trained part, so without the reference encoder."""

    parameters: dict[str, int]
    stages: tuple[StageCost, ...]


def cost(recipe: RecipeConfig) -> Cost:
    """What the recipe costs. Raises ConfigError as the model itself does, and allocates no weights."""
    return Cost(count_parameters(recipe), tuple(stage_cost(recipe, stage) for stage in recipe.stages))


@cache
def count_parameters(recipe: RecipeConfig) -> dict[str, int]:
    """Parameters of encoder, predictor and decoder; 0 for a part that the recipe does not have."""
    with torch.device("meta"):
        model = NExTVid(recipe)
    parts = {name: getattr(model, name) for name in ("encoder", "predictor", "decoder")}
    return {name: sum(p.numel() for p in part.parameters()) if part else 0 for name, part in parts.items()}


def stage_cost(recipe: RecipeConfig, stage: StageConfig) -> StageCost:
    """Cost of one clip of a stage, for each pass."""
    model, masks = recipe.model, recipe.masks
    tubelets = stage.frames // model.tubelet
    budgets = {each.name: each.budget for each in masks.strategies}
    if masks.keep == "all":
        budgets = {"all": model.cells}
    ragged = masks.keep == "flat"
    reference = encoder(model, model.cells, tubelets, ragged=False).flops if recipe.losses.align > 0 else 0
    passes = tuple(
        Pass(
            name,
            visible,
            encoder(model, visible, tubelets if ragged else tubelets - 1, ragged),
            predictor(model, visible, tubelets - 1, ragged),
            decoder(model, visible, tubelets - 1, stage.tau_copies, ragged),
        )
        for name, visible in budgets.items()
    )
    return StageCost(stage.name, stage.batch, stage.frames, reference, passes)


def encoder(model: ModelConfig, visible: int, tubelets: int, ragged: bool) -> Part:
    """Cost of the encoder over `visible` cells of each tubelet, which attend their own and earlier tubelets."""
    D, H, depth = model.encoder.width, model.encoder.mlp_hidden, model.encoder.depth
    tokens, inputs = tubelets * visible, input_width(model)
    dense = depth * 2 * tokens * (4 * D**2 + 2 * D * H) + 2 * inputs * D * tokens
    attention = depth * 4 * D * _pairs(model, visible, visible, tubelets, ragged)
    return Part(tokens, dense + attention, depth, tokens * (inputs + D), tokens * _kept(D, H), tokens * D)


def predictor(model: ModelConfig, visible: int, frames: int, ragged: bool) -> Part:
    """Cost of queries at every cell of F tubelets (or hidden cells), reading `visible` cells of earlier tubelets."""
    config, D = model.predictor, model.encoder.width
    if config.kind == "none":
        return Part()
    d, depth = config.width, config.depth
    asked = model.cells - visible if config.support == "masked" else model.cells
    context, queries = frames * visible + (visible if ragged else 0), frames * asked
    around = 2 * D * d * (context + queries)
    if config.kind == "joint":
        both = context + queries  # under a mask by ids, so every pair is computed
        inside = depth * (2 * both * (4 * d**2 + 2 * MLP_RATIO * d**2) + 4 * d * both**2)
        block = both * _kept(d, MLP_RATIO * d)
        return Part(queries, around + inside, depth, queries * 2 * d, block, both * d)
    linear = 4 * d**2 * context + 2 * (2 + 2 * MLP_RATIO) * d**2 * queries
    attention = 4 * d * (context * queries if ragged else _pairs(model, asked, visible, frames, ragged=False))
    block, ends = queries * _kept(d, MLP_RATIO * d, cross=True) + context * 3 * d, (context + queries * 2) * d
    return Part(queries, around + depth * (linear + attention), depth, ends, block, queries * d)


def decoder(model: ModelConfig, visible: int, frames: int, copies: int, ragged: bool) -> Part:
    """Cost of `copies` of F noisy tubelets, each on its own (`dit_iso`) or reading the encoder."""
    config, C = model.decoder, model.target_channels
    if config.kind == "none":
        return Part()
    d, depth = config.width, config.depth
    asked = model.cells - visible if model.predictor.support == "masked" else model.cells
    once, tokens, sequences = frames * asked, copies * frames * asked, copies * frames
    modulations = {"dit_iso": 6, "xattn": 6, "xattn_self": 9}[config.kind]
    time = sequences * 2 * (SINUSOID * d + d**2 + depth * modulations * d**2 + 2 * d**2)
    ends, around = 2 * 2 * C * d * tokens, tokens * (2 * C + 3 * d)
    mlp = 2 * 2 * MLP_RATIO * d**2
    if config.kind == "dit_iso":
        block = tokens * (8 * d**2 + mlp + 4 * d * asked)
        flops = ends + time + 2 * condition_width(model) * d * once + depth * block
        return Part(tokens, flops, depth, around, tokens * (_kept(d, MLP_RATIO * d) + MODULATED * 2 * d), tokens * d)
    context = frames * visible + (visible if ragged else 0)
    seen = copies * (context * frames * asked if ragged else _pairs(model, asked, visible, frames, ragged=False))
    block = tokens * (4 * d**2 + mlp) + 4 * d**2 * context + 4 * d * seen
    kept = tokens * (_kept(d, MLP_RATIO * d, cross=True) + MODULATED * 2 * d) + (1 + 2 * copies) * context * d
    if config.kind == "xattn_self":
        block += tokens * (8 * d**2 + 4 * d * once)
        kept += tokens * ((ATTENTION + MODULATED) * d)
    flops = ends + time + 2 * model.encoder.width * d * context + depth * block
    return Part(tokens, flops, depth, around, kept, tokens * d)


def _pairs(model: ModelConfig, rows: int, keys: int, tubelets: int, ragged: bool) -> int:
    """Pairs of query and key that are computed: by block the allowed ones, else all (docs/method.md 3)."""
    by_block = not ragged and model.attention != "dense"
    return rows * keys * (tubelets * (tubelets + 1) // 2 if by_block else tubelets**2)


def _kept(width: int, hidden: int, cross: bool = False) -> int:
    """Numbers a block keeps for backward, per token."""
    attention = CROSS_ATTENTION if cross else ATTENTION
    return (attention + FEED_FORWARD) * width + 2 * hidden


def summary(recipe: RecipeConfig, found: Cost) -> str:
    """Parameters, then each stage pass by pass, for a terminal; lines of at most 100 characters."""
    model = recipe.model
    grid = f"{model.grid_height} x {model.grid_width} cells, {model.tubelet} frames a tubelet"
    lines = [
        f"{recipe.name}  {recipe.digest()}",
        f"input {model.encoder.input}, target {recipe.losses.target}, {grid}, {recipe.precision}",
        "",
        "parameters",
        *(f"  {name:12}{count / 1e6:10.2f} M" for name, count in found.parameters.items()),
        f"  {'trained':12}{sum(found.parameters.values()) / 1e6:10.2f} M",
        f"  {'reference':12}{found.parameters['encoder'] / 1e6:10.2f} M, not trained",
        "",
        *(line for stage in found.stages for line in _stage_lines(stage)),
    ]
    return "\n".join(lines)


def _stage_lines(stage: StageCost) -> list[str]:
    """One clip of a stage: tokens and forward FLOPs by part, then the totals."""
    lines = [f"stage {stage.name}: {stage.clips} clips of {stage.frames} frames"]
    if stage.reference:
        lines.append(f"  {'reference encoder':32}{'':>9}       {_flops(stage.reference)} forward")
    for each in stage.passes:
        for name, part in (("encoder", each.encoder), ("predictor", each.predictor), ("decoder", each.decoder)):
            if part.tokens:
                title = f"{each.name} ({each.visible} cells), {name}"
                lines.append(f"  {title:32}{part.tokens:>9} tokens{_flops(part.flops)} forward")
    lines.append(f"  {'a clip, forward and backward':48}{_flops(stage.clip_flops)}")
    return [*lines, f"  {'a step':48}{_flops(stage.step_flops)}", ""]


def _flops(count: int) -> str:
    """In TFLOP, or in GFLOP where a model is so small that its TFLOP would read as zero."""
    unit, size = ("TFLOP", TERA) if count >= TERA / 100 else ("GFLOP", GIGA)
    return f"{count / size:8.3f} {unit}"
