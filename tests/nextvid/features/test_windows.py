"""Which clips of a file are shown: inside the file, evenly apart, as many as fit; and what is refused."""

import polars as pl
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from nextvid.config.datasets import ClipPolicy
from nextvid.features.windows import DECODED, Windows
from nextvid.video.probe import Inspection, MediaFacts
from storage.errors import MediaError

TRAINED = ClipPolicy(frames=4, fps=4, crop="centre", pad="skip")
TICK_US = 1_000  # by which containers round times


def film(seconds: float, fps_hz: float = 8.0, start_us: int = 0, width: int = 96, height: int = 64) -> Inspection:
    facts = MediaFacts(
        "video", "mp4", "h264", "yuv420p", width, height, 0, False, 1.0, fps_hz, None, round(1e6 * seconds), start_us,
        (), "pyav",
    )  # fmt: skip
    return Inspection("0" * 32, 1000, facts)


@given(
    st.floats(1, 100), st.sampled_from([8.0, 24.0, 30000 / 1001]), st.integers(0, 10**7), st.integers(2, 16),
    st.floats(0.1, 30), st.tuples(st.integers(16, 4000), st.integers(16, 4000)),
)  # fmt: skip
def test_sliding_windows(
    seconds: float, fps_hz: float, start_us: int, frames: int, every_s: float, size: tuple[int, int]
) -> None:
    windows = Windows.of(TRAINED, frames=frames, every_s=every_s)
    end_us, last_us = start_us + 1e6 * seconds - 1e6 / fps_hz, 250_000 * (frames - 1)
    if start_us + last_us > end_us + 2 * TICK_US:
        with pytest.raises(MediaError, match="are shorter than a clip"):
            windows.rows("film.mp4", film(seconds, fps_hz, start_us, *size))
        return
    assume(start_us + last_us <= end_us)  # within the tick, either is right
    rows = windows.rows("film.mp4", film(seconds, fps_hz, start_us, *size))
    assert set(rows.columns) == set(DECODED)
    assert rows["row_id"].n_unique() == rows.height
    for number, times_us in enumerate(rows["times_us"]):
        assert len(times_us) == frames
        assert abs(times_us[0] - start_us - 1e6 * every_s * number) <= 1
        assert times_us[-1] - times_us[0] == last_us
        assert times_us[-1] <= end_us + 2 * TICK_US
    assert start_us + 1e6 * every_s * rows.height + last_us > end_us - TICK_US, "another one would fit"
    inside = (pl.col("crop_x") + pl.col("crop_w") <= size[0]) & (pl.col("crop_y") + pl.col("crop_h") <= size[1])
    square = (pl.col("crop_w") == min(size)) & (pl.col("crop_h") == min(size))
    assert rows.select((inside & square & ~pl.col("flip")).all()).item()


def test_one_clip_is_the_middle_and_a_stride_is_of_the_source() -> None:
    ((times_us,),) = Windows.of(TRAINED, frames=2, stride=8).rows("film.mp4", film(5)).select("times_us").iter_rows()
    assert times_us == [1_937_500, 2_937_500]


def test_too_short_says_how_long_and_what_was_asked() -> None:
    with pytest.raises(
        MediaError, match=r"film.mp4: 0.50 s are shorter than a clip of 4 frames, every 3 source frames"
    ):
        Windows.of(TRAINED, stride=3).rows("film.mp4", film(0.5))
