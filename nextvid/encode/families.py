"""The families of target encoders behind one call each way: pixels in, raw latents out, and back where there is a way.

Hides how each returns its latents and which of them see several frames at once. Latents are raw: no scale, shift or
statistics of the family is applied (design 5). Knows tensors only: bytes, batches and devices are autoencoders.py's.
What the families return was measured in research: vae, 3 and 7.

Axes: n clips, F frames of one, N = n F, f latent frames of one clip, M = n f, H W pixels, C channels, h w cells.
"""

from pathlib import Path
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from nextvid.encode.weights import Facts, facts, read_folder
from storage.errors import ConfigError
from storage.spec import frames_shown

Pixels = Float[Tensor, "N 3 H W"]  # from -1 to 1
Latents = Float[Tensor, "M C h w"]

# What a whole SigLIP checkpoint holds beside its image encoder.
OF_THE_TEXT = ("text_model.", "logit_scale", "logit_bias")


class Identity(torch.nn.Module):
    """Pixels as their own latents; a parameter says device and dtype, as in every other model."""

    def __init__(self) -> None:
        super().__init__()
        self.one = torch.nn.Parameter(torch.ones(()))


def load_model(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    """The model of a folder with safetensors, strictly: ConfigError where a tensor is missing or left over."""
    match facts(folder).kind:
        case "pixels":
            return Identity().to(dtype)
        case "siglip":
            return _siglip(folder, dtype)
        case _:
            return _diffusers(folder, dtype)


def moments(model: Any, about: Facts, pixels: Pixels, frames: int) -> tuple[Latents, Latents | None]:  # noqa: ANN401
    """Mean and width of the posterior in fp32 of clips of `frames` frames; width None where the family has none."""
    match about.kind:
        case "autoencoder_kl" | "autoencoder_kl_flux2":
            # moments go to fp32 before the width is computed: bf16 loses 2 % there (research vae 7)
            mean, log_variance = model.encode(pixels).latent_dist.parameters.float().chunk(2, dim=1)
            return mean, (0.5 * log_variance.clamp(-30, 20)).exp()  # bounds: diffusers' DiagonalGaussian
        case "autoencoder_tiny":
            return model.encode(pixels).latents.float(), None
        case "autoencoder_dc":
            return model.encode(pixels).latent.float(), None
        case "autoencoder_kl_cosmos":
            clips = _padded(rearrange(pixels, "(n F) c H W -> n c F H W", F=frames), about)
            mean = model.encode(clips).latent_dist.mode().float()  # its distribution is a point
            return rearrange(mean, "n C f h w -> (n f) C h w"), None
        case "siglip":
            cells = model(pixel_values=pixels).last_hidden_state.float()
            return rearrange(cells, "N (h w) C -> N C h w", h=pixels.shape[2] // about.stride), None
        case "pixels":
            return pixels.float(), None


def rebuilt(model: Any, about: Facts, latents: Latents, frames: int) -> Pixels:  # noqa: ANN401
    """Pixels of raw latents of clips of `frames` frames. Raises ConfigError for targets without a decoder."""
    match about.kind:
        case "siglip":
            raise ConfigError("SigLIP features have no decoder: there are no pictures of them")
        case "pixels":
            return latents
        case "autoencoder_kl_cosmos":
            clips = rearrange(latents, "(n f) C h w -> n C f h w", f=about.latent_frames(frames))
            return rearrange(model.decode(clips).sample[:, :, :frames], "n c F H W -> (n F) c H W")
        case _:
            pixels: Pixels = model.decode(latents).sample
            return pixels


def _padded(clips: Float[Tensor, "n c F H W"], about: Facts) -> Float[Tensor, "n c P H W"]:
    """The last frame repeated until the latent frames cover whole groups: encoders over time pad without a word."""
    missing = frames_shown(about.time_map, about.latent_frames(clips.shape[2])) - clips.shape[2]
    return torch.cat([clips, repeat(clips[:, :, -1], "n c H W -> n c p H W", p=missing)], dim=2) if missing else clips


def _diffusers(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    import diffusers  # 2.7 s to import, so only where a model is loaded
    from diffusers.utils import logging

    said = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns of "float32 modules: []" that nobody asked for (research vae 7)
    model: torch.nn.Module
    try:
        model, told = getattr(diffusers, read_folder(folder)[0]["_class_name"]).from_pretrained(
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
    _refuse_other_tensors(folder, told["missing_keys"], told["unexpected_keys"])
    return model


def _siglip(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    try:
        from transformers import SiglipVisionModel
        from transformers.utils import logging
    except ImportError as error:
        raise ConfigError(f"{folder} holds SigLIP features: pip install 'nextvid[targets]' ({error})") from error
    said = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model: torch.nn.Module
    try:
        model, told = SiglipVisionModel.from_pretrained(
            str(folder), dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{folder}: transformers cannot load this encoder: {error}") from error
    finally:
        logging.set_verbosity(said)
        logging.enable_progress_bar()
    left = {name for name in told["unexpected_keys"] if not name.startswith(OF_THE_TEXT)}
    _refuse_other_tensors(folder, {*told["missing_keys"], *(name for name, *_ in told["mismatched_keys"])}, left)
    return model


def _refuse_other_tensors(folder: Path, missing: set[str], unknown: set[str]) -> None:
    """Loaders only warn, and leave what is missing at random (trap 18)."""
    if missing or unknown:
        raise ConfigError(
            f"{folder}: the weights do not fit config.json: {len(missing)} tensors missing {sorted(missing)[:3]}, "
            f"{len(unknown)} unknown {sorted(unknown)[:3]}; put the whole checkpoint there"
        )
