"""Whatever encodes the targets, behind one class: uint8 frames in, raw latents out, and back where there is a decoder.

Holds bytes, batches, devices and the optional space-to-depth wrapper that nextvid.json names; what the families differ
by is families.py's. Holds no store, no resize and no statistics.

Axes: n clips, F frames of one, N = n F, f latent frames of one, R H W pixels, C channels, h w latent cells.
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

from nextvid.encode.families import load_model, moments, rebuilt
from nextvid.encode.weights import Facts, autoencoder_digest, facts
from nextvid.machine import device_of
from storage.errors import ConfigError
from storage.spec import frames_shown

FRAMES_AT_ONCE = 64  # as MachineConfig.batch_frames: on CPU batching gains nothing (research vae 2), memory decides

Result = TypeVar("Result")
View = UInt8[np.ndarray, "F R R 3"]


class Encoded(NamedTuple):
    """Raw latents [n, f, C, h, w] float32, and the mean posterior width by frame [n, f] where there is a posterior."""

    latents: Float32[np.ndarray, "n f C h w"]
    posterior_std: Float32[np.ndarray, "n f"] | None


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
            rearrange(latents, "(n f) C h w -> n f C h w", n=self._clips),
            None if widths is None else rearrange(widths, "(n f) -> n f", n=self._clips),
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

    def __init__(self, model: torch.nn.Module, digest: str, about: Facts, frames_at_once: int) -> None:
        self.digest, self.about, self.channels, self.stride = digest, about, about.channels, about.stride
        self._model, self.frames_at_once = model, frames_at_once
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
        """Load a folder of safetensors; `device` may be `auto`, precision fp32, bf16 or fp16. ConfigError.

        fp32 uses TF32 convolutions where the device has them, as the paper's public code does (research vae 1).
        """
        device = device_of(device)
        if precision == "fp16" and device == "cpu":
            raise ConfigError(
                "fp16 on CPU runs in a reference kernel, 110 times slower than fp32: use 'fp32' or 'bf16'"
            )
        folder = Path(folder)
        about, digest = facts(folder), autoencoder_digest(folder)
        model: Any = load_model(folder, _dtype(precision))
        if autoencoder_digest(folder) != digest:
            raise ConfigError(f"{folder}: its weights were exchanged while they were read; ask again")
        model = model.to(device).eval().requires_grad_(False)
        if about.time_map == "frame":  # 1.45 times faster in fp32 on CPU (research vae 2), and what tensor cores want
            model = model.to(memory_format=torch.channels_last)
        return cls(model, digest, about, frames_at_once)

    def start(self, clips: Sequence[View], noise: Float32[np.ndarray, "n f C h w"] | None = None) -> Running:
        """Begin to encode clips of equal shape: the posterior mean, or with standard normal `noise` mean + std * noise.

        On a GPU this returns once copies and kernels are queued, so that the next batch is gathered meanwhile. Forwards
        are cut at multiples of `frames_at_once`, whole clips where the encoder sees several frames, so that equal input
        gives equal batches and bits; where the device lacks memory for one, that number is halved for good. Raises
        ConfigError where noise is given to an autoencoder without a posterior, the frames have a side that it does not
        take, or the smallest batch does not fit the device.
        """
        height, width = clips[0].shape[1:3]
        if height % self.stride or width % self.stride:
            raise ConfigError(f"frames of {(height, width)} pixels are no multiple of the stride {self.stride}")
        if self.about.side not in (None, height) or self.about.side not in (None, width):
            raise ConfigError(f"frames of {(height, width)} pixels: this encoder takes {self.about.side} only")
        frames, length = self._gathered(clips), len(clips[0])
        flat = None if noise is None else torch.from_numpy(rearrange(noise, "n f C h w -> (n f) C h w"))
        return self._in_memory(self._unit(length), lambda: self._queue(frames, flat, len(clips), length))

    def encode(self, frames: View, noise: Float32[np.ndarray, "f C h w"] | None = None) -> Encoded:
        """Latents [f, C, h, w] and posterior widths [f] of the frames of one clip: `start`, waited for."""
        found = self.start([frames], None if noise is None else noise[None]).result()
        return Encoded(found.latents[0], None if found.posterior_std is None else found.posterior_std[0])

    @torch.inference_mode()
    def decode(self, latents: Float32[np.ndarray, "f C h w"], frames: int | None = None) -> View:
        """Frames of one clip's raw latents, rounded and clamped to bytes; `frames` of them, all unless told.

        Raises ConfigError for targets without a decoder.
        """
        values = torch.from_numpy(np.ascontiguousarray(latents, np.float32))
        frames = frames or frames_shown(self.about.time_map, len(values))
        parts = [values] if self._over_time else None
        return self._in_memory(
            self._unit(frames),
            lambda: np.concatenate([self._pixels(part, frames) for part in parts or self._cut(values, 1)]),
        )

    @property
    def _over_time(self) -> bool:
        return self.about.time_map != "frame"

    def _unit(self, frames: int) -> int:
        """Frames that one forward cannot be cut below."""
        return frames if self._over_time else 1

    def _pixels(self, latents: torch.Tensor, frames: int) -> View:
        pixels = rebuilt(self._model, self.about, latents.to(self._like), frames)
        if self.about.patch > 1:
            pixels = torch.nn.functional.pixel_shuffle(pixels, self.about.patch)
        bytes_ = pixels.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
        return np.asarray(rearrange(bytes_, "N C H W -> N H W C").cpu().numpy())

    @torch.inference_mode()
    def _queue(self, frames: torch.Tensor, noise: torch.Tensor | None, clips: int, length: int) -> Running:
        running = Running(clips, _now(self._like.is_cuda))
        pieces = self._cut(frames, self._unit(length))
        for piece, drawn in zip(pieces, [None] * len(pieces) if noise is None else self._cut(noise, 1), strict=True):
            mean, std = self._moments(self._to_input(piece), length)
            if drawn is not None:
                if std is None:
                    raise ConfigError("this autoencoder has no posterior to sample: set encoding.posterior to 'mean'")
                mean = mean + std * drawn.to(mean)
            running.add(mean, std)
        running.end()
        return running

    def _moments(self, pixels: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        return moments(self._model, self.about, pixels, length)

    def _cut(self, values: torch.Tensor, unit: int) -> tuple[torch.Tensor, ...]:
        return values.split(max(unit, self.frames_at_once // unit * unit))

    def _in_memory(self, unit: int, work: Callable[[], Result]) -> Result:
        """Do the work; where the device lacks memory, in pieces of half the size, until one unit does not fit."""
        while True:
            with suppress(torch.cuda.OutOfMemoryError):  # left at once: its traceback keeps the tensors alive
                return work()
            if self.frames_at_once <= unit:
                raise ConfigError(
                    f"{'one frame does' if unit == 1 else f'{unit} frames do'} not fit the device's memory: free it, "
                    "lower encoding.resolution, or set execution.device to 'cpu'"
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
        return torch.nn.functional.pixel_unshuffle(pixels, self.about.patch) if self.about.patch > 1 else pixels


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
