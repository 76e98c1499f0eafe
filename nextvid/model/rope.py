"""Three-dimensional rotary position embedding from original token ids (docs/method.md 5).

A true rotation: each pair (2i, 2i+1) of a head turns by one angle, so norms are kept and scores depend on relative
positions alone (the public V-JEPA 2 code tiles its table and does neither). Angles are fp32 whatever the activations
are. Positions come from original ids, so dropping tokens shifts none.

Axes: B clips, L tokens, h heads, e head dimension, p = e/2 pairs; b is B or 1.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

MAX_PERIOD = 10000.0  # base of the frequencies, docs/method.md 5


def axis_width(head_dim: int) -> int:
    """Rotated dimensions for each of t, h, w; the rest at the end of the head is not rotated."""
    return 2 * ((head_dim // 3) // 2)


def rotary(ids: Int[Tensor, "B L"], head_dim: int, grid_height: int, grid_width: int) -> Float[Tensor, "B 1 L p 2"]:
    """Cosine and sine for each pair of each token; `ids` are flat: t*S + h*grid_width + w."""
    assert head_dim % 2 == 0, f"a head of {head_dim} dimensions has no pairs"
    cells = grid_height * grid_width
    cell = ids % cells
    pairs = axis_width(head_dim) // 2
    exponents = torch.arange(pairs, device=ids.device, dtype=torch.float32) / max(pairs, 1)
    omega = MAX_PERIOD**-exponents
    axes = [position.float()[..., None] * omega for position in (ids // cells, cell // grid_width, cell % grid_width)]
    tail = torch.zeros(*ids.shape, head_dim // 2 - 3 * pairs, device=ids.device)
    angles = torch.cat((*axes, tail), dim=-1)
    return torch.view_as_real(torch.polar(torch.ones_like(angles), angles))[:, None]


def rotate(x: Float[Tensor, "B h L e"], table: Float[Tensor, "b 1 L p 2"]) -> Float[Tensor, "B h L e"]:
    """Rotate queries or keys in fp32 at least; the result has the dtype of `x`. A table of one row serves all clips.

    As a complex product it is one pass over x; real arithmetic took 3.3 times as long (8x4x192x32, CPU).
    """
    precise = x.to(torch.promote_types(x.dtype, torch.float32))
    if torch.compiler.is_compiling():  # inductor fuses passes, but not complex numbers
        return rotate_by_parts(precise, table).to(x.dtype)
    turned = torch.view_as_complex(precise.unflatten(-1, (-1, 2))) * torch.view_as_complex(table)
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


def rotate_by_parts(x: Float[Tensor, "B h L e"], table: Float[Tensor, "b 1 L p 2"]) -> Float[Tensor, "B h L e"]:
    """The same with the complex product written out; in the dtype of `x`."""
    cosine, sine = table.unbind(-1)
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((first * cosine - second * sine, first * sine + second * cosine), dim=-1).flatten(-2)
