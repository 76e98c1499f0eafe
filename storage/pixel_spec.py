"""PixelSpec: how given frames become the bytes of a pixel store. Frames and rates belong to clips, not here.

Its digest names the store's folder, as an encoding spec's does (spec.py).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from storage.digest import digest
from storage.errors import ConfigError
from storage.spec import checked_fields

SUBSAMPLINGS = ("4:2:0", "4:2:2", "4:4:4")  # what libjpeg-turbo writes of YCbCr


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
