"""What is to be encoded: the specs of a project, and the rows of a batch that its stores lack.

Reads tables, commits and configuration files; loads no weights and imports no torch, so that `nextvid plan` answers at
once. Wanted are the rows of the clips table that are ok and have a use, as far as a `cap` takes them (cap.py). What was
committed stays: nothing is deleted here.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic

import polars as pl

from nextvid.config.accepted import accepted
from nextvid.config.project import Project
from nextvid.encode.cap import below_bound
from nextvid.encode.weights import autoencoder_digest, facts
from nextvid.graph import GRAPH
from nextvid.making.batches import dataset_of
from storage.errors import ConfigError, ConflictError, DamagedError, RefusedError
from storage.part import Part, S
from storage.root import DataRoot
from storage.schemas import Clips
from storage.spec import EncodingSpec, PixelSpec
from storage.store import LatentStore, Store
from storage.tables import read_table
from storage.withdrawn import is_withdrawn

UNSTABLE = "unstable"  # first word of the reason of a row whose file gave other frames when it was decoded again


@dataclass(frozen=True)
class BatchPlan(Generic[S]):
    """One batch in the store of one spec.

    Both tables of commits have the columns of the store's schema and batch, frames, part, shard.
    """

    batch: str
    spec: S
    rows: pl.DataFrame  # wanted clips that the store lacks, with the column `why`, in the order of their slots
    commits: pl.DataFrame  # of wanted rows
    orphans: pl.DataFrame  # commits of rows that no clip wants any more: reported, never deleted
    over_cap: pl.DataFrame  # clips that are not stored and need not be, since a `cap` takes others

    @property
    def by_frames(self) -> Mapping[int, pl.DataFrame]:
        """Missing rows by stored frames, ascending."""
        lengths = self.rows["frames"].unique().sort().to_list()
        return {frames: self.rows.filter(pl.col("frames") == frames) for frames in lengths}

    @property
    def reasons(self) -> Mapping[str, int]:
        """How many rows are missing for each reason."""
        counts = self.rows.group_by("why").len().sort("why")
        return dict(zip(counts["why"].to_list(), counts["len"].to_list(), strict=True))

    @property
    def good(self) -> pl.DataFrame:
        """Commits of wanted rows that did not fail."""
        return self.commits.filter(pl.col("status") == "ok")

    @property
    def kept(self) -> int:
        """How many wanted rows are stored."""
        return self.good.height

    @property
    def unstable(self) -> pl.DataFrame:
        """Commits of wanted rows whose file gave other frames when it was decoded again; nothing tries them again."""
        return self.commits.filter(is_unstable())

    @property
    def orphaned(self) -> tuple[bytes, ...]:
        """Stored rows that no clip wants."""
        return tuple(self.orphans.filter(pl.col("status") == "ok")["row_id"].to_list())


def encoding_spec(project: Project) -> EncodingSpec:
    """The spec that corpus.yaml asks for. Raises ConfigError where the autoencoder does not fit it."""
    encoding = project.asked.encoding
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
        version=GRAPH["latents"].version,
    )


def accepted_spec(project: Project) -> EncodingSpec:
    """The accepted spec where there is one, else that of corpus.yaml.

    Raises RefusedError where the accepted spec names an autoencoder that corpus.yaml no longer points at.
    """
    asked = encoding_spec(project)
    current = accepted(project.root)
    if current is None or current.encoding == asked.digest():
        return asked
    spec = LatentStore.open(project.root, current.encoding).spec
    if spec.autoencoder != asked.autoencoder:
        raise RefusedError(
            f"the accepted encoding ({current.encoding}) was made with autoencoder {spec.autoencoder}, but "
            f"{project.asked.encoding.autoencoder} holds {asked.autoencoder}: put the old weights back, or accept the "
            "new ones with 'nextvid plan --accept'"
        )
    return spec


def pixel_spec(project: Project, encoding: EncodingSpec) -> PixelSpec | None:
    """The spec of pixels beside latents of this encoding: the same frames, as corpus.yaml says; None without them."""
    asked = project.corpus.encoding.pixels
    return None if asked is None else PixelSpec(encoding.resolution, encoding.resize, asked.quality, asked.subsampling)


def plan_encode(project: Project, batch: str, spec: EncodingSpec | None = None) -> BatchPlan[EncodingSpec]:
    """Rows of a batch without latents in a spec, the accepted one unless told. Raises UpstreamError without clips."""
    return plan_batch(project, batch, LatentStore(project.root, spec or accepted_spec(project)))


def plan_batch(project: Project, batch: str, store: Store[S]) -> BatchPlan[S]:
    """Rows of a batch that a store lacks, and why; not those of unstable files. Raises UpstreamError without clips."""
    usable, every = wanted_clips(project, batch), store.commits(batch)
    good = every.filter(pl.col("status") == "ok")
    within = within_cap(project, batch) | pl.col("row_id").is_in(good["row_id"].implode())  # what is stored stays
    clips, over_cap = usable.filter(within), usable.filter(~within)
    commits = every.join(clips, on="row_id", how="semi")
    missing = clips.join(commits.filter((pl.col("status") == "ok") | is_unstable()), on="row_id", how="anti")
    known_media = clips.join(good, on="row_id", how="semi")["media_id"].unique()
    why = (
        pl.when(pl.col("row_id").is_in(commits["row_id"].implode()))
        .then(pl.lit("failed before"))
        .when(pl.col("media_id").is_in(known_media.implode()))
        .then(pl.lit("new view"))
        .otherwise(pl.lit("new file" if good.height else "new encoding"))
    )
    # rows of a file are neighbours, so that one pass over the file serves one shard, rarely two
    ordered = missing.with_columns(why=why).sort("uri", "media_id", "times_us", "view_index", "row_id")
    return BatchPlan(batch, store.spec, ordered, commits, every.join(usable, on="row_id", how="anti"), over_cap)


def wanted_clips(project: Project, batch: str) -> pl.DataFrame:
    """Rows of the clips table that can be stored, whatever the cap."""
    return usable_clips(project, batch).filter(~is_withdrawn(project.root))


def usable_clips(project: Project, batch: str) -> pl.DataFrame:
    """Rows of the clips table that have a use, those of withdrawn files too."""
    clips = read_table(project.root.table("clips", batch), Clips)
    return clips.filter((pl.col("status") == "ok") & (pl.col("uses").list.len() > 0))


@contextmanager
def committing(root: DataRoot, part: Part[S], number: int, clips: pl.DataFrame) -> Iterator[set[bytes]]:
    """Gives the rows of withdrawn files, which the block may not commit in this shard; `clips` are the batch's.

    A file that is withdrawn while the block commits may be missed by its withdrawal, which looks at committed shards
    once it is recorded: its rows are zeroed here. One of the two sees the other.
    """
    here = part.rows_of(number).join(clips.select("row_id", "media_id"), on="row_id")
    before = set(here.filter(is_withdrawn(root))["row_id"].to_list())
    yield before
    late = here.filter(is_withdrawn(root) & ~pl.col("row_id").is_in(list(before)))
    if late.height:
        part.erase(late["slot"].to_list())


def within_cap(project: Project, batch: str) -> pl.Expr:
    """Of these, the rows that the stores should hold: those that the dataset's cap takes, and all of benchmarks."""
    probed = (pl.col("uses").list.len() > 1) | ~pl.col("uses").list.contains("pretrain")
    return below_bound(project, dataset_of(batch)) | probed


def is_unstable() -> pl.Expr:
    """Whether a row was committed without latents because its file gave other frames when it was decoded again."""
    return (pl.col("status") == "rejected") & pl.col("reason").str.starts_with(UNSTABLE)


def open_parts(project: Project, batch: str, store: Store[S], failed: Collection[bytes] = ()) -> Iterator[Part[S]]:
    """Parts of a batch with shards to write, by clip length: the unfinished ones, then new ones for missing rows.

    Rows in `failed`, and those of a part that this gave before, get no new part: what failed is tried again by the next
    call. The caller writes all shards of a part before it asks for the next. Any number of processes may do so at once,
    and no row is planned twice. Raises DamagedError where a shard can never be committed.
    """
    tried = set(failed)
    for frames in sorted({*plan_batch(project, batch, store).by_frames, *store.frames_of(batch)}):
        while True:
            known = store.parts(batch, frames)  # first: rows of these parts are planned, rows of later ones may be
            part = store.unfinished(batch, frames)
            if part is None:
                missing = plan_batch(project, batch, store).rows.filter(pl.col("frames") == frames)
                ids = [row for row in missing["row_id"].to_list() if row not in tried]
                if not ids:
                    break
                try:
                    part = store.plan_part(batch, frames, ids, known)
                except ConflictError:
                    if store.parts(batch, frames) == known:
                        raise  # something other than a part has its name
                    continue  # another process planned it first: help with theirs
            yield part
            tried |= set(part.plan["row_id"].to_list())
            if left := sorted(set(range(part.shards)) - set(part.committed_shards())):
                raise DamagedError(f"{part.commit_path(left[0])} is not a file: remove it and make 'latents' again")
