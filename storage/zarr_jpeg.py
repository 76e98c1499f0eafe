"""The Zarr v3 codec `nextvid.jpeg_frames`: an array of one clip [1, F, H, W, 3] to a chunk of JPEGs and back.

Zarr finds it through the entry point `zarr.codecs` of pyproject.toml in every environment where this package is
installed. Kept apart from jpeg.py, because importing zarr takes half a second that readers need not spend.
"""

from dataclasses import dataclass
from typing import Any, Self, cast

import numpy as np
from zarr.abc.codec import ArrayBytesCodec
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import Buffer, NDBuffer
from zarr.registry import register_codec

from storage.errors import ConfigError
from storage.jpeg import decode_clip, encode_clip
from storage.spec import SUBSAMPLINGS

NAME = "nextvid.jpeg_frames"


@dataclass(frozen=True)
class JpegFrames(ArrayBytesCodec):
    """Lossy. Quality and subsampling matter to writers; each JPEG says itself what a reader needs."""

    quality: int
    subsampling: str

    is_fixed_size = False

    def __post_init__(self) -> None:
        if type(self.quality) is not int or not 1 <= self.quality <= 100 or self.subsampling not in SUBSAMPLINGS:
            raise ConfigError(
                f"codec {NAME}: quality {self.quality!r} (1 to 100), subsampling {self.subsampling!r} "
                f"({', '.join(SUBSAMPLINGS)})"
            )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The codec of its entry in zarr.json; ConfigError where that is not its own."""
        configuration = data.get("configuration")
        if data.get("name") != NAME or not isinstance(configuration, dict):
            raise ConfigError(f"{data!r} is no codec {NAME}")
        if set(configuration) != {"quality", "subsampling"}:
            raise ConfigError(f"codec {NAME} has the keys quality and subsampling, not {sorted(configuration)}")
        return cls(**configuration)

    def to_dict(self) -> dict[str, Any]:
        """The codec as its entry in zarr.json."""
        return {"name": NAME, "configuration": {"quality": self.quality, "subsampling": self.subsampling}}

    def validate(self, *, shape: tuple[int, ...], dtype: Any, chunk_grid: Any) -> None:  # noqa: ANN401 - zarr's types
        """Refuse arrays that are not clips of RGB bytes."""
        if len(shape) != 5 or shape[-1] != 3 or dtype.to_native_dtype() != np.uint8:
            raise ConfigError(f"codec {NAME} stores uint8 [rows, F, H, W, 3], not {dtype} {shape}")

    async def _decode_single(self, chunk_data: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        out = np.empty(_clip_shape(chunk_spec), np.uint8)
        decode_clip(memoryview(chunk_data.to_bytes()), out)
        return chunk_spec.prototype.nd_buffer.from_numpy_array(out.reshape(chunk_spec.shape))

    async def _encode_single(self, chunk_data: NDBuffer, chunk_spec: ArraySpec) -> Buffer:
        frames = chunk_data.as_numpy_array().reshape(_clip_shape(chunk_spec))
        chunk = encode_clip(frames, self.quality, self.subsampling)
        return cast("Buffer", chunk_spec.prototype.buffer.from_bytes(chunk))

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:
        raise NotImplementedError("the size of a JPEG follows from its picture")


def _clip_shape(chunk_spec: ArraySpec) -> tuple[int, ...]:
    if chunk_spec.shape[0] != 1:
        raise ConfigError(f"codec {NAME} stores one clip a chunk, not {chunk_spec.shape[0]}")
    return tuple(chunk_spec.shape[1:])


register_codec(NAME, JpegFrames)  # for a checkout whose installation is older than the entry point
