"""One optimiser step: reference features, losses by mask strategy, clip, step, moving average (docs/method.md 4, 7.4).

Rates and copies follow from the step number, noise from draw numbers. A step whose gradient is not finite changes
nothing. Blocks can be compiled one by one, those of the reference encoder too, and recomputed in backward
(ExecutionConfig): neither changes results or parameter names, so checkpoints, average and optimiser need not know.
Recomputing goes around the compiled block, since torch.compile does not look inside a checkpoint.

Axes: B clips, N = T*S tokens, T tubelets, S cells, i numbers in a token, C target channels.
"""

import math
import os
import shutil
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

from nextvid.config.recipe import ExecutionConfig, ModelConfig, RecipeConfig
from nextvid.config.stages import stage_at
from nextvid.model.encoder import Encoder
from nextvid.model.flow import NoiseKey
from nextvid.model.nextvid import Losses, NExTVid
from nextvid.model.reference import ema_update, reference_encoder, reference_features
from nextvid.model.tokens import latent_tokens, pixel_tokens, pixel_values, space_to_depth, stack_target
from nextvid.train.distributed import Ranks, apply_fsdp
from nextvid.train.loader import Batch
from nextvid.train.optim import Rates, Spikes, build_optimizer, clip_gradients, rates, set_rates, trained_modules

PLAIN = ExecutionConfig()  # nothing recomputed or folded
GRAPHS = 64  # our choice: of one block's code. Four stages of two clip lengths need 12; torch's limit of 8 is an error


@dataclass
class Trained:
    """What training changes. `wrapped` is the model under DDP, else the model itself."""

    recipe: RecipeConfig
    how: ExecutionConfig
    ranks: Ranks
    model: NExTVid
    wrapped: nn.Module
    reference: Encoder
    optimizer: torch.optim.AdamW
    spikes: Spikes | None = None

    @property
    def fsdp(self) -> bool:
        """Whether FSDP2 cut the model over the ranks."""
        return isinstance(self.model, FSDPModule)


@dataclass(frozen=True)
class Stepped:
    """Numbers of one step; tensors stay on their device until they are logged."""

    losses: dict[str, Tensor]  # `align/<strategy>`, `flow/<strategy>`: unweighted means over this rank's clips
    norms: dict[str, Tensor]  # by module, before clipping
    rates: Rates
    taken: Tensor  # whether all norms were finite and the loss did not leap; else nothing was changed


def build_model(recipe: RecipeConfig) -> NExTVid:
    """The model, initialised from the recipe's seed; torch's global generator does not change."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return NExTVid(recipe)


def build(recipe: RecipeConfig, ranks: Ranks, how: ExecutionConfig = PLAIN) -> Trained:
    """Model, reference encoder and optimiser at step 0, on this rank's device."""
    model = build_model(recipe).to(ranks.device)
    reference = reference_encoder(model.encoder)
    carry_out(model, reference, how, ranks.device)
    wrapped: nn.Module = model
    if how.shard and ranks.count > 1:
        bf16 = lowered(recipe, ranks.device)
        apply_fsdp(model, blocks_of(model), ranks.device, trained=True, bf16=bf16)
        apply_fsdp(reference, reference.blocks.children(), ranks.device, trained=False, bf16=bf16)
    else:  # ablations leave a part without gradients
        wrapped = ranks.wrap(model, partial=min(recipe.losses.align, recipe.losses.flow) <= 0)
    spikes = None if recipe.optim.spikes is None else Spikes(recipe.optim.spikes, ranks.device)
    return Trained(recipe, how, ranks, model, wrapped, reference, build_optimizer(model, recipe.optim), spikes)


def lowered(recipe: RecipeConfig, device: torch.device) -> bool:
    """Whether training computes in bf16: on a GPU if the recipe says so; in fp32 on the CPU."""
    return recipe.precision == "bf16" and device.type == "cuda"


def autocast(recipe: RecipeConfig, device: torch.device) -> AbstractContextManager[None]:
    """bf16 over fp32 weights where training computes in bf16."""
    return torch.autocast(device.type, torch.bfloat16) if lowered(recipe, device) else nullcontext()


def encoder_tokens(batch: Batch, model: ModelConfig) -> Float[Tensor, "B N i"]:
    """Encoder input of every cell: latent cells, or patches of pixels in [-1, 1] (docs/method.md 1)."""
    match model.encoder.input:
        case "latents":
            assert batch.latents is not None, "a recipe that reads latents got a batch without"
            return latent_tokens(batch.latents, model.tubelet)
        case "pixels":
            assert batch.pixels is not None, "a recipe that reads pixels got a batch without"
            return pixel_tokens(pixel_values(batch.pixels), model.patch, model.tubelet)


def flow_targets(batch: Batch, recipe: RecipeConfig) -> Float[Tensor, "B T S C"] | None:
    """The decoder's targets, None without flow loss: latents, or pixels in [-1, 1] folded into channels of a cell."""
    model = recipe.model
    if recipe.losses.flow <= 0:
        return None
    if recipe.losses.target == "pixels":
        assert batch.pixels is not None, "a recipe that predicts pixels got a batch without"
        return stack_target(space_to_depth(pixel_values(batch.pixels), model.patch), model.tubelet)
    assert batch.latents is not None, f"a recipe that predicts {recipe.losses.target} got a batch without latents"
    return stack_target(batch.latents, model.tubelet)


def take_step(trained: Trained, batch: Batch, step: int, micro_batch: int) -> Stepped:
    """Train on this rank's clips of one global batch, `micro_batch` at a time (0: all at once)."""
    recipe, optimizer = trained.recipe, trained.optimizer
    now = rates(recipe.stages, recipe.optim.shape, step)
    set_rates(optimizer, now)
    optimizer.zero_grad(set_to_none=True)
    parts = batch.split(micro_batch or len(batch.draws))
    losses: dict[str, Tensor] = {}
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        for name, value in _backward(trained, part, step, 1.0 / len(parts), last).items():
            losses[name] = losses.get(name, 0.0) + value / len(parts)
    norms = clip_gradients(trained_modules(trained.model), recipe.optim)
    taken = torch.isfinite(torch.stack(list(norms.values()))).all()
    if trained.spikes is not None:
        total = trained.ranks.mean(minimised(recipe, losses))
        taken = taken & trained.spikes.admits(total)
        trained.spikes.add(total, taken)
    # decided on the device, by AdamW's fused kernel: the host never waits for a step
    optimizer.found_inf = (~taken).float()  # type: ignore[attr-defined]
    optimizer.step()
    ema_update(trained.reference, trained.model.encoder, recipe.optim.ema, taken)
    return Stepped(losses, norms, now, taken)


def _backward(trained: Trained, part: Batch, step: int, share: float, last: bool) -> dict[str, Tensor]:
    """Gradients of one micro-batch, strategy by strategy; the very last backward averages them over ranks."""
    recipe = trained.recipe
    copies = recipe.stages[stage_at(recipe.stages, step)[0]].tau_copies
    key = NoiseKey(recipe.seed, step, part.draws)
    tokens, targets = encoder_tokens(part, recipe.model), flow_targets(part, recipe)
    features = None
    if recipe.losses.align > 0:
        with autocast(recipe, tokens.device):
            features = reference_features(trained.reference, tokens, recipe.losses.target_norm)
    found: dict[str, Tensor] = {}
    for strategy in range(len(part.visible)):
        final = last and strategy == len(part.visible) - 1
        with nullcontext() if final else trained.ranks.without_averaging(trained.wrapped):
            with autocast(recipe, tokens.device):
                losses: Losses = trained.wrapped(
                    tokens, targets, features, part.visible, key, copies, strategy, trained.how.fold_copies
                )
            (losses.total * share).backward()
        found |= {f"align/{name}": value.detach() for name, value in losses.align.items()}
        found |= {f"flow/{name}": value.detach() for name, value in losses.flow.items()}
    return found


def minimised(recipe: RecipeConfig, losses: dict[str, Tensor]) -> Float[Tensor, ""]:
    """The loss that a step minimises, of the unweighted losses by `<kind>/<strategy>`."""
    weights, found = {"align": recipe.losses.align, "flow": recipe.losses.flow}, list(losses.items())
    kinds = [name.split("/", 1)[0] for name, _ in found]
    return torch.stack([weights[kind] / kinds.count(kind) * v for kind, (_, v) in zip(kinds, found, strict=True)]).sum()


def means(losses: dict[str, float]) -> dict[str, float]:
    """`align` and `flow`, each the mean over its strategies; NaN where the recipe has no such loss."""
    found = {}
    for kind in ("align", "flow"):
        values = [value for name, value in losses.items() if name.startswith(f"{kind}/")]
        found[kind] = sum(values) / len(values) if values else math.nan
    return found


def blocks_of(model: NExTVid) -> list[nn.Module]:
    """All blocks of encoder, predictor and decoder that the recipe has."""
    parts: tuple[nn.Module | None, ...] = (model.encoder, model.predictor, model.decoder)
    return [block for part in parts if part is not None for block in part.get_submodule("blocks").children()]


def compiles(how: ExecutionConfig, device: torch.device) -> bool:
    """Whether blocks are compiled: as `how` says, else on a GPU if there is a C compiler, which kernels need."""
    if how.compile is not None:
        return how.compile
    return device.type == "cuda" and shutil.which(os.environ.get("CC", "cc")) is not None


def carry_out(
    model: NExTVid, reference: Encoder, how: ExecutionConfig, device: torch.device, backend: str = "inductor"
) -> None:
    """Compile every block and recompute the trained ones, in place, as `how` says. `backend` is torch.compile's.

    A graph for each shape, at the first step of a stage that has it. `bucket` and `flat` draw the tokens of each step:
    their graphs take any number, from the second on.
    """
    compiled, dynamic = compiles(how, device), None if model.recipe.masks.keep in ("bucket", "flat") else False
    if compiled:
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    trained = blocks_of(model)
    for block in [*trained, *reference.blocks.children()]:
        forward = block.forward
        if compiled:
            forward = torch.compile(forward, fullgraph=True, dynamic=dynamic, backend=backend)
        if how.recompute_blocks and block in trained:  # blocks draw no random numbers, so their state need not be kept
            forward = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
        block.forward = forward


def uncompiled(how: ExecutionConfig, device: torch.device) -> AbstractContextManager[object]:
    """A block of code in which compiled blocks run as written: whatever else it calls them with is not compiled."""
    return torch.compiler.set_stance("force_eager") if compiles(how, device) else nullcontext()
