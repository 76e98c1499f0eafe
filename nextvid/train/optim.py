"""The optimiser of Tab. 8: parameter groups, learning rates by step, clipping by module.

Holds AdamW's four groups, the rates of both parts at any step (method.md 7.2, 7.4) and the norm limits. Holds no loop
and no state of its own: rates are a pure function of (stages, step), so a resumed run needs its step number alone.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from nextvid.config.recipe import OptimConfig, StageConfig
from nextvid.config.stages import stage_at
from nextvid.train.fsdp import local, whole

CLIP_EPS = 1e-6  # torch.nn.utils.clip_grads_with_norm_
Decoder = "decoder"  # the module whose rate is separate from Stable2 on (Tab. 8)


@dataclass(frozen=True)
class Rates:
    """Learning rates of one step: of encoder and predictor, and of the decoder."""

    main: float
    decoder: float


def rates(stages: Sequence[StageConfig], shape: str, step: int) -> Rates:
    """Learning rates at `step`, linear inside each stage, or one cosine from warm-up's end to cool-down's start."""
    index, inside = stage_at(stages, step)
    stage = stages[index]
    inner = 0 < index < len(stages) - 1
    main = _cosine(stages[1:-1], step - stages[0].steps) if shape == "cosine" and inner else _linear(stage, inside)
    return Rates(main, main if stage.decoder_lr is None else stage.decoder_lr)


def _linear(stage: StageConfig, step: int) -> float:
    return stage.lr_start + (stage.lr_end - stage.lr_start) * step / stage.steps


def _cosine(stages: Sequence[StageConfig], step: int) -> float:
    """One half cosine over `stages` together (method.md 7.2: 4.37e-4 at step 40,000 of the paper's)."""
    high, low = stages[0].lr_start, stages[-1].lr_end
    share = step / sum(stage.steps for stage in stages)
    return low + (high - low) * (1 + math.cos(math.pi * share)) / 2


def trained_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The parts of the model that have parameters to train, by name: encoder, predictor, decoder."""
    found = {name: child for name, child in model.named_children() if any(p.requires_grad for p in child.parameters())}
    owned = sum(p.numel() for child in found.values() for p in child.parameters())
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert owned == total, "a trained parameter stands outside the model's parts, or a part is frozen in places"
    return found


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over {encoder + predictor, decoder} x {decay, no decay}; groups are marked `part` and `parameter_names`.

    No decay for biases and every other 1-D tensor (method.md 7.4); the query token [1, 1, d] decays.
    """
    groups: dict[tuple[str, bool], list[tuple[str, nn.Parameter]]] = {}
    for module_name, module in trained_modules(model).items():
        part = Decoder if module_name == Decoder else "main"
        for name, parameter in module.named_parameters(prefix=module_name):
            decays = parameter.ndim > 1 and not name.endswith("bias")
            groups.setdefault((part, decays), []).append((name, parameter))
    first = next(model.parameters())
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
        lr=0.0,  # set before every step by set_rates
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True if first.is_cuda else None,
        foreach=None if first.is_cuda else True,
    )


def set_rates(optimizer: torch.optim.Optimizer, now: Rates) -> None:
    """Give every group its rate of this step."""
    for group in optimizer.param_groups:
        group["lr"] = now.decoder if group["part"] == Decoder else now.main


def clip_gradients(modules: Mapping[str, nn.Module], config: OptimConfig) -> dict[str, torch.Tensor]:
    """Scale gradients down to norm `config.clip`, by module or all together; returns each module's norm before it.

    Norms are scalar tensors on the model's device and may be inf or NaN: the caller decides whether to step.
    """
    gradients = {name: [p.grad for p in module.parameters() if p.grad is not None] for name, module in modules.items()}
    norms = {name: whole(torch.nn.utils.get_total_norm(grads)) for name, grads in gradients.items()}
    together = torch.linalg.vector_norm(torch.stack(list(norms.values())))
    for name, grads in gradients.items():
        if not grads:  # a part that the losses leave out
            continue
        norm = norms[name] if config.clip_scope == "module" else together
        # clip_grads_with_norm_, on this rank's shares: it takes no plain norm beside gradients that are cut
        torch._foreach_mul_([local(grad) for grad in grads], torch.clamp(config.clip / (norm + CLIP_EPS), max=1.0))
    return norms
