"""Every table of the project as a schema with rules (dataframely: rules are polars expressions).

One schema a noun; the noun is the asset, the folder and the heading. Times are integer microseconds, ids 16 bytes,
sizes pixels of the upright source. A row is never dropped for being bad: its `status` and `reason` tell what it is.

A column is described where its name first occurs, and means the same in every later table; the UI shows these
descriptions.
"""

import dataframely as dy
import polars as pl

from storage.digest import ID_BYTES

STATUSES = ["ok", "rejected", "quarantined"]
KINDS = ["video", "image"]
SPLITS = ["train", "val", "test"]
CUTS = ["edge", "hard", "dissolve", "fade"]
DECODERS = ["decord", "pyav", "pillow"]


def _id(*, nullable: bool = False, primary_key: bool = False, description: str | None = None) -> dy.Binary:
    return dy.Binary(
        nullable=nullable,
        primary_key=primary_key,
        check=lambda c: c.is_null() | (c.bin.size() == ID_BYTES),
        description=description,
    )


class _Judged(dy.Schema):
    """The three columns that every judged row carries."""

    status = dy.Enum(
        STATUSES, description="ok, rejected (understood, not wanted) or quarantined (unreadable; retried every night)"
    )
    reason = dy.String(nullable=True, description="Why not ok, in one word")
    error = dy.String(nullable=True, description="Message of the reader")

    @dy.rule()
    def reason_where_not_ok(cls) -> pl.Expr:  # noqa: N805 - dataframely passes the class
        return (pl.col("status") == "ok") | pl.col("reason").is_not_null()


class Sources(dy.Schema):
    """Files as listings showed them; append-only. A changed file is one more `revision`."""

    uri = dy.String(primary_key=True, description="The file, as its dataset's listing names it")
    revision = dy.Int32(
        primary_key=True, min=0, description="How often the bytes under this name have changed; 0 at first"
    )
    dataset = dy.String(description="Entry of corpus.yaml")
    batch = dy.String(description="Partition, by dataset and number; it never changes")
    path = dy.String(description="Relative to the dataset's URI, as label files name it")
    kind = dy.Enum(KINDS, description="video or image")
    size_bytes = dy.Int64(min=0, description="Size of the file")
    fingerprint = dy.String(description="Modification time or etag, as the listing gave it")
    found_at = dy.Datetime(time_zone="UTC", description="When a listing saw this revision first")
    gone_at = dy.Datetime(
        nullable=True, time_zone="UTC", description="When a listing missed it; null while it is there"
    )


class Media(_Judged):
    """One row per source revision: what one demux says of the file."""

    uri = dy.String(primary_key=True)
    revision = dy.Int32(primary_key=True, min=0)
    dataset = dy.String()
    batch = dy.String()
    path = dy.String()
    media_id = _id(nullable=True, description="blake2b-128 of the file's bytes; null where they could not be read")
    kind = dy.Enum(KINDS)
    size_bytes = dy.Int64(min=0)
    container = dy.String(nullable=True, description="Container format, as the demuxer names it")
    codec = dy.String(nullable=True, description="Video or image codec")
    pix_fmt = dy.String(nullable=True, description="Pixel format of the first stream")
    width = dy.Int32(nullable=True, min=1, description="Pixels across as shown: upright and square")
    height = dy.Int32(nullable=True, min=1, description="Pixels down as shown: upright and square")
    rotation = dy.Int32(nullable=True, description="Degrees by which the file asks to be turned")
    mirrored = dy.Bool(nullable=True, description="Whether left and right are exchanged after turning")
    sample_aspect = dy.Float64(nullable=True, description="Width of a stored pixel over its height; 1 if square")
    fps_hz = dy.Float64(nullable=True, description="Frames a second, pauses left out")
    frames = dy.Int64(nullable=True, description="Frames of the file; in clips and after, stored frames: 1 for images")
    duration_us = dy.Int64(nullable=True, min=0, description="Microseconds from first to last frame")
    start_us = dy.Int64(nullable=True, description="Microseconds: first frame of the file, or begin of the span")
    hazards = dy.List(
        dy.String(), description="What makes a decoder return wrong frames: open GOP, variable rate, rotation, ..."
    )
    decoder = dy.Enum(DECODERS, nullable=True, description="Which decoder reads this file right")
    licence = dy.String(description="As its label file says, else corpus.yaml")

    @dy.rule()
    def ok_has_identity(cls) -> pl.Expr:  # noqa: N805
        return (pl.col("status") != "ok") | (pl.col("media_id").is_not_null() & pl.col("decoder").is_not_null())


class Labels(dy.Schema):
    """Labels of media files, long: a null span means the whole file. `split` and `group` are reserved targets."""

    media_id = _id()
    start_us = dy.Int64(nullable=True)
    end_us = dy.Int64(nullable=True, description="Microseconds: end of the span")
    target = dy.String(description="What is labelled")
    value = dy.String(description="The label")


class Shots(_Judged):
    """Cut-free runs with scores, not decisions. A file that failed the first pass is one row without a shot id."""

    media_id = _id(primary_key=True)
    shot_index = dy.Int32(primary_key=True, min=0, description="Number of the shot within its file")
    shot_id = _id(nullable=True, description="Id of (media, start, end)")
    dataset = dy.String()
    batch = dy.String()
    uri = dy.String()
    kind = dy.Enum(KINDS)
    start_us = dy.Int64()
    end_us = dy.Int64()
    cut_in = dy.Enum(CUTS, description="How the shot begins: edge, hard, dissolve or fade")
    cut_out = dy.Enum(CUTS, description="How the shot ends: edge, hard, dissolve or fade")
    score = dy.Float32(nullable=True, description="Of the cut that begins the shot")
    crop_x = dy.Int32(nullable=True, min=0, description="Left edge of the box, upright source pixels")
    crop_y = dy.Int32(nullable=True, min=0, description="Top edge of the box, upright source pixels")
    crop_w = dy.Int32(nullable=True, min=1, description="Width of the box, upright source pixels")
    crop_h = dy.Int32(nullable=True, min=1, description="Height of the box, upright source pixels")
    motion_mean = dy.Float32(nullable=True, description="Mean motion, % of the diagonal in 0.25 s")
    motion_p90 = dy.Float32(nullable=True, description="90th percentile of motion, % of the diagonal in 0.25 s")
    freeze_share = dy.Float32(nullable=True, description="Share of frames that repeat the one before")
    luma_mean = dy.Float32(nullable=True, description="Mean luma, 0 to 255")
    luma_std = dy.Float32(nullable=True, description="Deviation of luma")
    blur = dy.Float32(nullable=True, description="Variance of the Laplacian: low is blurred")
    black_share = dy.Float32(nullable=True, description="Share of black frames")
    hashes = dy.List(dy.Binary(), description="Perceptual hashes (PDQ), 32 bytes each")
    hash_quality = dy.List(dy.Int32(), description="PDQ's quality of each; flat frames are below 50 and join no group")
    hash_times_us = dy.List(dy.Int64(), description="Microseconds of the frame of each hash")

    @dy.rule()
    def interval(cls) -> pl.Expr:  # noqa: N805
        return (pl.col("kind") == "image") | (pl.col("status") != "ok") | (pl.col("end_us") > pl.col("start_us"))


class Pictures(dy.Schema):
    """Small JPEG pictures of a few shots of a batch: those that thresholds may reject."""

    shot_id = _id(primary_key=True)
    jpeg = dy.Binary()


class Clips(_Judged):
    """The curated clip manifest: one row a view. A shot that gives no clip is one row without ids, with its reason."""

    row_id = _id(nullable=True, description="Id of the view: the row of the store")
    clip_id = _id(nullable=True, description="Id of (media, every requested time)")
    shot_id = _id()
    media_id = _id()
    dataset = dy.String()
    batch = dy.String()
    uri = dy.String()
    kind = dy.Enum(KINDS)
    decoder = dy.Enum(DECODERS)
    frames = dy.Int32(min=0)
    times_us = dy.List(dy.Int64(), description="Microseconds of each stored frame")
    view_index = dy.Int32(min=0, description="Number of the view of this clip")
    crop_x = dy.Int32(min=0)
    crop_y = dy.Int32(min=0)
    crop_w = dy.Int32(min=1)
    crop_h = dy.Int32(min=1)
    flip = dy.Bool(description="Whether the view is mirrored")
    uses = dy.List(dy.String(), description="pretrain, and the benchmarks that probe on it")
    split = dy.Enum(SPLITS, description="train, val or test, decided once")
    group = dy.String(
        nullable=True, description="What must stay on one side of a split; in duplicates, the group of near-duplicates"
    )

    @dy.rule()
    def ok_is_complete(cls) -> pl.Expr:  # noqa: N805
        complete = pl.col("row_id").is_not_null() & (pl.col("times_us").list.len() == pl.col("frames").cast(pl.UInt32))
        return (pl.col("status") != "ok") | complete


class Plan(dy.Schema):
    """One planned part: which row has which slot. Fixes the array's shape."""

    row_id = _id(primary_key=True)
    slot = dy.UInt32(description="Place in the part; the shard is slot // rows per shard")


class Commits(dy.Schema):
    """What a shard's commit says of each slot. `status` other than ok is an empty slot with its reason.

    A reason is a word; behind `unstable:` follow the URI of a file that was decoded twice, and what differed.
    """

    row_id = _id(primary_key=True)
    slot = dy.UInt32()
    status = dy.Enum(STATUSES)
    reason = dy.String(nullable=True)
    crc32c = dy.UInt32(nullable=True, description="Checksum of the row's stored bytes")
    sums = dy.List(dy.Float64(), description="Sum of the row's values by channel, over frames and cells")
    sums_squared = dy.List(dy.Float64(), description="Sum of their squares by channel")
    posterior_std = dy.Float32(nullable=True, description="Mean width of the autoencoder's posterior")
    psnr_db = dy.Float32(
        nullable=True,
        allow_nan=True,
        description="Of the round trip, where the row was sampled; NaN where nothing decodes the target (SigLIP)",
    )
    decode_s = dy.Float32(description="Seconds of the decoding process")
    encode_s = dy.Float32(description="Seconds of the device")


class PixelCommits(dy.Schema):
    """What a shard's commit says of each slot of a pixel store. Rows differ in size, so it says where each is."""

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
    benchmarks = dy.List(dy.String(), description="Benchmarks whose test or train clips come from this shot")
    pretrain = dy.Bool(description="Whether pretraining has clips of it")
    dropped_from = dy.List(
        dy.String(), description="Uses that leave this shot out because of its group: pretrain, probe_train"
    )
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
