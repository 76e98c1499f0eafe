"""The encoder and decoder of latent diffusion models, written from their public description and named as they name it.

Independent of diffusers and of the converter that it tests: modules carry the names of the published checkpoint
(`encoder.down.4.attn.0.q`, `decoder.up.0.block.2.conv1`), attention is in the lowest level and in the middle, and
the decoder's levels count from the finest. Small widths for numerics, the real ones for the list of tensors.

Axes: B frames, C channels, H W cells.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as f

WIDTHS = (128, 128, 256, 256, 512)  # of VA-VAE f16d32, finest first
BLOCKS = 2  # a level of the encoder; the decoder has one more
LATENTS = 32


class Normed(nn.GroupNorm):
    def __init__(self, width: int, groups: int) -> None:
        super().__init__(groups, width, eps=1e-6)


class Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, before: int, width: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = Normed(before, groups), nn.Conv2d(before, width, 3, padding=1)
        self.norm2, self.conv2 = Normed(width, groups), nn.Conv2d(width, width, 3, padding=1)
        if before != width:
            self.nin_shortcut = nn.Conv2d(before, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv2(f.silu(self.norm2(self.conv1(f.silu(self.norm1(x))))))
        return inner + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    """One head over all cells, projections as convolutions of one cell."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = Normed(width, groups)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        batch, width, rows, columns = x.shape
        normed = self.norm(x)
        q, k, v = (conv(normed).reshape(batch, width, rows * columns) for conv in (self.q, self.k, self.v))
        weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) * width**-0.5, dim=2)
        return x + self.proj_out(torch.einsum("bij,bcj->bci", weights, v).reshape(batch, width, rows, columns))


class Level(nn.Module):
    def __init__(self, before: int, width: int, groups: int, blocks: int, attention: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(Block(before if n == 0 else width, width, groups) for n in range(blocks))
        self.attn = nn.ModuleList(Attention(width, groups) for _ in range(blocks if attention else 0))

    def forward(self, x: Tensor) -> Tensor:
        for n, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[n](x)
        return x


class Half(nn.Module):
    """A convolution of stride 2, padded below and to the right only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.conv(f.pad(x, (0, 1, 0, 1)))
        return found


class Twice(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3))
        return found


class Middle(nn.Module):
    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.block_1, self.attn_1 = Block(width, width, groups), Attention(width, groups)
        self.block_2 = Block(width, width, groups)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.block_2(self.attn_1(self.block_1(x)))
        return found


class Encoder(nn.Module):
    def __init__(self, widths: Sequence[int], groups: int) -> None:
        super().__init__()
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        for n, width in enumerate(widths):
            level = Level(widths[max(0, n - 1)], width, groups, BLOCKS, attention=n == last)
            if n < last:
                level.downsample = Half(width)
            self.down.append(level)
        self.mid = Middle(widths[-1], groups)
        self.norm_out, self.conv_out = Normed(widths[-1], groups), nn.Conv2d(widths[-1], 2 * LATENTS, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
            if hasattr(level, "downsample"):
                x = level.downsample(x)  # type: ignore[operator]
        found: Tensor = self.conv_out(f.silu(self.norm_out(self.mid(x))))
        return found


class Decoder(nn.Module):
    """Levels are called from the coarsest, and numbered from the finest."""

    def __init__(self, widths: Sequence[int], groups: int) -> None:
        super().__init__()
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(LATENTS, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], groups)
        self.up = nn.ModuleList()
        for n, width in enumerate(widths):
            level = Level(widths[min(last, n + 1)], width, groups, BLOCKS + 1, attention=n == last)
            if n > 0:
                level.upsample = Twice(width)
            self.up.append(level)
        self.norm_out, self.conv_out = Normed(widths[0], groups), nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
            if hasattr(level, "upsample"):
                x = level.upsample(x)  # type: ignore[operator]
        found: Tensor = self.conv_out(f.silu(self.norm_out(x)))
        return found


class LDM(nn.Module):
    """Moments of frames, frames of latents."""

    def __init__(self, widths: Sequence[int] = WIDTHS, groups: int = 32) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(widths, groups), Decoder(widths, groups)
        self.quant_conv, self.post_quant_conv = (nn.Conv2d(n, n, 1) for n in (2 * LATENTS, LATENTS))

    def moments(self, frames: Tensor) -> Tensor:
        found: Tensor = self.quant_conv(self.encoder(frames))
        return found

    def frames(self, latents: Tensor) -> Tensor:
        found: Tensor = self.decoder(self.post_quant_conv(latents))
        return found


def randomised(model: LDM, seed: int = 0) -> LDM:
    """No norm stays the identity, and attention looks somewhere: queries and keys are four times as large.

    Matrices are changed by what keeps numbers near 1 at any width, so that bounds on differences mean the same.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            spread = 0.05 if weights.ndim == 1 else 0.6 / math.sqrt(weights[0].numel())
            weights.add_(spread * torch.randn(weights.shape, generator=generator))
            if ".q." in name or ".k." in name:
                weights.mul_(4)
    return model.eval()
