"""What a recipe costs, as text for a terminal (`nextvid inspect recipe`); the numbers are nextvid/model/cost.py's.

Bytes are shown in GiB, FLOPs in TFLOP (1e12).
"""

from nextvid.config.recipe import RecipeConfig
from nextvid.model.cost import Cost, Memory, Part, StageCost

GIB = 2**30
TERA = 1e12


def summary(recipe: RecipeConfig, cost: Cost) -> str:
    """Parameters, then each stage pass by pass, then memory; lines of at most 100 characters."""
    model = recipe.model
    grid = f"{model.grid_height} x {model.grid_width} cells, {model.tubelet} frames a tubelet"
    lines = [
        f"{recipe.name}  {recipe.digest()}",
        f"input {model.encoder.input}, target {recipe.losses.target}, {grid}, {recipe.precision}",
        "",
        "parameters",
        *(f"  {name:12}{count / 1e6:10.2f} M" for name, count in cost.parameters.items()),
        f"  {'trained':12}{sum(cost.parameters.values()) / 1e6:10.2f} M",
        f"  {'reference':12}{cost.parameters['encoder'] / 1e6:10.2f} M, not trained",
        "",
        *(line for stage in cost.stages for line in _stage(stage)),
        *_memory(cost.memory),
    ]
    return "\n".join(lines)


def _stage(stage: StageCost) -> list[str]:
    """One clip of a stage: tokens and forward FLOPs by part, then the totals."""
    lines = [f"stage {stage.name}: {stage.clips} clips of {stage.frames} frames"]
    if stage.reference:
        lines.append(f"  {'reference encoder':32}{'':>9}       {stage.reference / TERA:8.3f} TFLOP forward")
    for each in stage.passes:
        parts = (("encoder", each.encoder), ("predictor", each.predictor), ("decoder", each.decoder))
        lines += [_part(f"{each.name} ({each.visible} cells), {name}", part) for name, part in parts if part.tokens]
    lines.append(f"  {'a clip, forward and backward':48}{stage.clip_flops / TERA:8.3f} TFLOP")
    return [*lines, f"  {'a step':48}{stage.step_flops / TERA:8.0f} TFLOP", ""]


def _part(name: str, part: Part) -> str:
    return f"  {name:32}{part.tokens:>9} tokens{part.flops / TERA:8.3f} TFLOP forward"


def _memory(memory: Memory) -> list[str]:
    held = [
        ("weights, fp32", memory.weights),
        ("gradients, fp32", memory.gradients),
        ("moments, fp32", memory.moments),
        ("average (reference), fp32", memory.average),
        ("copies of weights, bf16", memory.copies),
    ]
    return [
        "memory of a rank",
        *(f"  {name:32}{size / GIB:10.3f} GiB" for name, size in held if size),
        f"  {'activations, a clip':32}{memory.activations_a_clip / GIB:10.3f} GiB, the largest pass, none recomputed",
        f"  {'all but activations':32}{sum(size for _, size in held) / GIB:10.3f} GiB",
    ]
