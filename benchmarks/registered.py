"""A corpus of any number of batches that are done, without a picture in it: files of no bytes, and what makers leave.

Tables, verdicts and commits, for what must be known of many batches: a sensor's tick, the gate, Dagster itself.

Each file is one image of one shot, one clip and one row. Listings and batches are the real ones (update_sources); the
latents are random numbers in the demo's encoding, written by the store.
"""

from pathlib import Path

import numpy as np
import polars as pl

from nextvid.config.project import Project, open_project
from nextvid.corpus.sources import batch_fingerprint, update_sources
from nextvid.encode.plan import accepted_spec
from nextvid.graph import GRAPH
from nextvid.making.batches import VERSIONED
from nextvid.planning.acceptance import ensure_accepted
from storage.digest import digest
from storage.schemas import Clips, Commits, Media, Shots, Sources
from storage.spec import EncodingSpec
from storage.store import LatentStore
from storage.tables import publish_checks, read_table, write_table

SIDE = 64  # pixels; the demo's
CORPUS = """
root: {root}
encoding: {{autoencoder: {autoencoder}, resolution: 64}}
datasets:
  pictures: {{uri: {root}/pictures, weight: 1.0, clips: [{{frames: 1, crop: whole}}], max_batch_images: {files}}}
"""


def register(folder: Path, batches: int, files: int) -> Project:
    """Write a project of `batches` batches of `files` files each, made up to their latents."""
    project = write_unlisted(folder, batches, files)
    update_sources(project)
    ensure_accepted(project)
    for batch in project.root.batches():
        make_batch(project, batch)
    return project


def write_unlisted(folder: Path, batches: int, files: int) -> Project:
    """Write a project of files for so many batches, not listed yet."""
    pictures = folder / "pictures"
    pictures.mkdir(parents=True)
    for number in range(batches * files):
        (pictures / f"{number:08d}.png").touch()
    autoencoder = Path(__file__).resolve().parents[1] / "examples" / "demo" / "autoencoder"
    (folder / "corpus.yaml").write_text(CORPUS.format(root=folder, autoencoder=autoencoder, files=files))
    return open_project(folder / "corpus.yaml")


def make_batch(project: Project, batch: str) -> None:
    """The tables, verdicts and shard of one batch, as its listing is now; rows that are stored already stay."""
    root, spec = project.root, accepted_spec(project)
    sources = read_table(root.table("sources", batch), Sources).filter(pl.col("gone_at").is_null())
    ids = {noun: [_id(noun, *row) for row in _keys(sources)] for noun in ("media", "shot", "clip", "row")}
    media = sources.select("uri", "revision", "dataset", "batch", "path", "kind", "size_bytes").with_columns(
        pl.Series("media_id", ids["media"]),
        *(pl.lit(value).alias(name) for name, value in _MEDIA.items()),
        hazards=pl.lit([], pl.List(pl.String)),
    )
    write_table(root.table("media", batch), _columns(media, Media), Media)
    shots = sources.select("dataset", "batch", "uri", "kind").with_columns(
        pl.Series("media_id", ids["media"]),
        pl.Series("shot_id", ids["shot"]),
        pl.Series("hashes", [[_id("a", *row) + _id("b", *row)] for row in _keys(sources)]),
        *(pl.lit(value).alias(name) for name, value in _SHOT.items()),
        hash_quality=pl.lit([100]),
        hash_times_us=pl.lit([0]),
    )
    write_table(root.table("shots", batch), _columns(shots, Shots), Shots)
    clips = sources.select("dataset", "batch", "uri", "kind").with_columns(
        *(pl.Series(f"{noun}_id", ids[noun]) for noun in ("media", "shot", "clip", "row")),
        *(pl.lit(value).alias(name) for name, value in _CLIP.items()),
        times_us=pl.lit([0]),
        uses=pl.lit(["pretrain"]),
    )
    write_table(root.table("clips", batch), _columns(clips, Clips), Clips)
    made_from = {"listing": batch_fingerprint(project, batch), "curation": project.corpus.curation_digest("pictures")}
    made_from["media"] = str(GRAPH["media"].version)
    for noun in VERSIONED:
        made_from["version"] = str(GRAPH[noun].version)
        publish_checks(root.checks(noun, batch), noun, [{"name": "written", "passed": True}], made_from)
    _store(LatentStore(root, spec), batch, ids["row"])
    publish_checks(root.latents_checks(spec.digest(), batch), "latents", [{"name": "written", "passed": True}])


def _store(store: LatentStore, batch: str, wanted: list[bytes]) -> None:
    """One more part of random latents for the rows that are not stored yet."""
    done = set(store.commits(batch)["row_id"].to_list())
    rows = [row for row in wanted if row not in done]
    if not rows:
        return
    spec: EncodingSpec = store.spec
    part = store.plan_part(batch, 1, rows)
    rng = np.random.default_rng(int.from_bytes(rows[0][:4], "little"))
    for shard in range(part.shards):
        planned = part.rows_of(shard)
        latents = rng.standard_normal((planned.height, *spec.row_shape(1)), np.float32)
        commits = planned.with_columns(status=pl.lit("ok"), decode_s=pl.lit(0.0), encode_s=pl.lit(0.0))
        part.write_shard(shard, latents, _columns(commits, Commits))


def _columns(frame: pl.DataFrame, schema: type[Media] | type[Shots] | type[Clips] | type[Commits]) -> pl.DataFrame:
    """The frame with every column of the schema; those it has not are null."""
    wanted = schema.create_empty().schema
    missing = [pl.lit(None, dtype).alias(name) for name, dtype in wanted.items() if name not in frame.columns]
    return frame.with_columns(missing).select(wanted.names())


def _keys(sources: pl.DataFrame) -> list[tuple[str, int]]:
    return sources.select("uri", "revision").rows()


def _id(noun: str, uri: str, revision: int) -> bytes:
    return bytes.fromhex(digest([noun, uri, revision]))


_MEDIA = {
    "status": "ok", "container": "png", "codec": "png", "pix_fmt": "rgb24", "width": SIDE, "height": SIDE,
    "frames": 1, "decoder": "pillow", "licence": "none",
}  # fmt: skip
_SHOT = {
    "status": "ok", "shot_index": 0, "start_us": 0, "end_us": 0, "cut_in": "edge", "cut_out": "edge",
    "crop_x": 0, "crop_y": 0, "crop_w": SIDE, "crop_h": SIDE,
}  # fmt: skip
_CLIP = {
    "status": "ok", "decoder": "pillow", "frames": 1, "view_index": 0, "crop_x": 0, "crop_y": 0, "crop_w": SIDE,
    "crop_h": SIDE, "flip": False, "split": "train",
}  # fmt: skip
