"""Files: every container gives back its frames at its times, and what is called broken is broken."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.frame import PictureType
from PIL import Image, UnidentifiedImageError

from examples.demo import files, plan
from examples.demo.reconstruction import psnr_db
from examples.demo.scenes import Frames
from storage.digest import digest_file


@pytest.fixture(scope="module")
def frames() -> Frames:
    return plan.render_video(plan.plan_videos(5, 8)[0])[:40]


@pytest.mark.parametrize(
    ("ending", "codec"), [("mp4", "h264"), ("mkv", "h264"), ("mov", "h264"), ("webm", "vp9"), ("avi", "mpeg4")]
)
def test_container_gives_back_every_frame_at_its_time(tmp_path: Path, frames: Frames, ending: str, codec: str) -> None:
    path = tmp_path / f"video.{ending}"
    files.write_video(path, frames)
    assert psnr_db(frames, files.read_video(path)).mean() > 27  # chroma at half resolution costs most of what is lost
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name in (codec, f"lib{codec}", "libvpx-vp9")
        assert stream.time_base is not None
        times = [frame.pts * stream.time_base for frame in container.decode(video=0) if frame.pts is not None]
    assert np.allclose([float(time - times[0]) for time in times], [float(Fraction(n, 8)) for n in range(len(frames))])


def test_b_frames_and_low_quality_are_real(tmp_path: Path, frames: Frames) -> None:
    for name, quality, b_frames in (("plain", "first", 0), ("b", "first", 2), ("copy", "copy", 0)):
        files.write_video(tmp_path / f"{name}.mp4", frames, quality=quality, b_frames=b_frames)  # type: ignore[arg-type]
    with av.open(str(tmp_path / "b.mp4")) as container:
        kinds = {PictureType(frame.pict_type) for frame in container.decode(video=0)}
    assert PictureType.B in kinds
    good, poor = (psnr_db(frames, files.read_video(tmp_path / f"{name}.mp4")).mean() for name in ("plain", "copy"))
    assert poor < good - 1
    assert (tmp_path / "copy.mp4").stat().st_size < (tmp_path / "plain.mp4").stat().st_size


@pytest.mark.parametrize("ending", ["mp4", "webm", "mkv", "avi"])
def test_equal_frames_give_equal_bytes(tmp_path: Path, frames: Frames, ending: str) -> None:
    for name in ("a", "b"):
        files.write_video(tmp_path / f"{name}.{ending}", frames)
    assert digest_file(tmp_path / f"a.{ending}") == digest_file(tmp_path / f"b.{ending}")


@pytest.mark.parametrize("number", range(len(files.BROKEN)))
def test_broken_videos_cannot_be_decoded(tmp_path: Path, frames: Frames, number: int) -> None:
    sound = tmp_path / "sound.mp4"
    files.write_video(sound, frames)
    path = files.write_broken(tmp_path, number, sound)
    with pytest.raises((av.FFmpegError, IndexError, ValueError)):
        files.read_video(path)


def test_broken_images_cannot_be_read(tmp_path: Path, frames: Frames) -> None:
    sound = tmp_path / "sound.jpg"
    files.write_image(sound, frames[0], 64)
    for number in range(len(files.BROKEN_IMAGES)):
        with pytest.raises((UnidentifiedImageError, OSError)):
            files.read_image(files.write_broken_image(tmp_path, number, sound))


@pytest.mark.parametrize(("ending", "side"), [("png", 64), ("png", 96), ("jpg", 128)])
def test_images_have_their_size_and_content(tmp_path: Path, frames: Frames, ending: str, side: int) -> None:
    path = tmp_path / f"image.{ending}"
    files.write_image(path, frames[0], side)
    assert files.read_image(path).shape == (side, side, 3)
    small = np.asarray(Image.open(path).convert("RGB").resize((64, 64), Image.Resampling.BOX))
    assert psnr_db(frames[:1], small[None])[0] > 24
    if ending == "png" and side == 64:
        assert (files.read_image(path) == frames[0]).all()
