"""The demo's autoencoder from frames to frames: its configuration, its patches of pixels, and its PSNR.

train_autoencoder.py trains it; the pipeline reads it through nextvid/encode/autoencoders.py. It is diffusers'
AutoencoderKL behind a pixel-unshuffle of 4: convolutions at full resolution cost 4 to 7 times as much (our
measurement). Axes: n frames, c channels, h rows, w columns, p rows and q columns of a patch.
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from examples.demo.scenes import Frames

PATCH = 4  # pixels on a side of a patch that becomes channels
CHANNELS = 16  # latent channels, as VA-VAE's at f8 of 64 pixels
CONFIG = {  # 6 to 7 ms of a thread a training frame; an unshuffle by 2 took 11 for the same PSNR, full resolution 23
    "in_channels": 3 * PATCH**2,
    "out_channels": 3 * PATCH**2,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (64, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "latent_channels": CHANNELS,
    "mid_block_add_attention": False,
    "sample_size": 16,  # of the unshuffled picture: 64 / PATCH
    "scaling_factor": 1.0,  # latents leave the model whitened
}


def build() -> AutoencoderKL:
    """A new autoencoder with random weights from torch's generator."""
    return AutoencoderKL(**CONFIG)


def load(folder: Path) -> AutoencoderKL:
    """The autoencoder of a folder, in fp32 and evaluation mode."""
    return AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32, low_cpu_mem_usage=False).eval()


def to_patches(frames: Float[Tensor, "n h w 3"]) -> Float[Tensor, "n c h2 w2"]:
    """Pixels in 0..255 as the model's input: -1..1, patches as channels in pixel_unshuffle's order."""
    return rearrange(frames / 127.5 - 1, "n (h p) (w q) c -> n (c p q) h w", p=PATCH, q=PATCH)


def to_frames(patches: Float[Tensor, "n c h2 w2"]) -> Float[Tensor, "n h w 3"]:
    """The model's output as pixels in 0..255, clipped."""
    pixels = rearrange(patches, "n (c p q) h w -> n (h p) (w q) c", p=PATCH, q=PATCH)
    return ((pixels + 1) * 127.5).clamp(0, 255)


@torch.inference_mode()
def encode(model: AutoencoderKL, frames: Frames, batch: int = 64) -> Float[Tensor, "n c h w"]:
    """Posterior means of frames [n, h, w, c], fp32."""
    parts = [torch.from_numpy(frames[i : i + batch]).float() for i in range(0, len(frames), batch)]
    return torch.cat([model.encode(to_patches(part)).latent_dist.mean for part in parts])


@torch.inference_mode()
def reconstruct(model: AutoencoderKL, frames: Frames, batch: int = 64) -> Frames:
    """Frames [n, h, w, c] through the autoencoder and back, rounded to uint8."""
    latents = encode(model, frames, batch)
    parts = [to_frames(model.decode(latents[i : i + batch]).sample) for i in range(0, len(latents), batch)]
    return np.asarray(torch.cat(parts).round().to(torch.uint8).numpy())


def psnr_db(frames: Frames, others: Frames) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Peak signal-to-noise ratio of each frame [n], in dB of 255."""
    squares = (frames.astype(np.float64) - others.astype(np.float64)) ** 2
    return np.asarray(10 * np.log10(255.0**2 / np.maximum(squares.mean(axis=(1, 2, 3)), 1e-10)))
