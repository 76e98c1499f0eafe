"""Encoders that others trained, frozen, to probe on the same clips: V-JEPA 2, DINOv2 and v3, VideoMAE, MAE; and floors.

Folders are as transformers saves them. Only config.json, preprocessor_config.json and safetensors are read of them, so
nothing in a folder is executed. Image encoders see each frame alone, VideoMAE windows of the length that it was trained
on; features of windows follow one another along tokens. Tokens that show no place (class, registers) are left out.

Axes: B clips, F frames, H W pixels, w windows of a clip, f frames of a window, C channels, h w cells, L tokens of a
clip, D width.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from nextvid.config.benchmarks import Family, ProbedEncoderConfig
from nextvid.encode.autoencoders import from_transformers
from nextvid.encode.weights import TRANSFORMERS, decisive, read_json, read_model_config, weight_digests
from nextvid.evaluate.features import FrozenEncoder, Input, Parts, level_blocks
from storage.digest import digest_config
from storage.errors import ConfigError, RefusedError
from storage.spec import EncodingSpec

IMAGE_FRAMES = 16  # docs/method.md 9: an image is repeated to so many for encoders that see whole clips
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and deviation by colour: the default of every family
FIELDS = 4  # of a frame's side, whose mean colours are the floor `pixels`: 48 numbers, which 16 heads can share
# Beginnings of tensors that checkpoints have beside the encoder: of classifiers and of what masked pixels are made by.
BESIDE = ("classifier.", "pooler.", "fc_norm.", "decoder.", "encoder_to_decoder.", "mask_token")


class Known(NamedTuple):
    """What transformers calls the parts of a model."""

    family: Family
    kind: str  # its class
    blocks: str
    norm: str
    side: str | None  # key of config.json for the one side in pixels that it takes; None: any multiple of the patch
    window: str | Literal["whole", "frame"]  # what one forward sees; else a key of config.json for a number of frames


# By `model_type` of config.json.
KNOWN = {
    "vjepa2": Known("vjepa2", "VJEPA2Model", "encoder.layer", "encoder.layernorm", "crop_size", "whole"),
    "dinov2": Known("dinov2", "Dinov2Model", "encoder.layer", "layernorm", None, "frame"),
    "dinov2_with_registers": Known("dinov2", "Dinov2WithRegistersModel", "encoder.layer", "layernorm", None, "frame"),
    "dinov3_vit": Known("dinov3", "DINOv3ViTModel", "model.layer", "norm", None, "frame"),
    "videomae": Known("videomae", "VideoMAEModel", "encoder.layer", "layernorm", "image_size", "num_frames"),
    "vit_mae": Known("vit_mae", "ViTMAEModel", "layers", "layernorm", "image_size", "frame"),
}


@dataclass(frozen=True)
class Shape:
    """What the small files of an encoder's folder say."""

    known: Known
    width: int
    depth: int
    patch: int
    side: int | None  # pixels; None takes any multiple of the patch
    tubelet: int  # frames of a token
    window: int | None  # frames of one forward; None sees whole clips
    mean: tuple[float, ...]  # by colour, of pixels from 0 to 1
    std: tuple[float, ...]


def encoder_digest(config: ProbedEncoderConfig) -> str:
    """Id of what an encoder computes: bytes of its weights, configuration, statistics; no path. Raises ConfigError."""
    if config.folder is None:
        return digest_config({"family": config.family})
    folder, shape = Path(config.folder), shape_of(config)
    said = decisive(read_json(folder / "config.json"))
    weights = weight_digests(folder, TRANSFORMERS)
    return digest_config({"config": said, "mean": shape.mean, "std": shape.std, "weights": weights})


def shape_of(config: ProbedEncoderConfig) -> Shape:
    """The shape of a folder's encoder. Raises ConfigError where it holds another family, or none."""
    assert config.folder is not None, "a floor has no folder"
    folder = Path(config.folder)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder}: no config.json, so this is no folder of an encoder that transformers saved")
    said = read_model_config(folder / "config.json")
    known = KNOWN.get(str(said.get("model_type")))
    if known is None or known.family != config.family:
        raise ConfigError(
            f"{folder} holds a {said.get('model_type')!r}, not family '{config.family}': correct 'family' or 'folder' "
            "under 'encoders' in corpus.yaml"
        )

    def number(key: str) -> int:
        value = said.get(key)
        if type(value) is not int or value < 1:
            raise ConfigError(
                f"{folder}/config.json: '{key}' is {value!r}, a number was expected; save the model again"
            )
        return value

    match known.window:
        case "whole":
            tubelet, window = number("tubelet_size"), None
        case "frame":
            tubelet, window = 1, 1
        case key:
            tubelet, window = number("tubelet_size"), number(key)
    side = None if known.side is None else number(known.side)
    width, depth, patch = (number(key) for key in ("hidden_size", "num_hidden_layers", "patch_size"))
    return Shape(known, width, depth, patch, side, tubelet, window, *_statistics(folder))


def _statistics(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation by colour: those of the folder's preprocessor, where it has one."""
    for file in (folder / "preprocessor_config.json", folder / "video_preprocessor_config.json"):
        if file.is_file():
            said = read_json(file)
            found = tuple(
                said.get(key, default) for key, default in zip(("image_mean", "image_std"), IMAGENET, strict=True)
            )
            for values in found:
                if len(values) != 3 or not all(type(value) in (int, float) for value in values):
                    raise ConfigError(f"{file}: 'image_mean' and 'image_std' are not three numbers each")
            return tuple(found[0]), tuple(found[1])
    return IMAGENET


def encoder_width(config: ProbedEncoderConfig, channels: int) -> int:
    """Numbers of a token; of stored latents as many as they have channels."""
    match config.family:
        case "latents":
            return channels
        case "pixels":
            return 3 * FIELDS**2
    return shape_of(config).width


def frames_of(config: ProbedEncoderConfig, frames: int, levels: int) -> int:
    """Frames of the clips that an encoder is given, where a benchmark's have so many; an image's are repeated to them.

    Raises ConfigError for its folder, RefusedError where clips or levels do not fit the encoder.
    """
    if config.folder is None:
        if levels > 1:
            raise RefusedError(
                f"the benchmark reads {levels} levels, and '{config.family}' has one: leave it out there"
            )
        return frames
    shape = shape_of(config)
    level_blocks(shape.depth, levels)
    if frames == 1:
        return shape.window or IMAGE_FRAMES
    if frames % (shape.window or shape.tubelet):
        raise RefusedError(
            f"clips of {frames} frames are no multiple of the {shape.window or shape.tubelet} that {config.folder} "
            "takes: change 'frames' in the benchmark's policy"
        )
    return frames


def load_encoder(
    name: str, config: ProbedEncoderConfig, frames: int, spec: EncodingSpec, levels: int, device: torch.device
) -> FrozenEncoder:
    """An encoder of corpus.yaml on clips of `frames_of` frames as this spec stores them.

    Raises ConfigError where the weights do not fit the folder's config.json.
    """
    match config.family:
        case "latents":
            return FrozenEncoder(name, "latents", frames, spec.channels, frames, _cells)
        case "pixels":
            return FrozenEncoder(name, "pixels", frames, encoder_width(config, spec.channels), frames, _mean_colours)
    assert config.folder is not None, "ProbedEncoderConfig refuses it"
    shape = shape_of(config)
    model = from_transformers(Path(config.folder), shape.known.kind, torch.float32, BESIDE)
    model = model.eval().requires_grad_(False).to(device)
    if shape.known.family == "vit_mae":
        setattr(model.config, "mask_ratio", 0.0)  # noqa: B010 - not in torch's types. It hides patches when it evaluates
    side = shape.side or spec.resolution // shape.patch * shape.patch
    encode = _Loaded(model, shape, side, level_blocks(shape.depth, levels)).encode
    parts = Parts(model, shape.known.blocks, shape.known.norm)
    return FrozenEncoder(name, "pixels", frames, shape.width, frames // shape.tubelet, encode, levels, parts=parts)


class _Loaded:
    """A model of transformers, and the outputs of the blocks that are probed."""

    def __init__(self, model: nn.Module, shape: Shape, side: int, blocks: tuple[int, ...]) -> None:
        self._model, self._shape, self._side, self._blocks = model, shape, side, blocks
        # VideoMAE without it leaves the norm to its classifier; heads normalise tokens in any case
        self._norm = dict(model.named_modules()).get(shape.known.norm, nn.Identity())
        self._taken: dict[int, Tensor] = {}
        for block in blocks:
            layer = model.get_submodule(f"{shape.known.blocks}.{block}")
            layer.register_forward_hook(partial(self._take, block))

    def _take(self, block: int, _layer: nn.Module, _given: object, out: Tensor | tuple[Tensor, ...]) -> None:
        self._taken[block] = out[0] if isinstance(out, tuple) else out

    def encode(self, clips: Input) -> Float[Tensor, "B L D"]:
        """Features of the blocks one after the other, each through the final norm; bf16 on a GPU."""
        shape, side = self._shape, self._side
        window = shape.window or clips.shape[1]
        pixels = rearrange(clips.float() / 255, "b f h w c -> (b f) c h w")
        if pixels.shape[-2:] != (side, side):
            pixels = functional.interpolate(pixels, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in (shape.mean, shape.std))
        pixels = (pixels - mean) / std
        cells = (side // shape.patch) ** 2 * (window // shape.tubelet)
        given: dict[str, Any] = {}
        match shape.known.family:
            case "vjepa2":
                pixels = rearrange(pixels, "(b f) c h w -> b f c h w", f=window)
                given = {"skip_predictor": True}
            case "videomae":
                pixels = rearrange(pixels, "(b f) c h w -> b f c h w", f=window)
            case "vit_mae":  # which orders patches by noise
                given = {"noise": torch.arange(cells, device=pixels.device).expand(len(pixels), -1)}
        with torch.autocast(clips.device.type, torch.bfloat16, enabled=clips.device.type == "cuda"):
            self._model(pixels, **given)
            levels = [self._norm(self._taken.pop(block))[:, -cells:] for block in self._blocks]
        return torch.cat([rearrange(x, "(b w) n d -> b (w n) d", b=len(clips)) for x in levels], dim=1).float()


def _mean_colours(clips: Input) -> Float[Tensor, "B F D"]:
    """Mean colours of the fields of each frame, from -1 to 1: the floor `pixels`."""
    flat = rearrange(clips.float() / 127.5 - 1, "b f h w c -> (b f) c h w")
    return rearrange(functional.adaptive_avg_pool2d(flat, FIELDS), "(b f) c y x -> b f (y x c)", b=len(clips))


def _cells(latents: Input) -> Float[Tensor, "B L C"]:
    """Each cell of stored latents as a token: the floor `latents`."""
    return rearrange(latents.float(), "b f c h w -> b (f h w) c")
