"""The flow loss averaged over copies, one copy's graph in memory at a time.

The decoder reads z k times (docs/method.md 4.2): k graphs, if run at once. Here each copy's backward follows its
forward, and the gradients of z and of the decoder are kept for the ordinary backward; nothing is computed twice. From
outside it is one differentiable function, so DDP and gradient accumulation need not know.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction, FunctionCtx

LossOf = Callable[[Tensor, int], Tensor]  # (condition, copy) -> that copy's loss


def folded_mean(
    loss_of: LossOf, copies: int, condition: Float[Tensor, "*shape"], parameters: Sequence[nn.Parameter]
) -> Float[Tensor, ""]:
    """Mean of `loss_of(condition, copy)` over the copies.

    `parameters` are all other tensors that get a gradient.
    """
    if not torch.is_grad_enabled():
        return torch.stack([loss_of(condition, copy) for copy in range(copies)]).mean()
    mean: Tensor = _FoldedMean.apply(loss_of, copies, condition, *parameters)
    return mean


class _FoldedMean(torch.autograd.Function):
    """Computes gradients in `forward`, scales them in `backward`."""

    @staticmethod
    def forward(ctx: FunctionCtx, loss_of: LossOf, copies: int, condition: Tensor, *parameters: nn.Parameter) -> Tensor:
        leaf = condition.detach().requires_grad_()
        inputs = [leaf, *parameters]
        total, sums = condition.new_zeros((), dtype=torch.float32), [torch.zeros_like(each) for each in inputs]
        device = condition.device.type
        # No cache of cast weights: a cached cast belongs to a copy's graph, which is freed before the next copy.
        uncached = torch.autocast(
            device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device), cache_enabled=False
        )
        for copy in range(copies):
            with torch.enable_grad(), uncached:
                loss = loss_of(leaf, copy) / copies
            gradients = torch.autograd.grad(loss, inputs)
            torch._foreach_add_(sums, gradients)
            total += loss.detach()
        ctx.save_for_backward(*sums)
        return total

    @staticmethod
    def backward(ctx: BackwardCFunction, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *torch._foreach_mul(ctx.saved_tensors, grads[0])
