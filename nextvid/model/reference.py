"""The reference encoder: a moving average of the online encoder, and its features (docs/method.md 4.1, 4.6).

Kept in fp32, with parameters paired by name. It sees the whole clip under the same frame-causal mask and takes no
gradient. It is not part of NExTVid, so optimiser and DDP never see it.

Axes: B clips, N = T*S tokens, i numbers in a token, P = (T-1)*S, D width.
"""

import copy

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import layer_norm

from nextvid.model.encoder import Encoder


def reference_encoder(online: Encoder) -> Encoder:
    """An exact copy in fp32, frozen and in evaluation mode."""
    return copy.deepcopy(online).float().requires_grad_(False).eval()


@torch.no_grad()
def reference_features(reference: Encoder, tokens: Float[Tensor, "B N i"], target_norm: bool) -> Float[Tensor, "B P D"]:
    """Alignment targets of tubelets 1..T-1, fp32, from whole clips; `target_norm`: LayerNorm without affine."""
    cells = reference.model.cells
    features = reference(tokens, tokens.shape[1] // cells)[:, cells:].float()
    return layer_norm(features, features.shape[-1:]) if target_norm else features


@torch.no_grad()
def ema_update(reference: nn.Module, online: nn.Module, momentum: float, taken: Bool[Tensor, ""] | None = None) -> None:
    """theta_ref <- m theta_ref + (1 - m) theta for every parameter, by name; call once after each optimiser step.

    A step that was not `taken` changes nothing; as a tensor on the device it is not read here.
    Names may have the prefixes of DDP and torch.compile. There are no buffers: rotary tables are computed, not stored.
    """
    averaged, current = _by_name(reference), _by_name(online)
    assert averaged.keys() == current.keys(), f"unpaired parameters: {sorted(averaged.keys() ^ current.keys())}"
    assert all(weight.dtype == torch.float32 for weight in averaged.values()), "an average below fp32 loses updates"
    assert not list(reference.buffers()), "buffers are not averaged"
    weight = (1.0 - momentum) * (1 if taken is None else taken)
    for name, average in averaged.items():
        average.lerp_(current[name], weight)


def _by_name(module: nn.Module) -> dict[str, Tensor]:
    """Parameters by name without wrappers' prefixes; where FSDP2 cut one over ranks, this rank's part."""
    found = {}
    for name, parameter in module.named_parameters():
        weight: Tensor = parameter.detach()
        plain = name.replace("_orig_mod.", "").removeprefix("module.")
        found[plain] = weight.to_local() if isinstance(weight, DTensor) else weight
    return found
