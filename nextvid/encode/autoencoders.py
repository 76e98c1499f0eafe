"""Frame autoencoders of diffusers behind one class: uint8 frames in, raw latents out, and back.

Hides how each family returns its latents (`match` on the class that config.json names) and the optional space-to-depth
wrapper that nextvid.json names. Latents are raw: no scale, shift or statistics of the family is applied (design, 5).
Holds no store, no resize and no statistics. What the families return was measured in research: vae, 3 and 7.

Axes: n clips, F frames of one, N = n F, R H W pixels, C channels, h w latent cells.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float32, UInt8

from nextvid.encode.weights import LatentShape, autoencoder_digest, latent_shape, read_folder, unknown_class
from storage.errors import ConfigError

FRAMES_AT_ONCE = 64  # as EncodingConfig.batch_frames: on CPU batching gains nothing (research vae 2), memory decides

Result = TypeVar("Result")
View = UInt8[np.ndarray, "F R R 3"]


class Encoded(NamedTuple):
    """Raw latents [n, F, C, h, w] float32, and the mean posterior width by frame [n, F] where there is a posterior."""

    latents: Float32[np.ndarray, "n F C h w"]
    posterior_std: Float32[np.ndarray, "n F"] | None


class Running:
    """A batch on its way through the device: `result` waits for it. On CPU it is done when it begins."""

    def __init__(self, clips: int, began: torch.cuda.Event | float) -> None:
        self._clips, self._began = clips, began
        self._ended: torch.cuda.Event | float = began
        self._latents: list[torch.Tensor] = []
        self._widths: list[torch.Tensor] = []

    def add(self, mean: torch.Tensor, std: torch.Tensor | None) -> None:
        """Queue the copy of a piece's results back to the host, behind the work that makes them."""
        self._latents.append(_to_host(mean))
        if std is not None:
            self._widths.append(_to_host(std.mean(dim=(1, 2, 3))))

    def end(self) -> None:
        """All pieces are queued."""
        self._ended = _now(isinstance(self._began, torch.cuda.Event))

    def result(self) -> Encoded:
        """Wait for it."""
        if isinstance(self._ended, torch.cuda.Event):
            self._ended.synchronize()
        latents = torch.cat(self._latents).numpy()
        widths = torch.cat(self._widths).numpy() if self._widths else None
        return Encoded(
            rearrange(latents, "(n F) C h w -> n F C h w", n=self._clips),
            None if widths is None else rearrange(widths, "(n F) -> n F", n=self._clips),
        )

    def seconds(self) -> float:
        """How long the device worked at it; after `result`."""
        if isinstance(self._began, torch.cuda.Event):
            assert isinstance(self._ended, torch.cuda.Event)
            return self._began.elapsed_time(self._ended) / 1000
        assert isinstance(self._ended, float)
        return self._ended - self._began


class Autoencoder:
    """One frozen autoencoder on one device. Never tiled: tiling changes latents (research vae 7)."""

    def __init__(
        self, model: torch.nn.Module, digest: str, shape: LatentShape, patch: int, frames_at_once: int
    ) -> None:
        self.digest, self.channels, self.stride = digest, shape.channels, shape.stride
        self._model: Any = model  # its encode and decode are diffusers', untyped
        self._patch, self.frames_at_once = patch, frames_at_once
        self._like = next(model.parameters())
        self.when_halved: Callable[[int], None] = lambda frames: None  # told of the frames that a batch is cut to

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
        model: Any = _load_model(folder, _dtype(precision))
        if autoencoder_digest(folder) != digest:
            raise ConfigError(f"{folder}: its weights were exchanged while they were read; ask again")
        # channels last: 1.45 times faster in fp32 on CPU (research vae 2), and what tensor cores want
        model = model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
        return cls(model, digest, shape, read_folder(folder)[1].patch, frames_at_once)

    def start(self, clips: Sequence[View], noise: Float32[np.ndarray, "n F C h w"] | None = None) -> Running:
        """Begin to encode clips of equal shape: the posterior mean, or with standard normal `noise` mean + std * noise.

        On a GPU this returns once copies and kernels are queued, so that the next batch is gathered meanwhile. Forwards
        are cut at multiples of `frames_at_once`, so equal input gives equal batches and equal bits; where the device
        lacks memory for one, that number is halved for good. Raises ConfigError where noise is given to an autoencoder
        without a posterior, a side is no multiple of the stride, or one frame does not fit the device.
        """
        height, width = clips[0].shape[1:3]
        if height % self.stride or width % self.stride:
            raise ConfigError(f"frames of {(height, width)} pixels are no multiple of the stride {self.stride}")
        frames = self._gathered(clips)
        flat = None if noise is None else torch.from_numpy(rearrange(noise, "n F C h w -> (n F) C h w"))
        return self._in_memory(lambda: self._queue(frames, flat, len(clips)))

    def encode(self, frames: View, noise: Float32[np.ndarray, "F C h w"] | None = None) -> Encoded:
        """Latents [F, C, h, w] and posterior widths [F] of the frames of one clip: `start`, waited for."""
        found = self.start([frames], None if noise is None else noise[None]).result()
        return Encoded(found.latents[0], None if found.posterior_std is None else found.posterior_std[0])

    @torch.inference_mode()
    def decode(self, latents: Float32[np.ndarray, "F C h w"]) -> View:
        """Frames of raw latents, rounded and clamped to bytes."""
        values = torch.from_numpy(np.ascontiguousarray(latents, np.float32))
        return self._in_memory(lambda: np.concatenate([self._pixels(part) for part in self._cut(values)]))

    def _pixels(self, latents: torch.Tensor) -> View:
        pixels = self._model.decode(latents.to(self._like)).sample
        if self._patch > 1:
            pixels = torch.nn.functional.pixel_shuffle(pixels, self._patch)
        bytes_ = pixels.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
        return np.asarray(rearrange(bytes_, "N C H W -> N H W C").cpu().numpy())

    @torch.inference_mode()
    def _queue(self, frames: torch.Tensor, noise: torch.Tensor | None, clips: int) -> Running:
        running = Running(clips, _now(self._like.is_cuda))
        noises = [None] * len(self._cut(frames)) if noise is None else self._cut(noise)
        for piece, drawn in zip(self._cut(frames), noises, strict=True):
            mean, std = self._moments(self._to_input(piece))
            if drawn is not None:
                if std is None:
                    raise ConfigError("this autoencoder has no posterior to sample: set encoding.posterior to 'mean'")
                mean = mean + std * drawn.to(mean)
            running.add(mean, std)
        running.end()
        return running

    def _cut(self, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return values.split(self.frames_at_once)

    def _in_memory(self, work: Callable[[], Result]) -> Result:
        """Do the work; where the device lacks memory, with pieces of half the size, until one frame does not fit."""
        while True:
            with suppress(torch.cuda.OutOfMemoryError):  # left at once: its traceback keeps the tensors alive
                return work()
            if self.frames_at_once == 1:
                raise ConfigError(
                    "one frame does not fit the device's memory: free it, lower encoding.resolution, or set "
                    "encoding.device to 'cpu'"
                )
            self.frames_at_once = -(-self.frames_at_once // 2)
            if self._like.is_cuda:
                torch.cuda.empty_cache()
            self.when_halved(self.frames_at_once)

    def _gathered(self, clips: Sequence[View]) -> UInt8[torch.Tensor, "N H W 3"]:
        """The clips' frames in one host tensor, pinned where a GPU copies from it."""
        frames = torch.empty(
            (sum(map(len, clips)), *clips[0].shape[1:]), dtype=torch.uint8, pin_memory=self._like.is_cuda
        )
        np.concatenate(clips, out=frames.numpy())
        return frames

    def _to_input(self, frames: UInt8[torch.Tensor, "N H W 3"]) -> torch.Tensor:
        """Bytes to [-1, 1] in the model's dtype, space folded to depth where the wrapper says so."""
        pixels = rearrange(frames.to(self._like.device, non_blocking=True), "N H W C -> N C H W")
        pixels = (pixels.float() / 127.5 - 1).to(self._like.dtype)
        return torch.nn.functional.pixel_unshuffle(pixels, self._patch) if self._patch > 1 else pixels

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


def _now(on_gpu: bool) -> torch.cuda.Event | float:
    if not on_gpu:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _to_host(values: torch.Tensor) -> torch.Tensor:
    """The values on the host; from a GPU once the stream has come so far."""
    if not values.is_cuda:
        return values
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    return host


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
