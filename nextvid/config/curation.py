"""The block `curation` of corpus.yaml: the first pass over a video, filters on its scores, near-duplicate search."""

from typing import Annotated

from pydantic import Field

from nextvid.config.strict import AtLeastZero, Count, Positive, Strict

Threshold = Annotated[float, Field(allow_inf_nan=False)] | None


class ShotConfig(Strict):
    """The first pass: what changes here decodes again."""

    thumb_width: Count = 80  # research video 8: detectors fed 80x45 thumbnails
    thumb_height: Count = 45
    # Cuts and dissolves: tuned on one half of the real media (docs/decisions/0018)
    cut_change: Positive = 16.0  # grey levels, the changes of Y, Cb and Cr added up
    cut_ratio: Positive = 2.6  # of the steps beside it
    min_shot_s: AtLeastZero = 0.25
    dissolve_lag_s: Positive = 0.32  # a lag in seconds, not frames (research video 8)
    dissolve_change: Positive = 20.0  # grey levels over two lags (research video 8)
    dissolve_residual: Positive = 0.6  # share of the change
    dissolve_dip: AtLeastZero = 0.3  # by how much the dip of the variance exceeds the residual
    fade_luma: AtLeastZero = 12.0  # ThresholdDetector(12)
    sample_hz: Positive = 4.0  # motion and freeze are measured at this rate
    hash_hz: Positive = 1.0  # PDQ at 1 fps


class FilterConfig(Strict):
    """Thresholds on scores: what changes here decodes nothing again. None switches a test off."""

    trim_s: AtLeastZero = 0.25  # design 6: at cuts, not at file ends
    motion_min: Threshold = 0.1  # % of the diagonal per 0.25 s (research video 8)
    motion_max: Threshold = 6.0
    freeze_max: Threshold = 0.5
    luma_min: Threshold = 16.0
    luma_max: Threshold = 235.0
    blur_min: Threshold = 8.0


class DuplicateConfig(Strict):
    """Near-duplicate search over PDQ hashes."""

    distance: int = Field(
        default=31, ge=0, le=31
    )  # bits of 256, what the search finds without fail; no unrelated pair below 102 (research video 8)
    quality_min: int = Field(default=50, ge=0, le=100)  # design 4: flatter frames join nothing


class CurationConfig(Strict):
    """First pass, filters, duplicates."""

    shots: ShotConfig = ShotConfig()
    filters: FilterConfig = FilterConfig()
    duplicates: DuplicateConfig = DuplicateConfig()
