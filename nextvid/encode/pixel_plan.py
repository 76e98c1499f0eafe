"""Which rows lack pixels: the pixel spec of a project, and the clips of a batch that its pixel store does not hold.

The counterpart of plan.py for pixels, under the same rules: rows wanted are those of the clips table that are ok and
have a use, and what was committed stays. Decodes nothing and imports no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import polars as pl

from nextvid.corpus.project import Project
from nextvid.encode.plan import wanted_clips
from storage.latents import EncodingSpec
from storage.pixels import PixelSpec, PixelStore


@dataclass(frozen=True)
class PixelPlan:
    """One batch under one pixel spec. `rows` are clips without pixels, in the order of their slots."""

    batch: str
    spec: PixelSpec
    rows: pl.DataFrame
    commits: pl.DataFrame  # of wanted rows: columns of PixelCommits, batch, frames, part, shard

    @property
    def by_frames(self) -> Mapping[int, pl.DataFrame]:
        """Rows without pixels by stored frames, ascending."""
        lengths = self.rows["frames"].unique().sort().to_list()
        return {frames: self.rows.filter(pl.col("frames") == frames) for frames in lengths}


def pixel_spec(project: Project, encoding: EncodingSpec) -> PixelSpec | None:
    """The spec of pixels beside latents of this encoding: the same frames, as corpus.yaml says; None without them."""
    asked = project.corpus.encoding.pixels
    if asked is None:
        return None
    return PixelSpec(encoding.resolution, encoding.resize, asked.quality, asked.subsampling)


def plan_pixels(project: Project, batch: str, spec: PixelSpec) -> PixelPlan:
    """Rows of a batch that the store of this spec lacks. Raises UpstreamError without clips."""
    clips = wanted_clips(project, batch)
    commits = PixelStore(project.root, spec).commits(batch).join(clips.select("row_id"), on="row_id", how="semi")
    missing = clips.join(commits.filter(pl.col("status") == "ok"), on="row_id", how="anti")
    ordered = missing.sort("uri", "media_id", "times_us", "view_index", "row_id")  # as plan.py: a file in one piece
    return PixelPlan(batch, spec, ordered, commits)
