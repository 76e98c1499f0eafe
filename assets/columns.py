"""What the columns of the tables mean, one line each, as the UI shows them.

One word means the same in every table (storage/schemas.py), so a name has one meaning. Where a column means more in one
table than in another, the schema says so at the column.
"""

from typing import Any

import dagster as dg
import dataframely as dy

MEANINGS = {
    "uri": "The file, as its dataset's listing names it",
    "revision": "How often the bytes under this name have changed; 0 at first",
    "dataset": "Entry of corpus.yaml",
    "batch": "Partition, by dataset and number, for ever",
    "path": "Relative to the dataset's URI: what label files name",
    "kind": "video or image",
    "size_bytes": "Size of the file",
    "fingerprint": "Modification time or etag, as the listing gave it",
    "found_at": "When a listing saw this revision first",
    "gone_at": "When a listing missed it; null while it is there",
    "status": "ok, rejected (understood, not wanted) or quarantined (could not be read; retried every night)",
    "reason": "Why not ok, in one word",
    "error": "What the reader said",
    "media_id": "blake2b-128 of the file's bytes",
    "container": "Container format, as the demuxer names it",
    "codec": "Video or image codec",
    "pix_fmt": "Pixel format of the first stream",
    "width": "Pixels across, upright",
    "height": "Pixels down, upright",
    "rotation": "Degrees by which the file asks to be turned",
    "fps_hz": "Mean frames a second",
    "frames": "Frames of the file; of a clip, those that are stored: 1 for images",
    "duration_us": "Microseconds from first to last frame",
    "start_us": "Microseconds; of the file's first frame, or where the span begins",
    "end_us": "Microseconds at which the span ends",
    "hazards": "What makes a decoder return wrong frames: open GOP, variable rate, rotation, ...",
    "decoder": "Which decoder reads this file right",
    "licence": "As corpus.yaml says",
    "target": "What is labelled",
    "value": "The label",
    "shot_index": "Number of the shot within its file",
    "shot_id": "Id of (media, start, end)",
    "cut_in": "How the shot begins: edge, hard, dissolve or fade",
    "cut_out": "How it ends",
    "score": "Of the cut that begins the shot",
    "crop_x": "Left edge of the box, upright source pixels",
    "crop_y": "Top edge of the box, upright source pixels",
    "crop_w": "Width of the box, upright source pixels",
    "crop_h": "Height of the box, upright source pixels",
    "motion_mean": "Mean motion, % of the diagonal in 0.25 s",
    "motion_p90": "Its 90th percentile",
    "freeze_share": "Share of frames that repeat the one before",
    "luma_mean": "Mean luma, 0 to 255",
    "luma_std": "Deviation of luma",
    "blur": "Variance of the Laplacian: low is blurred",
    "black_share": "Share of black frames",
    "hashes": "Perceptual hashes (PDQ), 32 bytes each",
    "hash_quality": "PDQ's quality of each; flat frames are below 50 and join nothing",
    "hash_times_us": "Microseconds at which each was taken",
    "row_id": "Id of the view: the row of the store",
    "clip_id": "Id of (media, every requested time)",
    "times_us": "Microseconds of each stored frame",
    "view_index": "Number of the look at this clip",
    "flip": "Whether the view is mirrored",
    "uses": "pretrain, and the benchmarks that probe on it",
    "split": "train, val or test, decided once",
    "group": "What must stay on one side of a split; among duplicates, the group of look-alikes",
    "slot": "Place in the part; the shard is slot // 256",
    "crc32c": "Checksum of the row's stored bytes",
    "sums": "Sum of the row's values by channel",
    "sums_squared": "Sum of their squares by channel",
    "posterior_std": "Mean width of the autoencoder's posterior",
    "psnr_db": "Round trip of this row, where it was sampled for it",
    "decode_s": "Seconds of a decode process",
    "encode_s": "Seconds of the device",
    "benchmarks": "Whose test or train clips come from this shot",
    "pretrain": "Whether pretraining has clips of it",
    "dropped_from": "What gives way because of this group: pretrain, probe_train",
}


def columns(schema: type[dy.Schema]) -> dict[str, Any]:
    """The column schema of a table, as the UI's Columns tab shows it."""
    described = [
        dg.TableColumn(
            name=name,
            type=str(column.dtype),
            description=MEANINGS[name],
            constraints=dg.TableColumnConstraints(nullable=column.nullable, unique=False),
        )
        for name, column in schema.columns().items()
    ]
    return {"dagster/column_schema": dg.TableSchema(columns=described)}
