"""Frame autoencoders of diffusers behind one class: uint8 frames in, raw latents out, and back.

Hides how each family returns its latents (`match` on the class that config.json names) and the optional space-to-depth
wrapper that nextvid.json names. Latents are raw: no scale, shift or statistics of the family is applied (design, 5).
Holds no store, no resize and no statistics. What the families return was measured in research: vae, 3 and 7.

Axes: N frames, H W pixels, C channels, h w latent cells, p pixels a side of the wrapper's patch.
"""

from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float32, UInt8

from nextvid.encode.weights import LatentShape, autoencoder_digest, latent_shape, read_folder, unknown_class
from storage.errors import ConfigError

FRAMES_AT_ONCE = 64  # as EncodingConfig.batch_frames: on CPU batching gains nothing (research vae 2), memory decides


class Encoded(NamedTuple):
    """Raw latents [N, C, h, w] float32, and the mean posterior width of each frame [N] where there is a posterior."""

    latents: Float32[np.ndarray, "N C h w"]
    posterior_std: Float32[np.ndarray, " N"] | None


class Autoencoder:
    """One frozen autoencoder on one device. Never tiled: tiling changes latents (research vae 7)."""

    def __init__(
        self, model: torch.nn.Module, digest: str, shape: LatentShape, patch: int, frames_at_once: int
    ) -> None:
        self.digest, self.channels, self.stride = digest, shape.channels, shape.stride
        self._model: Any = model  # its encode and decode are diffusers', untyped
        self._patch, self.frames_at_once = patch, frames_at_once
        self._like = next(model.parameters())

    @classmethod
    def load(
        cls,
        folder: str | Path,
        device: str = "cpu",
        precision: str = "fp32",
        frames_at_once: int = FRAMES_AT_ONCE,
    ) -> Self:
        """Load a diffusers folder of safetensors; `device` may be `auto`, precision fp32, bf16 or fp16. ConfigError.

        fp32 uses TF32 convolutions where the device has them, as the paper's public code does (research vae 1).
        """
        device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        if precision == "fp16" and device == "cpu":
            raise ConfigError(
                "fp16 on CPU runs in a reference kernel, 110 times slower than fp32: use 'fp32' or 'bf16'"
            )
        folder = Path(folder)
        shape, digest = latent_shape(folder), autoencoder_digest(folder)
        model: Any = _load_model(
            folder, {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        )
        # channels last: 1.45 times faster in fp32 on CPU (research vae 2), and what tensor cores want
        model = model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
        return cls(model, digest, shape, read_folder(folder)[1].patch, frames_at_once)

    def encode(
        self, frames: UInt8[np.ndarray, "N H W 3"], noise: Float32[np.ndarray, "N C h w"] | None = None
    ) -> Encoded:
        """Raw latents of frames: the posterior mean, or with standard normal `noise` the sample mean + std * noise.

        Forwards are cut at multiples of `frames_at_once`, so equal input gives equal batches and equal bits. Raises
        ConfigError where noise is given to an autoencoder without a posterior, or a side is no multiple of the stride.
        """
        if frames.shape[1] % self.stride or frames.shape[2] % self.stride:
            raise ConfigError(f"frames of {frames.shape[1:3]} pixels are no multiple of the stride {self.stride}")
        latents: list[np.ndarray] = []
        widths: list[np.ndarray] = []
        for first in range(0, len(frames), self.frames_at_once):
            piece = slice(first, first + self.frames_at_once)
            mean, std = self._moments(self._to_input(frames[piece]))
            if noise is not None:
                if std is None:
                    raise ConfigError("this autoencoder has no posterior to sample: set encoding.posterior to 'mean'")
                mean = mean + std * torch.from_numpy(noise[piece]).to(mean)
            latents.append(mean.cpu().numpy())
            if std is not None:
                widths.append(std.mean(dim=(1, 2, 3)).cpu().numpy())
        return Encoded(np.concatenate(latents), np.concatenate(widths) if widths else None)

    @torch.inference_mode()
    def decode(self, latents: Float32[np.ndarray, "N C h w"]) -> UInt8[np.ndarray, "N H W 3"]:
        """Frames of raw latents, rounded and clamped to bytes."""
        frames = []
        for first in range(0, len(latents), self.frames_at_once):
            piece = torch.from_numpy(np.ascontiguousarray(latents[first : first + self.frames_at_once], np.float32))
            pixels = self._model.decode(piece.to(self._like)).sample
            if self._patch > 1:
                pixels = torch.nn.functional.pixel_shuffle(pixels, self._patch)
            bytes_ = pixels.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
            frames.append(rearrange(bytes_, "N C H W -> N H W C").cpu().numpy())
        return np.concatenate(frames)

    def _to_input(self, frames: np.ndarray) -> torch.Tensor:
        """Bytes to [-1, 1] in the model's dtype, space folded to depth where the wrapper says so."""
        pixels = rearrange(torch.from_numpy(np.ascontiguousarray(frames)).to(self._like.device), "N H W C -> N C H W")
        pixels = (pixels.float() / 127.5 - 1).to(self._like.dtype)
        return torch.nn.functional.pixel_unshuffle(pixels, self._patch) if self._patch > 1 else pixels

    @torch.inference_mode()
    def _moments(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Mean and width of the posterior in fp32; width None where the family has none."""
        encoded = self._model.encode(pixels)
        match type(self._model).__name__:
            case "AutoencoderKL" | "AutoencoderKLFlux2":
                # moments go to fp32 before the width is computed: bf16 loses 2 % there (research vae 7)
                mean, log_variance = encoded.latent_dist.parameters.float().chunk(2, dim=1)
                return mean, (0.5 * log_variance.clamp(-30, 20)).exp()  # bounds: diffusers' DiagonalGaussian
            case "AutoencoderTiny":
                return encoded.latents.float(), None
            case "AutoencoderDC":
                return encoded.latent.float(), None
            case name:
                raise unknown_class(name, None)


def _dtype(precision: str) -> torch.dtype:
    match precision:
        case "fp32":
            return torch.float32
        case "bf16":
            return torch.bfloat16
        case "fp16":
            return torch.float16
        case _:
            raise ConfigError(f"precision '{precision}' is none of fp32, bf16, fp16")


def _load_model(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    import diffusers  # 2.7 s to import, so only where a model is loaded
    from diffusers.utils import logging

    said = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns of "float32 modules: []" that nobody asked for (research vae 7)
    try:
        kind = getattr(diffusers, read_folder(folder)[0]["_class_name"])
        model: torch.nn.Module
        model, told = kind.from_pretrained(
            str(folder),
            torch_dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{folder}: diffusers cannot load this autoencoder: {error}") from error
    finally:
        logging.set_verbosity(said)
    if told["missing_keys"] or told["unexpected_keys"]:  # diffusers only warns, and leaves them at random (trap 18)
        lacking, unknown = sorted(told["missing_keys"]), sorted(told["unexpected_keys"])
        raise ConfigError(
            f"{folder}: the weights do not fit config.json: {len(lacking)} tensors missing {lacking[:3]}, "
            f"{len(unknown)} unknown {unknown[:3]}; put the whole checkpoint there"
        )
    return model
