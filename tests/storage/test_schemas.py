"""storage/schemas.py: each rule refuses the row it is there for, and an honest row passes."""

from datetime import UTC, datetime

import dataframely as dy
import polars as pl
import pytest

from storage import schemas, tables
from storage.errors import TableError

ID = b"0123456789abcdef"
TABLES: dict[type[dy.Schema], dict[str, object]] = {
    schemas.Sources: {
        "uri": "u",
        "revision": 0,
        "dataset": "d",
        "batch": "d.000000",
        "path": "p",
        "kind": "video",
        "size_bytes": 1,
        "fingerprint": "f",
        "found_at": datetime(2026, 1, 1, tzinfo=UTC),
        "gone_at": None,
    },
    schemas.Labels: {"media_id": ID, "start_us": None, "end_us": None, "target": "action", "value": "run"},
    schemas.Plan: {"row_id": ID, "slot": 0},
    schemas.Commits: {
        "row_id": ID,
        "slot": 0,
        "status": "ok",
        "reason": None,
        "crc32c": 1,
        "sums": [1.0],
        "sums_squared": [1.0],
        "posterior_std": None,
        "psnr_db": None,
        "decode_s": 0.1,
        "encode_s": 0.1,
    },
    schemas.Duplicates: {
        "shot_id": ID,
        "media_id": ID,
        "dataset": "d",
        "batch": "d.000000",
        "group": 1,
        "split": "train",
        "benchmarks": [],
        "pretrain": True,
        "dropped_from": [],
        "reason": None,
    },
    schemas.Media: {
        "uri": "u",
        "revision": 0,
        "dataset": "d",
        "batch": "d.000000",
        "path": "p",
        "media_id": ID,
        "kind": "video",
        "size_bytes": 1,
        **dict.fromkeys(("container", "codec", "pix_fmt", "width", "height", "rotation", "mirrored")),
        **dict.fromkeys(("sample_aspect", "fps_hz", "frames")),
        "duration_us": None,
        "start_us": None,
        "hazards": [],
        "decoder": "pyav",
        "licence": "cc0",
        "status": "ok",
        "reason": None,
        "error": None,
    },
    schemas.Shots: {
        "media_id": ID,
        "shot_index": 0,
        "shot_id": ID,
        "dataset": "d",
        "batch": "d.000000",
        "uri": "u",
        "kind": "video",
        "start_us": 0,
        "end_us": 1,
        "cut_in": "edge",
        "cut_out": "hard",
        **dict.fromkeys(("score", "crop_x", "crop_y", "crop_w", "crop_h", "motion_mean", "motion_p90", "freeze_share")),
        **dict.fromkeys(("luma_mean", "luma_std", "blur", "black_share")),
        "hashes": [],
        "hash_quality": [],
        "hash_times_us": [],
        "status": "ok",
        "reason": None,
        "error": None,
    },
    schemas.Clips: {
        "row_id": ID,
        "clip_id": ID,
        "shot_id": ID,
        "media_id": ID,
        "dataset": "d",
        "batch": "d.000000",
        "uri": "u",
        "kind": "video",
        "decoder": "pyav",
        "frames": 2,
        "times_us": [0, 5],
        "view_index": 0,
        "crop_x": 0,
        "crop_y": 0,
        "crop_w": 8,
        "crop_h": 8,
        "flip": False,
        "uses": ["pretrain"],
        "split": "train",
        "group": None,
        "status": "ok",
        "reason": None,
        "error": None,
    },
    schemas.Lineage: {
        "row_id": ID,
        "clip_id": ID,
        "shot_id": ID,
        "media_id": ID,
        "dataset": "d",
        "batch": "d.000000",
        "uri": "u",
        "frames": 16,
    },
}


def encoded(schema: type[dy.Schema], **changes: object) -> pl.DataFrame:
    frame = pl.DataFrame([TABLES[schema] | changes])
    return tables.decode_table(tables.encode_table(frame, schema, "t"), schema, "t")


@pytest.mark.parametrize("schema", TABLES, ids=lambda schema: schema.__name__)
def test_an_honest_row_passes(schema: type[dy.Schema]) -> None:
    assert encoded(schema).height == 1
    assert encoded(schema).schema == schema.create_empty().schema


@pytest.mark.parametrize(
    ("schema", "changes"),
    [
        (schemas.Sources, {"kind": "audio"}),
        (schemas.Sources, {"size_bytes": -1}),
        (schemas.Sources, {"found_at": None}),
        (schemas.Labels, {"media_id": b"short"}),
        (schemas.Media, {"media_id": None}),
        (schemas.Media, {"decoder": None}),
        (schemas.Media, {"status": "rejected"}),
        (schemas.Media, {"width": 0}),
        (schemas.Shots, {"end_us": 0}),
        (schemas.Shots, {"status": "quarantined"}),
        (schemas.Clips, {"row_id": None}),
        (schemas.Clips, {"times_us": [0]}),
        (schemas.Clips, {"split": "holdout"}),
        (schemas.Plan, {"slot": -1}),
        (schemas.Commits, {"status": "fine"}),
        (schemas.Commits, {"crc32c": 2**32}),
        (schemas.Duplicates, {"split": None}),
    ],
)
def test_each_rule_refuses(schema: type[dy.Schema], changes: dict[str, object]) -> None:
    with pytest.raises(TableError):
        encoded(schema, **changes)


def test_an_unreadable_file_is_a_row_too() -> None:
    changes = {"status": "quarantined", "reason": "truncated", "media_id": None, "decoder": None}
    assert encoded(schemas.Media, **changes)["reason"].to_list() == ["truncated"]
