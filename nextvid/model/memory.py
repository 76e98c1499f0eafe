"""Memory of a rank: what a step holds, the largest micro-batch that fits a device, and the switches that help.

`nextvid inspect` prints it for usual devices (`report`), and training takes `micro_batch: auto` from it. A step holds
most at the end of a forward: tests hold the formulas to the live bytes of steps on fake tensors.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nextvid.config.recipe import ExecutionConfig, RecipeConfig, StageConfig
from nextvid.model.cost import Pass, count_parameters, stage_cost
from nextvid.model.encoder import input_width

FP32, BF16 = 4, 2  # bytes; weights, gradients, moments and average are kept in fp32 (docs/method.md 7.4)
# Bytes per kept number, with norm statistics and rotary tables; test_memory.py traces 2.2 to 2.3 in bf16
KEPT_BYTES = {"fp32": 4.4, "bf16": 2.25}
RESERVED = 2 << 30  # our choice: CUDA's context and kernels, workspaces of cuBLAS, clips of the diagnosis
USABLE = 0.9  # our choice: of the rest, since the allocator leaves gaps
CARDS_GB = (24, 40, 80, 141)  # RTX 4090, A100, H100, H200
GB, GIB = 10**9, 1 << 30


@dataclass(frozen=True)
class Memory:
    """Bytes on a rank in one stage. Each clip of a micro-batch adds `clip`; the rest does not depend on it.

    `copies` are the weights in bf16 that autocast caches, and what `fold_copies` sums; `batch` is the rank's share of
    a step as it was read, twice, since the next is copied meanwhile.
    """

    weights: int
    copies: int
    gradients: int
    moments: int
    average: int
    batch: int
    clip: int
    share: int  # clips of a step on this rank

    def total(self, clips: int) -> int:
        """All bytes at a micro-batch of `clips`."""
        fixed = self.weights + self.copies + self.gradients + self.moments + self.average + self.batch
        return fixed + clips * self.clip

    def micro_batch(self, device: int) -> int:
        """The most clips that divide the share and fit a device of so many bytes; 0 if one clip does not fit."""
        room = USABLE * (device - RESERVED)
        fitting = (clips for clips in divisors(self.share) if self.total(clips) <= room)
        return max(fitting, default=0)


def divisors(share: int) -> list[int]:
    """Micro-batches that a share can be cut into, ascending."""
    return [clips for clips in range(1, share + 1) if share % clips == 0]


def rank_memory(recipe: RecipeConfig, stage: StageConfig, how: ExecutionConfig) -> Memory:
    """What a rank holds during a stage; the largest pass counts, since passes follow one another."""
    parameters, model, losses = count_parameters(recipe), recipe.model, recipe.losses
    trained, cut = sum(parameters.values()), how.ranks if how.shard else 1
    bf16 = recipe.precision == "bf16" and how.device != "cpu"
    folded = 2 * FP32 * parameters["decoder"] if how.fold_copies and stage.tau_copies > 1 else 0
    share, tokens = max(1, stage.batch // how.ranks), stage.frames // model.tubelet * model.cells
    predicted = tokens - model.cells
    stored = 0
    if recipe.reads_latents:
        stored += stage.frames * model.cells * model.frame_channels * FP32
    if recipe.reads_pixels:
        stored += stage.frames * model.cells * 3 * model.patch**2
    kept = []  # numbers for backward; recomputed blocks keep their input, and one of them at a time the rest
    for one in _passes(recipe, stage, how):
        parts = (one.encoder, one.predictor, one.decoder)
        inputs = sum(part.ends + part.depth * part.entry for part in parts)
        kept.append(inputs + max(part.block for part in parts) if how.recompute_blocks else one.kept)
    clip = max(kept) * KEPT_BYTES["bf16" if bf16 else "fp32"]
    clip += FP32 * tokens * input_width(model)
    if losses.align > 0:  # the reference's features, and their difference from the prediction
        clip += 2 * FP32 * predicted * model.encoder.width
    if losses.flow > 0:  # targets; noise and the velocity's difference from it
        held = 1 if how.fold_copies else stage.tau_copies
        clip += FP32 * model.target_channels * (tokens + 2 * held * predicted)
    return Memory(
        weights=FP32 * trained // cut,
        copies=(BF16 * trained if bf16 else 0) + folded,
        gradients=FP32 * trained,  # FSDP2 keeps them whole until the last backward of a step
        moments=2 * FP32 * trained // cut,
        average=FP32 * parameters["encoder"] // cut,
        batch=2 * share * stored,
        clip=round(clip),
        share=share,
    )


def remedies(recipe: RecipeConfig, stage: StageConfig, how: ExecutionConfig, device: int) -> Iterator[dict[str, Any]]:
    """Changes of `how` by which a clip fits a device of so many bytes, the cheapest first."""
    ranks = [count for count in (2, 4, 8, 16, 32, 64) if count > how.ranks and stage.batch % count == 0]
    fold: list[dict[str, Any]] = [{"fold_copies": True}] if stage.tau_copies > 1 and not how.shard else []
    again: dict[str, Any] = {"recompute_blocks": True}
    more: list[dict[str, Any]] = [{"ranks": count} for count in ranks]
    more += [{"shard": True, "ranks": count, "fold_copies": False} for count in ranks]
    for changes in (*fold, again, *(each | again for each in fold), *more, *(each | again for each in more)):
        changed = how.model_copy(update=changes)
        if changed != how and rank_memory(recipe, stage, changed).micro_batch(device):
            yield {name: value for name, value in changes.items() if getattr(how, name) != value}


def remedy(recipe: RecipeConfig, stage: StageConfig, how: ExecutionConfig, device: int) -> str:
    """What to add to the command line so that a stage fits, as text."""
    for changes in remedies(recipe, stage, how, device):
        return "add --how " + " ".join(f"{name}={str(value).lower()}" for name, value in changes.items())
    return "no switch is enough: use a larger device or a smaller model"


def report(recipe: RecipeConfig, how: ExecutionConfig) -> str:
    """What a rank holds, and what of each stage fits usual devices; lines of at most 100 characters."""
    found = [rank_memory(recipe, stage, how) for stage in recipe.stages]
    names = {
        "weights, fp32": found[0].weights,
        "gradients, fp32": found[0].gradients,
        "moments, fp32": found[0].moments,
        "average (reference), fp32": found[0].average,
        "copies of weights, bf16": found[0].copies,
    }
    head = f"  {'largest micro-batch: GiB with it':32}" + "".join(f"{size:>13} GB" for size in CARDS_GB)
    rows, hints = [], []
    for stage, memory in zip(recipe.stages, found, strict=True):
        cells = ""
        for size in CARDS_GB:
            clips = memory.micro_batch(size * GB)
            cells += f"{clips:>9}: {memory.total(clips) / GIB:5.1f}" if clips else f"{'no':>16}"
            if not clips:
                hints.append(f"  {stage.name} on {size} GB: {remedy(recipe, stage, how, size * GB)}")
        rows.append(f"  {f'{stage.name}, {memory.share} x {stage.frames} frames':32}{cells}")
    return "\n".join(
        [
            f"memory of a rank of {how.ranks}",
            *(f"  {name:32}{size / GIB:10.3f} GiB" for name, size in names.items() if size),
            *(
                f"  {f'a clip of {s.name}':32}{m.clip / GIB:10.3f} GiB"
                for s, m in zip(recipe.stages, found, strict=True)
            ),
            f"  {'clips that were read':32}{found[0].batch / GIB:10.3f} GiB",
            head,
            *rows,
            *hints,
        ]
    )


def _passes(recipe: RecipeConfig, stage: StageConfig, how: ExecutionConfig) -> tuple[Pass, ...]:
    """The passes that memory must hold: folded copies one at a time, drawn counts of visible cells at their most."""
    masks = recipe.masks
    if masks.keep in ("bucket", "flat"):  # a block at least is hidden
        most = (
            each.model_copy(update={"budget": round(recipe.model.cells * (1 - each.scale))})
            for each in masks.strategies
        )
        recipe = recipe.model_copy(update={"masks": masks.model_copy(update={"strategies": tuple(most)})})
    return stage_cost(recipe, stage.model_copy(update={"tau_copies": 1}) if how.fold_copies else stage).passes
