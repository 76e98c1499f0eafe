"""A clip as one chunk of bytes: a table of F lengths (u32, little-endian), then F JPEGs back to back. Pure functions.

Why JPEG and imagecodecs: docs/decisions/0010. A chunk that is all zeros is a withdrawn clip and reads as black frames,
as withdrawn latents read as zeros. Both directions release the interpreter's lock, so threads scale.

Axes: F frames, H W pixels.
"""

from typing import cast

import imagecodecs
import numpy as np
from jaxtyping import UInt8

from storage.errors import DamagedError

LENGTH_BYTES = 4  # a frame's entry in the table


def encode_clip(frames: UInt8[np.ndarray, "F H W 3"], quality: int, subsampling: str) -> bytes:
    """The chunk of a clip of RGB frames; `subsampling` as in PixelSpec."""
    assert frames.dtype == np.uint8, frames.dtype
    sampled = subsampling.replace(":", "")
    jpegs = [
        imagecodecs.jpeg8_encode(np.ascontiguousarray(frame), level=quality, subsampling=sampled) for frame in frames
    ]
    table = np.array([len(jpeg) for jpeg in jpegs], dtype="<u4")
    return b"".join([table.tobytes(), *jpegs])


def decode_clip(chunk: bytes | memoryview, out: UInt8[np.ndarray, "F H W 3"]) -> None:
    """Decode a chunk into `out`; DamagedError where it is not one of F frames of this size. `out` is garbage then."""
    places = frame_places(chunk, len(out))
    if places is None:
        out[:] = 0
        return
    for (start, end), frame in zip(places, out, strict=True):
        try:
            imagecodecs.jpeg8_decode(cast("bytes", chunk[start:end]), out=frame)  # a memoryview does, its stubs forget
        except (imagecodecs.Jpeg8Error, ValueError) as error:
            raise DamagedError(f"a JPEG of the chunk cannot be decoded to {frame.shape}: {error}") from error


def frame_places(chunk: bytes | memoryview, frames: int) -> list[tuple[int, int]] | None:
    """(start, end) of each JPEG in the chunk, None for a withdrawn clip; DamagedError where the table does not fit."""
    head = LENGTH_BYTES * frames
    if len(chunk) < head:
        raise DamagedError(f"a chunk of {len(chunk)} bytes is too short for the lengths of {frames} frames")
    lengths = np.frombuffer(chunk[:head], dtype="<u4").astype(np.int64)
    if not lengths.any() and not np.frombuffer(chunk, np.uint8).any():
        return None
    ends = head + np.cumsum(lengths)
    if int(ends[-1]) != len(chunk) or int(lengths.min()) == 0:
        raise DamagedError(f"the lengths of {frames} frames end at {int(ends[-1])} in a chunk of {len(chunk)} bytes")
    return list(zip((ends - lengths).tolist(), ends.tolist(), strict=True))
