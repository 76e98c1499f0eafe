"""EncodingSpec, PixelSpec: how given frames become the bytes of a store. Frames and rates belong to clips, not here.

A spec's digest names the store's folder, so two specs never share a row; `spec.json` in it holds the fields.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any

from storage.digest import digest
from storage.errors import ConfigError

POSTERIORS = ("mean", "sample")
STORED = ("float16", "int8")
READ = (*STORED, "keepbits7")  # float16 with 7 bits of mantissa: as many bytes, so it is not written any more
# What axis 1 is: source frames, or the latent frames of a causal encoder over time, of which the first covers the first
# source frame and each later one the next 4 or 8; clips that do not come out even are filled up with their last frame.
TIME_MAPS = ("frame", "causal4", "causal8")
SUBSAMPLINGS = ("4:2:0", "4:2:2", "4:4:4")  # of PixelSpec: what libjpeg-turbo writes of YCbCr
UNRECORDED = 2  # specs did not name their maker's version up to this one, which keeps their digests


def checked_fields(spec: type[Any], value: Mapping[str, Any], noun: str, where: str) -> Mapping[str, Any]:
    """What a spec's `to_json` gave; ConfigError where a key is missing, unknown or of another type than its field."""
    types = {field.name: (int if field.type in ("int", int) else str) for field in fields(spec)}
    if not isinstance(value, Mapping) or set(value) != set(types):
        found = sorted(value, key=str) if isinstance(value, Mapping) else f"those of {value!r:.100}"
        raise ConfigError(f"{noun} has the keys {sorted(types)}, not {found}")
    for name, kind in types.items():
        if type(value[name]) is not kind:
            raise ConfigError(f"{where}.{name}: {value[name]!r} is not of type {kind.__name__}")
    return value


@dataclass(frozen=True)
class EncodingSpec:
    """One way to encode. Sizes are those of a latent frame: channels, rows and columns of cells."""

    autoencoder: str  # digest of weights and config, 32 hex digits
    resolution: int  # pixels
    resize: str
    precision: str
    posterior: str
    storage: str
    channels: int
    height: int
    width: int
    time_map: str = "frame"
    version: int = UNRECORDED  # of the maker of `latents` (nextvid/graph.py)

    def __post_init__(self) -> None:
        for name, value, known in (
            ("storage", self.storage, READ),
            ("posterior", self.posterior, POSTERIORS),
            ("time_map", self.time_map, TIME_MAPS),
        ):
            if value not in known:
                raise ConfigError(f"encoding.{name}: '{value}' is none of {', '.join(known)}")
        if min(self.resolution, self.channels, self.height, self.width) < 1:
            raise ConfigError("encoding: resolution, channels, height and width must be at least 1")

    def digest(self) -> str:
        """32 hex digits that name the store."""
        return digest(self.to_json())

    def to_json(self) -> dict[str, str | int]:
        """Its fields, as in spec.json; the maker's version only where it is later than UNRECORDED."""
        return {name: value for name, value in asdict(self).items() if (name, value) != ("version", UNRECORDED)}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "EncodingSpec":
        """Spec of what `to_json` gave; ConfigError where a key is missing, unknown or of another type."""
        known = {"version": UNRECORDED, **value} if isinstance(value, Mapping) else value
        return EncodingSpec(**checked_fields(EncodingSpec, known, "an encoding spec", "encoding"))

    def latent_frames(self, frames: int) -> int:
        """Latent frames of a clip of `frames` frames."""
        return latent_frames(self.time_map, frames)

    def row_shape(self, frames: int) -> tuple[int, int, int, int]:
        """(F, C, h, w) of one row of a clip of `frames` frames; F counts latent frames."""
        return (self.latent_frames(frames), self.channels, self.height, self.width)

    def row_bytes(self, frames: int) -> int:
        """Bytes of one row: two a value; with `int8` one, and four a channel for its scale."""
        values = self.latent_frames(frames) * self.channels * self.height * self.width
        return values + 4 * self.channels if self.storage == "int8" else 2 * values


@dataclass(frozen=True)
class PixelSpec:
    """Square RGB frames of `resolution` pixels, resized by `resize`, each a JPEG of this quality and subsampling."""

    resolution: int  # pixels
    resize: str
    quality: int  # 1 to 100, libjpeg's scale
    subsampling: str  # of chroma
    codec: str = "jpeg"

    def __post_init__(self) -> None:
        if self.codec != "jpeg":
            raise ConfigError(f"encoding.pixels.codec: '{self.codec}' is not 'jpeg'")
        if not 1 <= self.quality <= 100:
            raise ConfigError(f"encoding.pixels.quality: {self.quality} is not within 1 to 100")
        if self.subsampling not in SUBSAMPLINGS:
            raise ConfigError(f"encoding.pixels.subsampling: '{self.subsampling}' is none of {', '.join(SUBSAMPLINGS)}")
        if self.resolution < 1:
            raise ConfigError("encoding.pixels: resolution must be at least 1")

    def digest(self) -> str:
        """32 hex digits that name the store."""
        return digest(self.to_json())

    def to_json(self) -> dict[str, str | int]:
        """Its fields, as in spec.json."""
        return asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "PixelSpec":
        """Spec of what `to_json` gave; ConfigError where a key is missing, unknown or of another type."""
        return PixelSpec(**checked_fields(PixelSpec, value, "a pixel spec", "encoding.pixels"))

    def row_shape(self, frames: int) -> tuple[int, int, int, int]:
        """(F, H, W, 3) of one row, uint8."""
        return (frames, self.resolution, self.resolution, 3)


@lru_cache(maxsize=64)  # asked for with every row; a project has a few clip lengths
def latent_frames(time_map: str, frames: int) -> int:
    """Latent frames of a clip."""
    return latent_of_frames(time_map, frames)[-1] + 1


def frames_shown(time_map: str, latents: int) -> int:
    """Source frames that so many latent frames cover."""
    return 1 + (latents - 1) * _each(time_map)


def latent_of_frames(time_map: str, frames: int) -> list[int]:
    """Which latent frame covers each of a clip's frames: what a recipe whose tubelets count frames reads by."""
    return [-(-frame // _each(time_map)) for frame in range(frames)]


def _each(time_map: str) -> int:
    """Source frames that a latent frame after the first covers."""
    return 1 if time_map == "frame" else int(time_map.removeprefix("causal"))
