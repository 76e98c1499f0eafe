"""What is to be encoded: the encoding spec of a project, and the rows of a batch that its store lacks.

Holds decisions from tables and commits; decodes nothing, loads no weights and imports no torch, so that `nextvid plan`
answers at once. Rows wanted are the clips table's rows that are ok and have a use; nothing is ever deleted here.

Which rows lack pixels: the pixel spec of a project, and the clips of a batch that its pixel store does not hold.

The counterpart of plan.py for pixels, under the same rules: rows wanted are those of the clips table that are ok and
have a use, and what was committed stays. Decodes nothing and imports no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import polars as pl

from nextvid.config.accepted import accepted
from nextvid.config.project import Project
from nextvid.encode.weights import autoencoder_digest, facts
from storage.errors import ConfigError, RefusedError
from storage.latents import EncodingSpec, LatentStore
from storage.pixels import PixelSpec, PixelStore
from storage.schemas import Clips
from storage.tables import read_table


@dataclass(frozen=True)
class EncodePlan:
    """One batch under one spec. `rows` are clips to encode with the column `why`, in the order of their slots."""

    batch: str
    spec: EncodingSpec
    rows: pl.DataFrame
    kept: int  # wanted rows that are committed
    orphaned: tuple[bytes, ...]  # committed rows that no clip wants: reported, never deleted

    @property
    def by_frames(self) -> Mapping[int, pl.DataFrame]:
        """Rows to encode by stored frames, ascending."""
        lengths = self.rows["frames"].unique().sort().to_list()
        return {frames: self.rows.filter(pl.col("frames") == frames) for frames in lengths}

    @property
    def reasons(self) -> Mapping[str, int]:
        """How many rows are to be encoded for each reason."""
        counts = self.rows.group_by("why").len().sort("why")
        return dict(zip(counts["why"].to_list(), counts["len"].to_list(), strict=True))


def encoding_spec(project: Project) -> EncodingSpec:
    """The spec that corpus.yaml asks for. Raises ConfigError where the autoencoder does not fit it."""
    encoding = project.corpus.encoding
    about = facts(encoding.autoencoder)
    if encoding.resolution % about.stride:
        raise ConfigError(
            f"encoding.resolution {encoding.resolution} is no multiple of {about.stride}, the pixels of a latent cell"
        )
    if about.side not in (None, encoding.resolution):
        raise ConfigError(f"encoding.resolution {encoding.resolution}: {encoding.autoencoder} takes {about.side} only")
    if encoding.posterior == "sample" and not about.posterior:
        raise ConfigError(f"{encoding.autoencoder} has no posterior to sample: set encoding.posterior to 'mean'")
    side = encoding.resolution // about.stride
    return EncodingSpec(
        autoencoder=autoencoder_digest(encoding.autoencoder),
        resolution=encoding.resolution,
        resize="bicubic",  # nextvid/encode/decode_task.py
        precision=encoding.precision,
        posterior=encoding.posterior,
        storage=encoding.storage,
        channels=about.channels,
        height=side,
        width=side,
        time_map=about.time_map,
    )


def spec_in_force(project: Project) -> EncodingSpec:
    """The accepted spec where there is one, else that of corpus.yaml (design 4: `reencode: ask` goes on with the old).

    Raises RefusedError where the accepted spec names an autoencoder that corpus.yaml no longer points at.
    """
    asked = encoding_spec(project)
    stands = accepted(project)
    if stands is None or stands.encoding == asked.digest():
        return asked
    spec = LatentStore.open(project.root, stands.encoding).spec
    if spec.autoencoder != asked.autoencoder:
        raise RefusedError(
            f"the encoding in force ({stands.encoding}) was made with autoencoder {spec.autoencoder}, but "
            f"{project.corpus.encoding.autoencoder} holds {asked.autoencoder}: put the old weights back, or accept the "
            "new ones with 'nextvid plan --accept'"
        )
    return spec


def plan_encode(project: Project, batch: str, spec: EncodingSpec | None = None) -> EncodePlan:
    """Rows of a batch that a store lacks, that of the spec in force unless told, and why.

    Raises UpstreamError without clips.
    """
    spec = spec or spec_in_force(project)
    clips = wanted_clips(project, batch)
    store = LatentStore(project.root, spec)
    commits = store.commits(batch)
    done = commits.filter(pl.col("status") == "ok")
    missing = clips.join(done, on="row_id", how="anti")
    known_media = clips.join(done, on="row_id", how="semi")["media_id"].unique()
    why = (
        pl.when(pl.col("row_id").is_in(commits["row_id"].implode()))
        .then(pl.lit("failed before"))
        .when(pl.col("media_id").is_in(known_media.implode()))
        .then(pl.lit("new view"))
        .otherwise(pl.lit("new file" if done.height else "new encoding"))
    )
    # rows of a file stand side by side, so that one pass over the file serves one shard, rarely two
    ordered = missing.with_columns(why=why).sort("uri", "media_id", "times_us", "view_index", "row_id")
    orphaned = done.join(clips, on="row_id", how="anti")["row_id"].to_list()
    return EncodePlan(batch, spec, ordered, clips.height - missing.height, tuple(orphaned))


def wanted_clips(project: Project, batch: str) -> pl.DataFrame:
    """Rows of the clips table that the store should hold."""
    clips = read_table(project.root.table("clips", batch), Clips)
    return clips.filter((pl.col("status") == "ok") & (pl.col("uses").list.len() > 0))


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
