"""A mean over copies whose gradient is taken copy by copy, so that memory holds one copy's graph at a time.

The decoder sees z k times (method.md 4.2), and at once that is k graphs. Here each copy is run backward right after it
was run forward, and what comes out (gradients of z and of the decoder) waits for the ordinary backward. Nothing is
computed twice. To the outside it is one differentiable function: DDP and gradient accumulation see nothing of it. It
holds no draws and no network.
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

    `parameters` are all that the loss depends on beside `condition`; other tensors inside take no gradient.
    """
    if not torch.is_grad_enabled():
        return torch.stack([loss_of(condition, copy) for copy in range(copies)]).mean()
    mean: Tensor = _FoldedMean.apply(loss_of, copies, condition, *parameters)
    return mean


class _FoldedMean(torch.autograd.Function):
    """Gradients are taken in `forward` and scaled in `backward`."""

    @staticmethod
    def forward(ctx: FunctionCtx, loss_of: LossOf, copies: int, condition: Tensor, *parameters: nn.Parameter) -> Tensor:
        leaf = condition.detach().requires_grad_()
        inputs = [leaf, *parameters]
        total, sums = condition.new_zeros((), dtype=torch.float32), [torch.zeros_like(each) for each in inputs]
        device = condition.device.type
        # Without its cache of cast weights: a cached cast belongs to the graph of the copy that is freed.
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
