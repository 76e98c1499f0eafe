"""Every table of the project as a schema with rules (dataframely: rules are polars expressions).

One schema a noun; the noun is the asset, the folder and the heading. Times are integer microseconds, ids 16 bytes,
sizes pixels of the upright source. A row is never dropped for being bad: `status` says ok, rejected (understood, not
wanted) or quarantined (could not be read; retried by the nightly schedule), and `reason` says why in one word (design,
sections 4 and 6).
"""

import dataframely as dy
import polars as pl

STATUSES = ["ok", "rejected", "quarantined"]
KINDS = ["video", "image"]
SPLITS = ["train", "val", "test"]
CUTS = ["edge", "hard", "dissolve", "fade"]
DECODERS = ["decord", "pyav", "pillow"]

ID_BYTES = 16


def _id(*, nullable: bool = False, primary_key: bool = False) -> dy.Binary:
    return dy.Binary(
        nullable=nullable, primary_key=primary_key, check=lambda c: c.is_null() | (c.bin.size() == ID_BYTES)
    )


class _Judged(dy.Schema):
    """The three columns that every judged row carries."""

    status = dy.Enum(STATUSES)
    reason = dy.String(nullable=True)
    error = dy.String(nullable=True)

    @dy.rule()
    def reason_where_not_ok(cls) -> pl.Expr:  # noqa: N805 - dataframely passes the class
        return (pl.col("status") == "ok") | pl.col("reason").is_not_null()


class Sources(dy.Schema):
    """Files as listings showed them; append-only. A changed file is one more `revision`."""

    uri = dy.String(primary_key=True)
    revision = dy.Int32(primary_key=True, min=0)
    dataset = dy.String()
    batch = dy.String()
    path = dy.String()  # relative to the dataset's URI: what label files name
    kind = dy.Enum(KINDS)
    size_bytes = dy.Int64(min=0)
    fingerprint = dy.String()  # modification time or etag, as text
    found_at = dy.Datetime(time_zone="UTC")
    gone_at = dy.Datetime(nullable=True, time_zone="UTC")


class Media(_Judged):
    """One row per source revision: what one demux says of the file."""

    uri = dy.String(primary_key=True)
    revision = dy.Int32(primary_key=True, min=0)
    dataset = dy.String()
    batch = dy.String()
    path = dy.String()
    media_id = _id(nullable=True)  # null where not even the bytes could be read
    kind = dy.Enum(KINDS)
    size_bytes = dy.Int64(min=0)
    container = dy.String(nullable=True)
    codec = dy.String(nullable=True)
    pix_fmt = dy.String(nullable=True)
    width = dy.Int32(nullable=True, min=1)
    height = dy.Int32(nullable=True, min=1)
    rotation = dy.Int32(nullable=True)
    fps_hz = dy.Float64(nullable=True)
    frames = dy.Int64(nullable=True)
    duration_us = dy.Int64(nullable=True, min=0)
    start_us = dy.Int64(nullable=True)
    hazards = dy.List(dy.String())
    decoder = dy.Enum(DECODERS, nullable=True)
    licence = dy.String()

    @dy.rule()
    def ok_has_identity(cls) -> pl.Expr:  # noqa: N805
        return (pl.col("status") != "ok") | (pl.col("media_id").is_not_null() & pl.col("decoder").is_not_null())


class Labels(dy.Schema):
    """What is known of a media, long: a null span means the whole file. `split` and `group` are reserved targets."""

    media_id = _id()
    start_us = dy.Int64(nullable=True)
    end_us = dy.Int64(nullable=True)
    target = dy.String()
    value = dy.String()


class Shots(_Judged):
    """Cut-free runs with scores, not decisions. A media that failed the first pass is one row without a shot id."""

    media_id = _id(primary_key=True)
    shot_index = dy.Int32(primary_key=True, min=0)
    shot_id = _id(nullable=True)
    dataset = dy.String()
    batch = dy.String()
    uri = dy.String()
    kind = dy.Enum(KINDS)
    start_us = dy.Int64()
    end_us = dy.Int64()
    cut_in = dy.Enum(CUTS)
    cut_out = dy.Enum(CUTS)
    score = dy.Float32(nullable=True)  # of the cut that begins the shot
    crop_x = dy.Int32(nullable=True, min=0)
    crop_y = dy.Int32(nullable=True, min=0)
    crop_w = dy.Int32(nullable=True, min=1)
    crop_h = dy.Int32(nullable=True, min=1)
    motion_mean = dy.Float32(nullable=True)  # % of the diagonal per 0.25 s
    motion_p90 = dy.Float32(nullable=True)
    freeze_share = dy.Float32(nullable=True)
    luma_mean = dy.Float32(nullable=True)
    luma_std = dy.Float32(nullable=True)
    blur = dy.Float32(nullable=True)  # variance of the Laplacian
    black_share = dy.Float32(nullable=True)
    hashes = dy.List(dy.Binary())  # PDQ, 32 bytes each
    hash_quality = dy.List(dy.Int32())
    hash_times_us = dy.List(dy.Int64())

    @dy.rule()
    def interval(cls) -> pl.Expr:  # noqa: N805
        return (pl.col("kind") == "image") | (pl.col("status") != "ok") | (pl.col("end_us") > pl.col("start_us"))


class Pictures(dy.Schema):
    """Small JPEG pictures of a few shots of a batch: those that thresholds may reject."""

    shot_id = _id(primary_key=True)
    jpeg = dy.Binary()


class Clips(_Judged):
    """The curated clip manifest: one row a view. A shot that gives no clip is one row without ids, with its reason."""

    row_id = _id(nullable=True)  # of the view: the row of the store
    clip_id = _id(nullable=True)
    shot_id = _id()
    media_id = _id()
    dataset = dy.String()
    batch = dy.String()
    uri = dy.String()
    kind = dy.Enum(KINDS)
    decoder = dy.Enum(DECODERS)
    frames = dy.Int32(min=0)  # stored frames: 1 for images
    times_us = dy.List(dy.Int64())
    view_index = dy.Int32(min=0)
    crop_x = dy.Int32(min=0)
    crop_y = dy.Int32(min=0)
    crop_w = dy.Int32(min=1)
    crop_h = dy.Int32(min=1)
    flip = dy.Bool()
    uses = dy.List(dy.String())  # `pretrain` and names of benchmarks
    split = dy.Enum(SPLITS)
    group = dy.String(nullable=True)

    @dy.rule()
    def ok_is_complete(cls) -> pl.Expr:  # noqa: N805
        complete = pl.col("row_id").is_not_null() & (pl.col("times_us").list.len() == pl.col("frames").cast(pl.UInt32))
        return (pl.col("status") != "ok") | complete


class Plan(dy.Schema):
    """One planned part: which row stands in which slot. Fixes the array's shape."""

    row_id = _id(primary_key=True)
    slot = dy.UInt32()  # global slot in the part; shard = slot // rows per shard


class Commits(dy.Schema):
    """What a shard's commit says of each slot. `status` other than ok is an empty slot with its reason."""

    row_id = _id(primary_key=True)
    slot = dy.UInt32()
    status = dy.Enum(STATUSES)
    reason = dy.String(nullable=True)
    crc32c = dy.UInt32(nullable=True)
    sums = dy.List(dy.Float64())  # per channel, over frames and cells
    sums_squared = dy.List(dy.Float64())
    posterior_std = dy.Float32(nullable=True)  # mean posterior width, where the autoencoder has one
    # Of the round trip, where this row was sampled for it; NaN where nothing decodes the target (SigLIP features).
    psnr_db = dy.Float32(nullable=True, allow_nan=True)
    decode_s = dy.Float32()
    encode_s = dy.Float32()


class PixelCommits(dy.Schema):
    """What a shard's commit says of each slot of a pixel store. Rows differ in size, so it says where each stands."""

    row_id = _id(primary_key=True)
    slot = dy.UInt32()
    status = dy.Enum(STATUSES)
    reason = dy.String(nullable=True)
    offset = dy.UInt64(nullable=True)  # bytes from the start of the shard's file
    size_bytes = dy.UInt32(nullable=True)
    crc32c = dy.UInt32(nullable=True)
    psnr_db = dy.Float32(nullable=True)  # of the JPEGs against the frames, where this row was sampled for it
    encode_s = dy.Float32()

    @dy.rule()
    def ok_has_a_place(cls) -> pl.Expr:  # noqa: N805
        place = pl.col("offset").is_not_null() & pl.col("size_bytes").is_not_null() & pl.col("crc32c").is_not_null()
        return (pl.col("status") != "ok") | place


class Duplicates(dy.Schema):
    """One row a shot and batch that shares its group with another."""

    shot_id = _id(primary_key=True)
    media_id = _id()
    dataset = dy.String()
    batch = dy.String(primary_key=True)  # a copy in another batch has the same shot id
    group = dy.Int64()
    split = dy.Enum(SPLITS)
    benchmarks = dy.List(dy.String())  # whose test or train clips come from this shot
    pretrain = dy.Bool()
    dropped_from = dy.List(dy.String())  # `pretrain`, `probe_train`: what this shot is left out of, and
    reason = dy.String(nullable=True)  # why


class Lineage(dy.Schema):
    """One row a trainset row: back to the file."""

    row_id = _id(primary_key=True)
    clip_id = _id()
    shot_id = _id()
    media_id = _id()
    dataset = dy.String(primary_key=True)  # a copy of one file in two datasets has one row id
    batch = dy.String()
    uri = dy.String()
    frames = dy.Int32()


class ProbeRows(dy.Schema):
    """What a score keeps of its rows, beside score.json: who was asked, and with which answer."""

    sample_number = dy.Int64(primary_key=True, alias="sample")  # `sample` is a method of every schema
    segment = dy.Int64(primary_key=True)
    row_id = dy.Binary()
    clip_id = dy.Binary()
    shot_id = dy.Binary()
    media_id = dy.Binary()
    dataset = dy.String()
    batch = dy.String()
    uri = dy.String()
    split = dy.Enum(SPLITS)
    held_out = dy.Bool()
    label = dy.Int64(min=0)
