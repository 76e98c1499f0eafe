"""storage/tables.py: what is read back equals what was written, and nothing else is ever read."""

import io
import re
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from storage import tables
from storage.digest import crc32c
from storage.errors import DamagedError, TableError, UpstreamError
from storage.root import DataRoot
from storage.schemas import Plan, Shots, Sources


def plan(count: int) -> pl.DataFrame:
    return pl.DataFrame(
        {"row_id": [slot.to_bytes(16, "big") for slot in range(count)], "slot": range(count)},
        schema_overrides={"slot": pl.UInt32},
    )


def sources(paths: list[str]) -> pl.DataFrame:
    rows = [
        {
            "uri": f"file:///videos/{path}",
            "revision": 0,
            "dataset": "demo",
            "batch": "demo.000000",
            "path": path,
            "kind": "video",
            "size_bytes": 5,
            "fingerprint": "t",
            "found_at": datetime(2026, 1, 1, tzinfo=UTC),
            "gone_at": None,
        }
        for path in paths
    ]
    return pl.DataFrame(rows)


@given(ids=st.lists(st.binary(min_size=16, max_size=16), unique=True, max_size=20))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, ids: list[bytes]) -> None:
    path = str(tmp_path_factory.mktemp("t") / "plan.parquet")
    frame = pl.DataFrame({"row_id": ids, "slot": range(len(ids))}, schema={"row_id": pl.Binary, "slot": pl.UInt32})
    tables.write_table(path, frame, Plan)
    assert_frame_equal(tables.read_table(path, Plan), frame)


def test_any_parquet_reader_opens_it(tmp_path: Path) -> None:
    tables.write_table(str(tmp_path / "plan.parquet"), plan(3), Plan)
    assert_frame_equal(pl.read_parquet(tmp_path / "plan.parquet"), plan(3))


def test_works_on_an_object_store(tmp_path: Path) -> None:
    path = f"memory://{tmp_path.name}/plan.parquet"
    tables.write_table(path, plan(2), Plan)
    assert_frame_equal(tables.read_table(path, Plan), plan(2))


def test_strings_become_enums_and_nulls_their_dtype(tmp_path: Path) -> None:
    path = str(tmp_path / "s.parquet")
    tables.write_table(path, sources(["a.mp4", "b.mp4"]), Sources)
    found = tables.read_table(path, Sources)
    assert found.schema["kind"] == pl.Enum(["video", "image"])
    assert found.schema["gone_at"] == pl.Datetime("us", "UTC")
    assert found["path"].to_list() == ["a.mp4", "b.mp4"]


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (plan(2).drop("slot"), "missing: \\['slot'\\]"),
        (plan(2).with_columns(extra=1), "unknown: \\['extra'\\]"),
        (plan(2).with_columns(slot=0.5), "column 'slot' is Float64"),
        (plan(2).with_columns(slot=-1), "does not fit"),
        (plan(2).with_columns(row_id=pl.lit(b"short")), "breaks the rules of Plan"),
        (plan(2).with_columns(row_id=pl.lit(b"x" * 16)), "primary_key"),
        (plan(2).with_columns(row_id=None), "breaks the rules of Plan"),
    ],
)
def test_a_frame_that_breaks_the_schema_is_not_written(tmp_path: Path, frame: pl.DataFrame, message: str) -> None:
    with pytest.raises(TableError, match=message):
        tables.write_table(str(tmp_path / "plan.parquet"), frame, Plan)
    assert list(tmp_path.iterdir()) == []


def test_unknown_enum_value_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="does not fit"):
        tables.write_table(str(tmp_path / "s"), sources(["a"]).with_columns(kind=pl.lit("audio")), Sources)


def test_missing_table(tmp_path: Path) -> None:
    with pytest.raises(UpstreamError, match="make it first"):
        tables.read_table(str(tmp_path / "none.parquet"), Plan)


def test_every_flipped_bit_is_found() -> None:
    data = tables.encode_table(plan(3), Plan, "plan")
    assert_frame_equal(tables.decode_table(data, Plan, "plan"), plan(3))
    for place in range(len(data)):
        torn = bytearray(data)
        torn[place] ^= 1 << (place % 8)
        with pytest.raises(TableError):
            tables.decode_table(bytes(torn), Plan, "plan")


@given(keep=st.integers(0, 400))
def test_truncation_is_found(keep: int) -> None:
    data = tables.encode_table(plan(3), Plan, "plan")
    with pytest.raises(TableError, match="damaged"):
        tables.decode_table(data[:keep], Plan, "plan")


def test_a_foreign_parquet_is_refused() -> None:
    buffer = io.BytesIO()
    plan(3).write_parquet(buffer)
    with pytest.raises(TableError, match="checksum"):
        tables.decode_table(buffer.getvalue(), Plan, "plan")


def test_another_schema_is_refused() -> None:
    with pytest.raises(TableError, match="columns of Shots"):
        tables.decode_table(tables.encode_table(plan(3), Plan, "p"), Shots, "p")


def test_read_tables(data_root: DataRoot) -> None:
    assert tables.read_tables(data_root, "sources", None, Sources).height == 0
    for number in range(3):
        tables.write_table(data_root.table("sources", f"demo.{number:06d}"), sources([f"{number}.mp4"]), Sources)
    assert tables.read_tables(data_root, "sources", None, Sources)["path"].to_list() == ["0.mp4", "1.mp4", "2.mp4"]
    some = tables.read_tables(data_root, "sources", ["demo.000002", "demo.000000"], Sources)
    assert some["path"].to_list() == ["2.mp4", "0.mp4"]
    assert tables.read_tables(data_root, "sources", [], Sources).height == 0


@pytest.mark.parametrize(
    "what", ["the same", "a key twice", "another width", "a column more", "a rule broken", "damaged"]
)
def test_tables_read_at_once_are_those_read_one_by_one(data_root: DataRoot, what: str) -> None:
    """What is read in one go where it can be; the reference is read_table, whose errors name the file."""
    keys = [f"demo.{number:06d}" for number in range(3)]
    paths = [data_root.table("sources", key) for key in keys]
    for number, path in enumerate(paths):
        tables.write_table(path, sources(["0.mp4" if what == "a key twice" else f"{number}.mp4"]), Sources)
    one = tables.read_table(paths[1], Sources)
    changed = {
        "another width": one.with_columns(pl.col("size_bytes").cast(pl.Int8)),
        "a column more": one.with_columns(more=pl.lit(1)),
        "a rule broken": one.with_columns(size_bytes=pl.lit(-1, one.schema["size_bytes"])),
    }
    if what in changed:
        Path(paths[1]).write_bytes(sealed(changed[what]))
    elif what == "damaged":
        Path(paths[1]).write_bytes(Path(paths[1]).read_bytes()[:-20] + bytes(20))
    try:
        wanted = pl.concat([tables.read_table(path, Sources) for path in paths])
    except TableError as error:
        with pytest.raises(TableError, match=re.escape(str(error).splitlines()[0][:80])):
            tables.read_tables(data_root, "sources", keys, Sources)
    else:
        assert_frame_equal(tables.read_tables(data_root, "sources", keys, Sources), wanted)


def sealed(frame: pl.DataFrame) -> bytes:
    """The bytes of a table that another program wrote with our seal."""
    buffer = io.BytesIO()
    frame.write_parquet(buffer, metadata={"nextvid.crc32c": "crc32c=00000000"})
    data, blank = buffer.getvalue(), b"crc32c=00000000"
    start = data.rindex(blank)
    return data[:start] + b"crc32c=%08x" % crc32c(data) + data[start + len(blank) :]


@given(st.sets(st.integers(0, 30)), st.sets(st.integers(0, 30)))
def test_missing_rows_is_set_difference(wanted: set[int], done: set[int]) -> None:
    frames = [pl.DataFrame({"k": sorted(keys, reverse=True)}, schema={"k": pl.Int64}) for keys in (wanted, done)]
    assert tables.missing_rows(frames[0], frames[1], "k")["k"].to_list() == sorted(wanted - done, reverse=True)


def test_checks_are_read_back_and_required(tmp_path: Path) -> None:
    path = str(tmp_path / "demo.000000.json")
    assert tables.read_checks(path) is None
    with pytest.raises(UpstreamError, match="'media' has not been made"):
        tables.require_checks(path, "media")
    rows = {"name": "rows", "passed": True, "numbers": {"rows": np.int64(3)}}
    tables.publish_checks(path, "media", [rows], {"listing": "0" * 32})
    tables.require_checks(path, "media")
    assert tables.read_checks(path) == {
        "asset": "media",
        "passed": True,
        "made_from": {"listing": "0" * 32},
        "checks": [{"name": "rows", "passed": True, "numbers": {"rows": 3}}],
    }
    with pytest.raises(TableError, match="not of 'shots'"):
        tables.require_checks(path, "shots")


def test_failed_checks_stop_the_next_step(tmp_path: Path) -> None:
    path = str(tmp_path / "c.json")
    warned = {"name": "slow", "passed": False, "blocking": False}
    tables.publish_checks(path, "latents", [warned])
    tables.require_checks(path, "latents")
    failed = {"name": "finite", "passed": False, "numbers": {"psnr_db": float("nan")}}
    tables.publish_checks(path, "latents", [warned, failed])
    with pytest.raises(UpstreamError, match=r'failed its checks .*: finite \{"psnr_db": "nan"\}$'):
        tables.require_checks(path, "latents")


@pytest.mark.parametrize("value", ["[]", "{}", '{"passed": 1}'])
def test_a_file_that_is_no_checks(tmp_path: Path, value: str) -> None:
    (tmp_path / "c.json").write_text(value)
    with pytest.raises((TableError, DamagedError), match=r"c\.json is no (file of checks|record): remove it and make"):
        tables.require_checks(str(tmp_path / "c.json"), "media")


def test_many_small_tables_are_those_written_one_by_one(tmp_path: Path) -> None:
    frames = {str(tmp_path / name): sources([name]) for name in ("a.mp4", "b.mp4")}
    tables.write_many(frames, Sources)
    for path, frame in frames.items():
        found = Path(path).read_bytes()
        tables.write_table(path, frame, Sources)
        assert Path(path).read_bytes() == found
    tables.write_many({}, Sources)
    wrong = {path: frame.with_columns(revision=pl.lit(None)) for path, frame in frames.items()}
    with pytest.raises(TableError, match="and others"):
        tables.write_many(wrong, Sources)


class TestWrittenInPieces:
    @pytest.mark.parametrize("counts", [(), (3,), (2, 0, 5)])
    def test_equals_the_table_written_whole(self, tmp_path: Path, counts: tuple[int, ...]) -> None:
        whole = plan(sum(counts))
        pieces = [whole[sum(counts[:n]) : sum(counts[: n + 1])] for n in range(len(counts))]
        tables.write_tables(str(tmp_path / "pieces.parquet"), iter(pieces), Plan)
        tables.write_table(str(tmp_path / "whole.parquet"), whole, Plan)
        assert_frame_equal(
            tables.read_table(str(tmp_path / "pieces.parquet"), Plan),
            tables.read_table(str(tmp_path / "whole.parquet"), Plan),
        )
        assert sorted(path.name for path in tmp_path.iterdir()) == ["pieces.parquet", "whole.parquet"]

    def test_enums_and_times_survive(self, tmp_path: Path) -> None:
        path, pieces = str(tmp_path / "sources.parquet"), [sources(["a.mp4"]), sources(["b.mp4", "c.mp4"])]
        tables.write_tables(path, pieces, Sources)
        found = tables.read_table(path, Sources)
        assert found["path"].to_list() == ["a.mp4", "b.mp4", "c.mp4"]
        assert found.schema == Sources.create_empty().schema

    def test_a_piece_that_breaks_the_schema_leaves_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(TableError):
            tables.write_tables(str(tmp_path / "t.parquet"), iter([plan(2), plan(2).drop("slot")]), Plan)
        assert list(tmp_path.iterdir()) == []

    def test_a_flipped_bit_is_found(self, tmp_path: Path) -> None:
        path = tmp_path / "t.parquet"
        tables.write_tables(str(path), [plan(3), plan(4)], Plan)
        for place in range(0, path.stat().st_size, 37):
            data = bytearray(path.read_bytes())
            data[place] ^= 4
            (tmp_path / "flipped.parquet").write_bytes(data)
            with pytest.raises(TableError):
                tables.read_table(str(tmp_path / "flipped.parquet"), Plan)
