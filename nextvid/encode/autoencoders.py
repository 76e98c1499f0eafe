"""Frozen target encoders of every supported family behind one class: frames in, raw latents out, and back.

Frames are bytes; latents are raw, without any scale, shift or statistics of the family. What the families differ by is
in `posterior` and `rebuilt`; SigLIP has no way back.

Axes: n clips, F frames of one, N = n F, f latent frames of one, M = n f, R H W pixels, C channels, h w latent cells.
"""

import time
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, TypeVar

import numpy as np
import torch
from einops import rearrange, repeat
from jaxtyping import Float, Float32, UInt8
from safetensors import safe_open
from torch import Tensor

from nextvid.encode.decode_task import Frames
from nextvid.encode.weights import DIFFUSERS, Facts, autoencoder_digest, facts, read_folder, weight_files
from nextvid.machine import device_of
from storage.errors import ConfigError
from storage.spec import frames_shown

FRAMES_AT_ONCE = 64  # as MachineConfig.batch_frames: on CPU larger batches are no faster, so memory decides
OF_THE_TEXT = ("text_model.", "logit_scale", "logit_bias")  # in a whole SigLIP checkpoint, beside its image encoder

TOLD = 500  # our choice: characters of a library's message

Library = Literal["diffusers", "transformers"]
Result = TypeVar("Result")
Pixels = Float[Tensor, "N 3 H W"]  # from -1 to 1
Latents = Float[Tensor, "M C h w"]


class Encoded(NamedTuple):
    """Raw latents [n, f, C, h, w] float32, and the mean posterior width by frame [n, f] where there is a posterior."""

    latents: Float32[np.ndarray, "n f C h w"]
    posterior_std: Float32[np.ndarray, "n f"] | None


class Running:
    """A batch that the device works at: `result` waits for it. On CPU it is done when it begins."""

    def __init__(self, clips: int, began: torch.cuda.Event | float) -> None:
        self._clips, self._began = clips, began
        self._ended: torch.cuda.Event | float = began
        self._latents: list[Tensor] = []
        self._widths: list[Tensor] = []

    def add(self, mean: Tensor, std: Tensor | None) -> None:
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
    """One frozen autoencoder on one device. Frames are never cut into tiles, which would change their latents."""

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
        """Load a folder of safetensors; `device` may be `auto`, precision is fp32 or bf16. Raises ConfigError.

        fp32 uses TF32 convolutions where the device has them, as the paper's public code does.
        """
        folder = Path(folder)
        about, digest = facts(folder), autoencoder_digest(folder)
        model: Any = load_model(folder, {"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
        if autoencoder_digest(folder) != digest:
            raise ConfigError(f"{folder}: its weights changed while they were read; ask again")
        model = model.to(device_of(device)).eval().requires_grad_(False)
        if about.time_map == "frame":  # 1.45 times faster in fp32 on CPU by our measurement, and fit for tensor cores
            model = model.to(memory_format=torch.channels_last)
        return cls(model, digest, about, frames_at_once)

    def start(self, clips: Sequence[Frames], noise: Float32[np.ndarray, "n f C h w"] | None = None) -> Running:
        """Begin to encode clips of equal shape: the posterior mean, or mean + std * `noise`, which is standard normal.

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
        length, pinned = len(clips[0]), self._like.is_cuda  # a GPU copies from pinned memory
        frames = torch.empty((length * len(clips), *clips[0].shape[1:]), dtype=torch.uint8, pin_memory=pinned)
        np.concatenate(clips, out=frames.numpy())
        flat = None if noise is None else torch.from_numpy(rearrange(noise, "n f C h w -> (n f) C h w"))
        return self._in_memory(self._unit(length), lambda: self._queue(frames, flat, len(clips), length))

    def encode(self, frames: Frames, noise: Float32[np.ndarray, "f C h w"] | None = None) -> Encoded:
        """Latents [f, C, h, w] and posterior widths [f] of the frames of one clip: `start`, waited for."""
        found = self.start([frames], None if noise is None else noise[None]).result()
        return Encoded(found.latents[0], None if found.posterior_std is None else found.posterior_std[0])

    @torch.inference_mode()
    def decode(self, latents: Float32[np.ndarray, "f C h w"], frames: int | None = None) -> Frames:
        """Frames of one clip's raw latents, rounded and clamped to bytes; `frames` of them, all unless told.

        Raises ConfigError for targets without a decoder.
        """
        values = torch.from_numpy(np.ascontiguousarray(latents, np.float32))
        frames = frames or frames_shown(self.about.time_map, len(values))

        def decoded() -> Frames:
            parts = []
            for part in self._cut(values, 1) if self.about.time_map == "frame" else [values]:
                pixels = rebuilt(self._model, self.about, part.to(self._like), frames)
                if self.about.patch > 1:
                    pixels = torch.nn.functional.pixel_shuffle(pixels, self.about.patch)
                bytes_ = pixels.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
                parts.append(rearrange(bytes_, "N C H W -> N H W C").cpu().numpy())
            return np.concatenate(parts)

        return self._in_memory(self._unit(frames), decoded)

    def _unit(self, frames: int) -> int:
        """Frames that one forward cannot be cut below: those of a clip where the encoder sees several at once."""
        return 1 if self.about.time_map == "frame" else frames

    @torch.inference_mode()
    def _queue(self, frames: UInt8[Tensor, "N H W 3"], noise: Tensor | None, clips: int, length: int) -> Running:
        running = Running(clips, _now(self._like.is_cuda))
        pieces = self._cut(frames, self._unit(length))
        for piece, drawn in zip(pieces, [None] * len(pieces) if noise is None else self._cut(noise, 1), strict=True):
            pixels = rearrange(piece.to(self._like.device, non_blocking=True), "N H W C -> N C H W")
            pixels = (pixels.float() / 127.5 - 1).to(self._like.dtype)
            if self.about.patch > 1:
                pixels = torch.nn.functional.pixel_unshuffle(pixels, self.about.patch)
            mean, std = posterior(self._model, self.about, pixels, length)
            if drawn is not None:
                if std is None:
                    raise ConfigError("this autoencoder has no posterior to sample: set encoding.posterior to 'mean'")
                mean = mean + std * drawn.to(mean)
            running.add(mean, std)
        running.end()
        return running

    def _cut(self, values: Tensor, unit: int) -> tuple[Tensor, ...]:
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


def _now(on_gpu: bool) -> torch.cuda.Event | float:
    if not on_gpu:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _to_host(values: Tensor) -> Tensor:
    """The values on the host; from a GPU once the stream has come so far."""
    if not values.is_cuda:
        return values
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    return host


class Identity(torch.nn.Module):
    """Pixels as their own latents; a parameter says device and dtype, as in every other model."""

    def __init__(self) -> None:
        super().__init__()
        self.one = torch.nn.Parameter(torch.ones(()))


def load_model(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    """The model of a folder with safetensors, strictly: ConfigError where a tensor is missing or left over."""
    match facts(folder).family:
        case "pixels":
            return Identity().to(dtype)
        case "siglip":
            return from_transformers(folder, "SiglipVisionModel", dtype, OF_THE_TEXT)
    name = read_folder(folder)[0]["_class_name"]
    _refuse_other_shapes(folder, name)
    return _loaded(folder, "diffusers", name, (), torch_dtype=dtype, low_cpu_mem_usage=False)


def _refuse_other_shapes(folder: Path, kind: str) -> None:
    """ConfigError unless config.json describes a model whose tensors are those of the weights.

    By a model without memory: one that is described as larger would take all of this machine's before it is compared.
    """
    config = read_folder(folder)[0]
    there: dict[str, tuple[int, ...]] = {}
    with _explained(folder, "diffusers"):
        for file in weight_files(folder, DIFFUSERS):
            with safe_open(file, framework="pt") as opened:
                there |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        for key, value in config.items():
            layers = sum(value) if isinstance(value, list) and all(type(n) is int for n in value) else value
            if ("layers" in key or key.endswith("_blocks")) and type(layers) is int and layers > len(there):
                raise ConfigError(
                    f"{folder}/config.json: '{key}' is {value}, and the weights have {len(there)} tensors"
                )
        with torch.device("meta"):
            model = getattr(import_module("diffusers"), kind).from_config(config)
    here = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    _refuse_unlike(
        folder, {name for name, shape in here.items() if there.get(name) != shape}, there.keys() - here.keys()
    )


def _refuse_unlike(folder: Path, missing: Set[str], unknown: Set[str]) -> None:
    if missing or unknown:
        raise ConfigError(
            f"{folder}: the weights do not fit config.json: {len(missing)} tensors missing {sorted(missing)[:3]}, "
            f"{len(unknown)} unknown {sorted(unknown)[:3]}; put the whole checkpoint there"
        )


@contextmanager
def _explained(folder: Path, library: Library) -> Iterator[None]:
    """Whatever a library raises for what is in a folder, as a ConfigError; ImportError passes through."""
    try:
        yield
    except (ImportError, ConfigError):
        raise
    except Exception as error:  # each of its classes raises what it meets
        told = (str(error).splitlines() or [""])[0][:TOLD]
        raise ConfigError(f"{folder}: {library} cannot load this encoder: {type(error).__name__}: {told}") from error


def from_transformers(folder: Path, kind: str, dtype: torch.dtype, known: tuple[str, ...]) -> torch.nn.Module:
    """A model of this class of transformers, strictly; tensors that begin with one of `known` may be left over."""
    try:
        return _loaded(folder, "transformers", kind, known, dtype=dtype)
    except ImportError as error:
        raise ConfigError(f"{folder} is a {kind}: pip install 'nextvid[targets]' ({error})") from error


def _loaded(folder: Path, name: Library, kind: str, known: tuple[str, ...], **given: Any) -> torch.nn.Module:  # noqa: ANN401
    """A model from safetensors alone, of this class of a library. Raises ConfigError, and ImportError without it."""
    library: Any = import_module(name)  # 2.7 s, so only where a model is loaded
    logging = library.utils.logging
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # diffusers warns of "float32 modules: []", which concerns nobody
    logging.disable_progress_bar()
    model: torch.nn.Module
    try:
        with _explained(folder, name):
            model, told = getattr(library, kind).from_pretrained(
                str(folder), local_files_only=True, use_safetensors=True, output_loading_info=True, **given
            )
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
    # loaders only warn, and leave missing tensors at random values (docs/method.md 13, trap 18)
    missing = {*told["missing_keys"], *(found[0] for found in told["mismatched_keys"])}
    _refuse_unlike(folder, missing, {key for key in told["unexpected_keys"] if not key.startswith(known)})
    return model


def posterior(model: Any, about: Facts, pixels: Pixels, frames: int) -> tuple[Latents, Latents | None]:  # noqa: ANN401
    """Mean and width of the posterior in fp32 of clips of `frames` frames; width None where the family has none."""
    match about.family:
        case "autoencoder_kl" | "autoencoder_kl_flux2":
            # in fp32 before the width is computed: bf16 loses 2 % there by our measurement
            mean, log_variance = model.encode(pixels).latent_dist.parameters.float().chunk(2, dim=1)
            return mean, (0.5 * log_variance.clamp(-30, 20)).exp()  # bounds: diffusers' DiagonalGaussian
        case "autoencoder_tiny":
            return model.encode(pixels).latents.float(), None
        case "autoencoder_dc":
            return model.encode(pixels).latent.float(), None
        case "autoencoder_kl_cosmos":
            clips = rearrange(pixels, "(n F) c H W -> n c F H W", F=frames)
            # encoders over time pad the last group without a warning: here by the last frame
            if missing := frames_shown(about.time_map, about.latent_frames(frames)) - frames:
                clips = torch.cat([clips, repeat(clips[:, :, -1], "n c H W -> n c p H W", p=missing)], dim=2)
            mean = model.encode(clips).latent_dist.mode().float()  # its distribution is a point
            return rearrange(mean, "n C f h w -> (n f) C h w"), None
        case "siglip":
            cells = model(pixel_values=pixels).last_hidden_state.float()
            return rearrange(cells, "N (h w) C -> N C h w", h=pixels.shape[2] // about.stride), None
        case "pixels":
            return pixels.float(), None


def rebuilt(model: Any, about: Facts, latents: Latents, frames: int) -> Pixels:  # noqa: ANN401
    """Pixels of raw latents of clips of `frames` frames. Raises ConfigError for targets without a decoder."""
    match about.family:
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
