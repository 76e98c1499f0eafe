"""The optimiser of Tab. 8: AdamW's groups, learning rates by step, gradient clipping (docs/method.md 7.2, 7.4).

Beside it is a guard that the paper does not have, off by default: steps whose loss leaps are skipped (`Spikes`).

Rates are a pure function of (stages, step), so a resumed run needs its step number alone.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nextvid.config.recipe import OptimConfig, SpikeConfig, StageConfig
from nextvid.config.stages import stage_at
from nextvid.train.distributed import local, whole

CLIP_EPS = 1e-6  # torch.nn.utils.clip_grads_with_norm_
DECODER = "decoder"  # the module whose rate is separate from Stable2 on (Tab. 8)


@dataclass(frozen=True)
class Rates:
    """Learning rates of one step: of encoder and predictor, and of the decoder."""

    main: float
    decoder: float


def rates(stages: Sequence[StageConfig], shape: str, step: int) -> Rates:
    """Learning rates at `step`, linear inside each stage, or one cosine from warm-up's end to cool-down's start.

    The cosine is half a period over all stages between (docs/method.md 7.2: 4.37e-4 at step 40,000 of the paper's).
    """
    index, inside = stage_at(stages, step)
    stage, inner = stages[index], stages[1:-1]
    if shape == "cosine" and 0 < index <= len(inner):
        high, low = inner[0].lr_start, inner[-1].lr_end
        share = (step - stages[0].steps) / sum(each.steps for each in inner)
        main = low + (high - low) * (1 + math.cos(math.pi * share)) / 2
    else:
        main = stage.lr_start + (stage.lr_end - stage.lr_start) * inside / stage.steps
    return Rates(main, main if stage.decoder_lr is None else stage.decoder_lr)


def trained_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The parts of the model that have parameters to train, by name: encoder, predictor, decoder."""
    found = {name: child for name, child in model.named_children() if any(p.requires_grad for p in child.parameters())}
    owned = sum(p.numel() for child in found.values() for p in child.parameters())
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert owned == total, "a trained parameter is outside of the model's parts, or a part is partly frozen"
    return found


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over {encoder + predictor, decoder} x {decay, no decay}; groups have `part` and `parameter_names`.

    No decay for biases and other 1-D tensors (docs/method.md 7.4); the query token [1, 1, d] decays.
    """
    groups: dict[tuple[str, bool], list[tuple[str, nn.Parameter]]] = {}
    for module_name, module in trained_modules(model).items():
        part = DECODER if module_name == DECODER else "main"
        for name, parameter in module.named_parameters(prefix=module_name):
            decays = parameter.ndim > 1 and not name.endswith("bias")
            groups.setdefault((part, decays), []).append((name, parameter))
    return torch.optim.AdamW(
        [
            {
                "params": [parameter for _, parameter in members],
                "parameter_names": [name for name, _ in members],
                "part": part,
                "weight_decay": config.weight_decay if decays else 0.0,
            }
            for (part, decays), members in sorted(groups.items())
        ],
        lr=0.0,  # set_rates sets it before every step
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,  # the one implementation that can skip a step by a flag on the device (`found_inf`, step.py)
    )


def set_rates(optimizer: torch.optim.Optimizer, now: Rates) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = now.decoder if group["part"] == DECODER else now.main


def clip_gradients(modules: Mapping[str, nn.Module], config: OptimConfig) -> dict[str, torch.Tensor]:
    """Scale gradients down to norm `config.clip`, by module or all together; returns each module's norm before.

    Norms are scalar tensors on the model's device and may be inf or NaN: the caller decides whether to step.
    """
    gradients = {name: [p.grad for p in module.parameters() if p.grad is not None] for name, module in modules.items()}
    norms = {name: whole(torch.nn.utils.get_total_norm(grads)) for name, grads in gradients.items()}
    together = torch.linalg.vector_norm(torch.stack(list(norms.values())))
    for name, grads in gradients.items():
        if not grads:  # no loss reaches this module
            continue
        norm = norms[name] if config.clip_scope == "module" else together
        # as clip_grads_with_norm_, on this rank's parts: that takes no plain norm with gradients that FSDP2 cut
        torch._foreach_mul_([local(grad) for grad in grads], torch.clamp(config.clip / (norm + CLIP_EPS), max=1.0))
    return norms


class Spikes:
    """Which losses leap: over the mean of the steps taken by some standard deviations. All of it is on the device.

    Mean and variance are of all steps until there are `window`, then of about so many of the last.
    """

    def __init__(self, config: SpikeConfig, device: torch.device, state: Sequence[float] = (0.0, 0.0, 0.0)) -> None:
        """`state` is steps, mean and variance, of a checkpoint."""
        self.config = config
        self.state = torch.tensor(state, device=device)

    def admits(self, loss: Float[Tensor, ""]) -> Bool[Tensor, ""]:
        """Whether a step with this loss, the same on all ranks, is to be taken."""
        steps, mean, variance = self.state.unbind()
        return (steps < self.config.window) | (loss <= mean + self.config.deviations * variance.sqrt())

    def add(self, loss: Float[Tensor, ""], taken: Bool[Tensor, ""]) -> None:
        """Count a step's loss if it was taken."""
        steps, mean, variance = self.state.unbind()
        share, gap = 1 / (steps + 1).clamp(max=self.config.window), loss - mean
        added = torch.stack((steps + 1, mean + share * gap, (1 - share) * (variance + share * gap.square())))
        self.state = torch.where(taken, added, self.state)
