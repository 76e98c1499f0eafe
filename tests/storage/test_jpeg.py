"""storage/jpeg.py and zarr_jpeg.py: a clip as a chunk of JPEGs, and what is refused."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import example, given
from hypothesis import strategies as st

from storage.errors import ConfigError, DamagedError
from storage.jpeg import LENGTH_BYTES, decode_clip, encode_clip, frame_places
from storage.spec import SUBSAMPLINGS
from storage.zarr_jpeg import NAME, JpegFrames
from tests.storage.pixel_stores import SIDE, clip, pixel_spec


def decoded(chunk: bytes, frames: int, side: int = SIDE) -> np.ndarray:
    out = np.empty((frames, side, side, 3), np.uint8)
    decode_clip(chunk, out)
    return out


def psnr_db(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2)))


@given(
    frames=st.integers(1, 20),
    side=st.integers(8, 40),
    quality=st.integers(75, 100),
    subsampling=st.sampled_from(SUBSAMPLINGS),
    seed=st.integers(0, 2**32 - 1),
)
def test_smooth_clips_come_back(frames: int, side: int, quality: int, subsampling: str, seed: int) -> None:
    """Every shape and setting gives the clip back, each frame in its place; the bound is that of quality 75."""
    frames_in = clip(seed.to_bytes(16, "little"), frames, side)
    chunk = encode_clip(frames_in, quality, subsampling)
    assert psnr_db(decoded(chunk, frames, side), frames_in) > 25
    places = frame_places(chunk, frames)
    assert places is not None
    assert places[0][0] == LENGTH_BYTES * frames
    assert [start for start, _ in places[1:]] == [end for _, end in places[:-1]]
    assert all(chunk[start : start + 2] == b"\xff\xd8" for start, _ in places)  # each is a JPEG file


@given(seed=st.integers(0, 2**32 - 1), quality=st.integers(1, 100))
def test_any_frames_survive(seed: int, quality: int) -> None:
    """Noise too: no clip has no chunk, and a chunk gives the same frames each time."""
    noise = np.random.default_rng(seed).integers(0, 256, (2, 24, 24, 3), np.uint8)
    chunk = encode_clip(noise, quality, "4:2:0")
    np.testing.assert_array_equal(decoded(chunk, 2, 24), decoded(chunk, 2, 24))
    assert encode_clip(noise, quality, "4:2:0") == chunk


def test_better_settings_are_closer() -> None:
    """Quality and chroma are what is asked for: each step up costs bytes and gains decibels."""
    colours = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), np.uint8).repeat(4, 1).repeat(4, 2)
    found = []
    for quality, subsampling in ((50, "4:2:0"), (90, "4:2:0"), (90, "4:2:2"), (90, "4:4:4"), (98, "4:4:4")):
        chunk = encode_clip(colours, quality, subsampling)
        found.append((len(chunk), psnr_db(decoded(chunk, 1, 64), colours)))
    assert found == sorted(found)
    assert len({size for size, _ in found}) == len(found)


def test_a_view_that_is_not_contiguous_is_encoded_as_it_looks() -> None:
    wide = clip(bytes(16), 3, 48)[:, ::2, ::-1]
    assert encode_clip(wide, 90, "4:2:0") == encode_clip(np.ascontiguousarray(wide), 90, "4:2:0")


@given(cut=st.integers(0, 10_000))
@example(cut=0)
def test_a_truncated_chunk_is_refused(cut: int) -> None:
    chunk = encode_clip(clip(bytes(16), 4), 90, "4:2:0")
    with pytest.raises(DamagedError):
        decoded(chunk[: cut % len(chunk)], 4)


def test_a_table_that_does_not_fit_is_refused() -> None:
    chunk = encode_clip(clip(bytes(16), 4), 90, "4:2:0")
    for place in (0, 1, 4, 15):
        changed = bytearray(chunk)
        changed[place] ^= 0x41
        with pytest.raises(DamagedError, match="lengths of 4 frames"):
            decoded(bytes(changed), 4)
    lengths = np.frombuffer(chunk[:16], "<u4").copy()
    lengths[1] += lengths[0]
    lengths[0] = 0  # adds up, but a frame has no bytes
    with pytest.raises(DamagedError, match="lengths of 4 frames"):
        decoded(lengths.tobytes() + chunk[16:], 4)


def test_bytes_that_are_no_jpeg_are_refused() -> None:
    chunk = bytearray(encode_clip(clip(bytes(16), 2), 90, "4:2:0"))
    chunk[8:10] = b"no"
    with pytest.raises(DamagedError, match="cannot be decoded"):
        decoded(bytes(chunk), 2)


def test_frames_of_another_size_are_refused() -> None:
    with pytest.raises(DamagedError, match="cannot be decoded"):
        decoded(encode_clip(clip(bytes(16), 2, 24), 90, "4:2:0"), 2, 32)


def test_a_withdrawn_chunk_is_black() -> None:
    assert not decoded(bytes(900), 4).any()
    with pytest.raises(DamagedError):
        decoded(bytes(899) + b"\1", 4)  # zeros for lengths, but not withdrawn


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quality": 0}, "quality: 0 is not within 1 to 100"),
        ({"quality": 101}, "quality"),
        ({"quality": "90"}, "not of type int"),
        ({"subsampling": "420"}, "subsampling: '420' is none of 4:2:0"),
        ({"codec": "webp"}, "'webp' is not 'jpeg'"),
        ({"resolution": 0}, "at least 1"),
        ({"colour": "red"}, "has the keys"),
    ],
)
def test_spec_refuses(changes: dict[str, str | int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pixel_spec(**changes)


def test_spec_digest_says_everything() -> None:
    specs = [
        pixel_spec(),
        pixel_spec(quality=95),
        pixel_spec(subsampling="4:4:4"),
        pixel_spec(resolution=64),
        pixel_spec(resize="area"),
    ]
    assert len({found.digest() for found in specs}) == len(specs)
    assert pixel_spec().digest() == pixel_spec().digest()


@pytest.mark.parametrize(
    "entry",
    [
        {"name": NAME},
        {"name": NAME, "configuration": {"quality": 90}},
        {"name": NAME, "configuration": {"quality": 0, "subsampling": "4:2:0"}},
        {"name": NAME, "configuration": {"quality": True, "subsampling": "4:2:0"}},
        {"name": NAME, "configuration": {"quality": 90, "subsampling": "x"}},
        {"name": "jpeg", "configuration": {"quality": 90, "subsampling": "4:2:0"}},
    ],
)
def test_codec_refuses_other_entries(entry: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        JpegFrames.from_dict(entry)


def test_codec_round_trips_its_entry() -> None:
    codec = JpegFrames(90, "4:2:0")
    assert JpegFrames.from_dict(codec.to_dict()) == codec


def test_zarr_writes_and_reads_with_the_codec(tmp_path: Path) -> None:
    """An array that zarr-python itself writes holds the chunks that we would write."""
    clips = np.stack([clip(bytes([n]) * 16, 3) for n in range(5)])
    array = zarr.create_array(
        str(tmp_path / "clips"),
        shape=clips.shape,
        chunks=(1, *clips.shape[1:]),
        dtype="uint8",
        serializer=JpegFrames(90, "4:2:0"),
        compressors=None,
    )
    array[:] = clips
    found = np.asarray(zarr.open_array(str(tmp_path / "clips"), mode="r")[:])
    for row, frames in zip(found, clips, strict=True):
        np.testing.assert_array_equal(row, decoded(encode_clip(frames, 90, "4:2:0"), 3))


@pytest.mark.parametrize(("shape", "chunk"), [((2, 4, 8, 8), (1, 4, 8, 8)), ((2, 4, 8, 8, 3), (2, 4, 8, 8, 3))])
def test_codec_refuses_arrays_that_are_no_clips(tmp_path: Path, shape: tuple[int, ...], chunk: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError):
        zarr.create_array(
            str(tmp_path / "clips"),
            shape=shape,
            chunks=chunk,
            dtype="uint8",
            serializer=JpegFrames(90, "4:2:0"),
            compressors=None,
        )[:] = np.ones(shape, np.uint8)


def test_a_reader_that_knows_only_zarr_finds_the_codec(tmp_path: Path) -> None:
    """Through the entry point of the installed package: nothing of ours is imported by hand."""
    clips = clip(bytes(16), 3)[None]
    path = str(tmp_path / "clips")
    array = zarr.create_array(
        path,
        shape=clips.shape,
        chunks=clips.shape,
        dtype="uint8",
        serializer=JpegFrames(90, "4:2:0"),
        compressors=None,
    )
    array[:] = clips
    code = "import sys, zarr; print(int(zarr.open_array(sys.argv[1], mode='r')[:].sum()))"
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == int(np.asarray(array[:]).sum())
