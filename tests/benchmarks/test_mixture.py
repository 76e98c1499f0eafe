"""docs/scale.md is what benchmarks/mixture.py makes of its rates; and the arithmetic, on numbers checked by head."""

import json

from benchmarks import mixture
from nextvid.config.datasets import ClipPolicy

TILED = ClipPolicy(frames=16, fps=4, clips_per_shot=4)  # 4 s a clip


def test_the_page_holds_what_the_rates_give() -> None:
    text = mixture.PAGE.read_text()
    made = mixture.tables(json.loads(mixture.RATES.read_text()))
    assert mixture.page(text, made) == text, "run python -m benchmarks.mixture --write"
    assert made in text


def test_clips_of_a_file() -> None:
    assert mixture.clips_of(TILED, mean_s=11.7) == 2
    assert mixture.clips_of(TILED, mean_s=100.0) == 4
    assert mixture.clips_of(TILED, mean_s=3.6) == 1, "fitted"
    assert mixture.clips_of(ClipPolicy(frames=16, fps=4, clips_per_shot=3, starts="random"), mean_s=3.6) == 3


def test_sizes_of_a_data_set_by_head() -> None:
    images = next(each for each in mixture.sizes() if each.name == "imagenet1k")
    assert images.batches == 26  # 1.28 million by 50,000
    assert images.rows == 4 * 1_280_000  # four views each
    assert images.size_bytes == images.rows * 2 * 32 * 16 * 16
    assert images.shards == 26 * 770  # 196,923 rows a batch by 256
    assert mixture.objects(images) == 9 * 26 + 2 * images.shards + 4 * 26


def test_numbers_read_well() -> None:
    assert [mixture.number(x) for x in (0.01234, 12.34, 1234.0, 349_690_000.0)] == [
        "0.0123",
        "12.3",
        "1,230",
        "350,000,000",
    ]
    assert [mixture.duration(x) for x in (7.4, 700.0, 9000.0)] == ["7 s", "12 min", "2.5 h"]
    assert [mixture.duration(24 * 3600.0 * days) for days in (2, 20, 800)] == ["48.0 h", "20 days", "2.2 years"]
