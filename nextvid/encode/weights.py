"""What a folder of autoencoder weights says without being loaded: its identity and the shape of its latents.

Holds config.json, nextvid.json and the bytes of the weights; no torch, so that planning what to encode costs no import
of it (nextvid/encode/autoencoders.py does the work). Which classes are known is decided here, once.
"""

import functools
import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

from nextvid.config import Strict, parse
from storage.digest import digest_config, digest_file
from storage.errors import ConfigError

_WEIGHTS = "diffusion_pytorch_model.safetensors"  # diffusers' own name; with `.index.json` for weights in several files


class Wrapper(Strict):
    """nextvid.json beside config.json: what stands between a frame and the diffusers model."""

    kind: Literal["autoencoder_kl", "autoencoder_kl_flux2", "autoencoder_tiny", "autoencoder_dc"] | None = None
    patch: int = 1  # pixel_unshuffle by this factor before the encoder, pixel_shuffle after the decoder


class LatentShape(NamedTuple):
    """Channels of a latent frame, and pixels per latent cell and side."""

    channels: int
    stride: int


def autoencoder_digest(folder: str | Path) -> str:
    """Id of what an autoencoder computes: bytes of its weights, its configuration and its wrapper; no path, no version.

    Raises ConfigError where the folder is not an autoencoder that this project knows.
    """
    folder = Path(folder)
    config, wrapper = read_folder(folder)
    said = {key: value for key, value in config.items() if not key.startswith("_")}
    weights = [_remembered(p) for p in _weight_files(folder)]
    return digest_config(
        {"class": config["_class_name"], "config": said, "patch": wrapper.patch, "weights": sorted(weights)}
    )


def latent_shape(folder: str | Path) -> LatentShape:
    """What the configuration says of a latent frame, without loading weights. Raises ConfigError."""
    config, wrapper = read_folder(Path(folder))
    match config["_class_name"]:
        case "AutoencoderKL" | "AutoencoderKLFlux2":
            widths = "block_out_channels"
        case "AutoencoderTiny" | "AutoencoderDC":
            widths = "encoder_block_out_channels"
        case name:
            raise unknown_class(name, Path(folder))
    for key in (widths, "latent_channels"):
        if key not in config:
            raise ConfigError(f"{folder}/config.json: '{key}' is missing; save the model with save_pretrained again")
    halvings = len(config[widths]) - 1  # one between two levels
    return LatentShape(int(config["latent_channels"]), wrapper.patch * 2**halvings)


def read_folder(folder: Path) -> tuple[dict[str, Any], Wrapper]:
    """config.json and nextvid.json of a folder."""
    file = folder / "config.json"
    if not file.is_file():
        raise ConfigError(f"{folder}: no config.json, so this is no folder of a diffusers autoencoder")
    config = json.loads(file.read_text(encoding="utf-8"))
    match config.get("_class_name"):
        case "AutoencoderKL":
            kind = "autoencoder_kl"
        case "AutoencoderKLFlux2":
            kind = "autoencoder_kl_flux2"
        case "AutoencoderTiny":
            kind = "autoencoder_tiny"
        case "AutoencoderDC":
            kind = "autoencoder_dc"
        case name:
            raise unknown_class(name, folder)
    beside = folder / "nextvid.json"
    if not beside.is_file():
        return config, Wrapper()
    wrapper = parse(Wrapper, json.loads(beside.read_text(encoding="utf-8")), str(beside))
    if wrapper.kind not in (None, kind) or wrapper.patch < 1:
        raise ConfigError(f"{beside}: kind {wrapper.kind}, patch {wrapper.patch} do not fit {config['_class_name']}")
    return config, wrapper


def _weight_files(folder: Path) -> list[Path]:
    """The files that diffusers would load. Raises ConfigError where there are none of safetensors."""
    index = folder / f"{_WEIGHTS}.index.json"
    if index.is_file():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        files = [folder / Path(name).name for name in sorted(set(names))]
    else:
        files = [folder / _WEIGHTS]
    for file in files:
        if not file.is_file():
            raise ConfigError(f"{file}: missing; weights are read from safetensors only, never from a pickle")
    return files


def _remembered(path: Path) -> str:
    """Digest of a file, computed once while it stays the same: nobody can set back the time of its last change."""
    at = path.stat()
    return _file_digest(str(path), at.st_ino, at.st_ctime_ns, at.st_size)


@functools.lru_cache(maxsize=16)
def _file_digest(path: str, inode: int, ctime_ns: int, size_bytes: int) -> str:  # these only invalidate the memory
    return digest_file(path)


def unknown_class(name: object, folder: Path | None) -> ConfigError:
    where = f"{folder}: " if folder else ""
    return ConfigError(
        f"{where}{name} is not supported: use AutoencoderKL (also VA-VAE, SD, FLUX), AutoencoderKLFlux2, "
        "AutoencoderTiny or AutoencoderDC"
    )
