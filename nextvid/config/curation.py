"""The block `curation` of corpus.yaml: the first pass over a video, filters on its scores, near-duplicate search."""

from typing import Annotated

from pydantic import Field

from nextvid.config.strict import AtLeastZero, Count, Positive, Strict

Threshold = Annotated[float, Field(allow_inf_nan=False)] | None


class ShotConfig(Strict):
    """The first pass, which finds shots and measures them. A change here decodes every video again."""

    thumb_width: Count = Field(80, description="width in pixels of the thumbnails that shot detection reads")
    thumb_height: Count = Field(45, description="height in pixels of these thumbnails")
    # Cuts and dissolves: tuned on one half of the real media (docs/decisions/0018)
    cut_change: Positive = Field(
        16.0, description="a cut changes Y, Cb and Cr by at least so many grey levels, added up, from frame to frame"
    )
    cut_ratio: Positive = Field(2.6, description="and by so many times the changes beside it")
    min_shot_s: AtLeastZero = Field(0.25, description="cuts within so many seconds of each other count as one")
    dissolve_lag_s: Positive = Field(0.32, description="frames so many seconds apart are compared to find dissolves")
    dissolve_change: Positive = Field(
        20.0, description="a dissolve changes the picture by at least so many grey levels over two lags"
    )
    dissolve_residual: Positive = Field(
        0.6, description="the frame in the middle differs from the mean of both by less than this share of the change"
    )
    dissolve_dip: AtLeastZero = Field(
        0.3, description="the dip of the variance in the middle exceeds that residual by at least this much"
    )
    fade_luma: AtLeastZero = Field(
        12.0, description="a frame with a lower mean luma is black (PySceneDetect's threshold)"
    )
    sample_hz: Positive = Field(4.0, description="motion and freeze are measured so many times a second")
    hash_hz: Positive = Field(1.0, description="PDQ hashes for near-duplicates are taken so many times a second")


class FilterConfig(Strict):
    """Thresholds on a shot's scores. A change here decodes nothing again; `null` switches a test off."""

    trim_s: AtLeastZero = Field(
        0.25, description="seconds left out of a shot beside each cut; at the ends of a file nothing is left out"
    )
    motion_min: Threshold = Field(
        0.1, description="less motion rejects a shot, in % of the picture's diagonal per 0.25 s"
    )
    motion_max: Threshold = Field(6.0, description="more motion rejects a shot, in the same unit")
    freeze_max: Threshold = Field(0.5, description="a larger share of repeated frames rejects a shot")
    luma_min: Threshold = Field(16.0, description="a lower mean luma rejects a shot, of 0 to 255")
    luma_max: Threshold = Field(235.0, description="a higher mean luma rejects a shot, of 0 to 255")
    blur_min: Threshold = Field(8.0, description="a lower sharpness rejects a shot (variance of the Laplacian)")


class DuplicateConfig(Strict):
    """Near-duplicate search over PDQ hashes of 256 bits."""

    distance: int = Field(
        31,
        ge=0,
        le=31,
        description="frames whose hashes differ in at most so many bits are near-duplicates; above 31 the search could "
        "miss pairs, and no unrelated pair differed in fewer than 102",
    )
    quality_min: int = Field(50, ge=0, le=100, description="flatter frames (PDQ quality) are not compared")


class CurationConfig(Strict):
    """How shots are found, filtered and compared."""

    shots: ShotConfig = Field(ShotConfig(), description="the first pass: shot detection and scores")
    filters: FilterConfig = Field(FilterConfig(), description="thresholds on the scores of a shot")
    duplicates: DuplicateConfig = Field(DuplicateConfig(), description="near-duplicate search")
