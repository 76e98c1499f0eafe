"""An autoencoder's folder without loading it: its family, its digest, and the shape of its latents.

Reads config.json, nextvid.json and the bytes of the weights. Imports no torch, so that planning answers at once;
autoencoders.py does the work.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from nextvid.config.strict import Strict, parse
from storage.digest import digest_config, digest_file
from storage.errors import ConfigError
from storage.spec import latent_frames

Family = Literal[
    "autoencoder_kl", "autoencoder_kl_flux2", "autoencoder_tiny", "autoencoder_dc", "autoencoder_kl_cosmos",
    "siglip", "pixels",
]  # fmt: skip

# By `_class_name` of diffusers' config.json or `model_type` of transformers'.
FAMILIES: dict[str, Family] = {
    "AutoencoderKL": "autoencoder_kl",
    "AutoencoderKLFlux2": "autoencoder_kl_flux2",
    "AutoencoderTiny": "autoencoder_tiny",
    "AutoencoderDC": "autoencoder_dc",
    "AutoencoderKLCosmos": "autoencoder_kl_cosmos",
    "siglip": "siglip",
    "siglip_vision_model": "siglip",
}
LARGEST_JSON = 8_000_000  # bytes, our choice: the index of a model of 100,000 tensors
# Keys of config.json for which diffusers and transformers import modules of the folder, of the Hub, or of quantizers;
# and those whose value is a repository of kernels where it has a slash.
FOREIGN_CODE = ("auto_map", "quantization_config")
NAMES_OF_CODE = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
# The names of diffusers and transformers for their files; each may come in several, with an `.index.json`.
DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model.safetensors", "model.safetensors"


class Wrapper(Strict):
    """nextvid.json beside config.json: what is done to a frame before the model. `pixels` needs no other file."""

    kind: Family | None = None
    patch: int = 1  # pixel_unshuffle by this factor before the encoder, pixel_shuffle after the decoder


class Facts(NamedTuple):
    """The latents of a family and its configuration; `stride` and `channels` include the wrapper's patch."""

    family: Family
    channels: int  # of a latent frame
    stride: int  # pixels a latent cell and side
    patch: int
    time_map: str = "frame"
    posterior: bool = False  # whether there is a width to sample with
    decoder: bool = True
    side: int | None = None  # the one resolution in pixels that it takes

    def latent_frames(self, frames: int) -> int:
        """Latent frames of a clip."""
        return latent_frames(self.time_map, frames)


def autoencoder_digest(folder: str | Path) -> str:
    """Id of what an autoencoder computes: bytes of its weights, its configuration and its patch; no path, no version.

    Raises ConfigError where the folder is not an autoencoder that this project knows.
    """
    folder = Path(folder)
    config, wrapper = read_folder(folder)
    family = facts(folder).family
    weights = [] if family == "pixels" else weight_digests(folder, TRANSFORMERS if family == "siglip" else DIFFUSERS)
    name = config.get("_class_name", wrapper.kind or family)
    return digest_config({"class": name, "config": decisive(config), "patch": wrapper.patch, "weights": weights})


def decisive(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of config.json decides what a model computes: no path, no version."""
    return {key: value for key, value in config.items() if not key.startswith("_") and key != "transformers_version"}


def facts(folder: str | Path) -> Facts:
    """The latents of a folder's autoencoder, by its configuration alone. Raises ConfigError."""
    folder = Path(folder)
    config, wrapper = read_folder(folder)
    patch = wrapper.patch

    def value(key: str, kind: type = int, within: Mapping[str, Any] = config) -> Any:  # noqa: ANN401 - JSON is Any
        if type(within.get(key)) is not kind:
            what = "number" if kind is int else "list"
            raise ConfigError(f"{folder}/config.json: '{key}' is missing or no {what}; save the model again")
        return within[key]

    match family := _family(config, wrapper, folder):
        case "pixels":
            return Facts(family, 3 * patch**2, patch, patch)
        case "siglip":
            vision = config.get("vision_config", config)
            width, side, stride = (value(key, within=vision) for key in ("hidden_size", "image_size", "patch_size"))
            if patch > 1:
                raise ConfigError(f"{folder}/nextvid.json: 'patch' does not fit SigLIP, which has its own")
            return Facts(family, width, stride, 1, decoder=False, side=side)
        case "autoencoder_kl_cosmos":
            stride, over_time = (value(f"{name}_compression_ratio") for name in ("spatial", "temporal"))
            if patch > 1:
                raise ConfigError(f"{folder}/nextvid.json: 'patch' is for encoders of single frames")
            return Facts(family, value("latent_channels"), stride, 1, f"causal{over_time}")
        case "autoencoder_kl" | "autoencoder_kl_flux2":
            stride = patch * 2 ** (len(value("block_out_channels", list)) - 1)  # one halving between levels
            return Facts(family, value("latent_channels"), stride, patch, posterior=True)
        case "autoencoder_tiny" | "autoencoder_dc":
            stride = patch * 2 ** (len(value("encoder_block_out_channels", list)) - 1)
            return Facts(family, value("latent_channels"), stride, patch)


def read_folder(folder: Path) -> tuple[dict[str, Any], Wrapper]:
    """config.json, empty for raw pixels, and nextvid.json of a folder."""
    file, beside = folder / "config.json", folder / "nextvid.json"
    wrapper = parse(Wrapper, read_json(beside), str(beside)) if beside.is_file() else Wrapper()
    if wrapper.patch < 1:
        raise ConfigError(f"{beside}: patch {wrapper.patch} is not at least 1")
    if not file.is_file():
        if wrapper.kind == "pixels":
            return {}, wrapper
        raise ConfigError(f"{folder}: no config.json, so this is no folder of a diffusers autoencoder")
    return read_model_config(file), wrapper


def read_model_config(file: Path) -> dict[str, Any]:
    """config.json of a model. Raises ConfigError where it asks a library for code that is not its own."""
    found = read_json(file)
    nested = [found]
    for keys in nested:  # grows meanwhile
        nested += [value for value in keys.values() if isinstance(value, dict)]
        for key, value in keys.items():
            foreign = "/" in str(value) if key in NAMES_OF_CODE else key in FOREIGN_CODE and value is not None
            if foreign:
                raise ConfigError(
                    f"{file}: '{key}' asks for code or kernels of others, which are never loaded: remove it"
                )
    return found


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file of a checkpoint's folder. Raises ConfigError where it holds no keys."""
    with file.open("rb") as opened:
        data = opened.read(LARGEST_JSON + 1)
    try:
        if len(data) > LARGEST_JSON:
            raise ValueError(f"more than {LARGEST_JSON} bytes")
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: not readable as JSON ({error}): put the checkpoint's own file there") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{file}: holds {type(found).__name__}, keys were expected")
    return found


def _family(config: dict[str, Any], wrapper: Wrapper, folder: Path) -> Family:
    name = config.get("_class_name", config.get("model_type"))
    family = "pixels" if not config and wrapper.kind == "pixels" else FAMILIES.get(str(name))
    if family is None:
        raise ConfigError(
            f"{folder}: {name} is not supported: use AutoencoderKL (also VA-VAE, SD, FLUX), AutoencoderKLFlux2, "
            "AutoencoderTiny, AutoencoderDC, AutoencoderKLCosmos, a SigLIP with fixed resolution, or raw pixels "
            '(a nextvid.json that says {"kind": "pixels"})'
        )
    if wrapper.kind not in (None, family):
        raise ConfigError(f"{folder}/nextvid.json: kind {wrapper.kind}, patch {wrapper.patch} do not fit {family}")
    return family


def weight_files(folder: Path, name: str) -> list[Path]:
    """The weights that would be loaded; `name` is that of a single file.

    Raises ConfigError where there are none of safetensors.
    """
    index = folder / f"{name}.index.json"
    names = [name]
    if index.is_file():
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not places or not all(isinstance(part, str) for part in places.values()):
            raise ConfigError(
                f"{index}: 'weight_map' does not name a file of each tensor; put the checkpoint's own there"
            )
        names = sorted(set(places.values()))
        if outside := [part for part in names if Path(part).name != part]:
            raise ConfigError(f"{index}: names {outside[0]!r}, which is no file of its folder; put the weights there")
    files = [folder / part for part in names]
    for file in files:
        if not file.is_file():
            raise ConfigError(f"{file}: missing; weights are read from safetensors only, never from a pickle")
    return files


def weight_digests(folder: Path, name: str) -> list[str]:
    """Digests of `weight_files`, sorted. Raises ConfigError."""
    facts_of = [(file, file.stat()) for file in weight_files(folder, name)]
    # of which the time of the last change cannot be set back
    return sorted(_file_digest(str(file), at.st_ino, at.st_ctime_ns, at.st_size) for file, at in facts_of)


@functools.lru_cache(maxsize=16)
def _file_digest(path: str, inode: int, ctime_ns: int, size_bytes: int) -> str:  # computed again where one changes
    return digest_file(path)
