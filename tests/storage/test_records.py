"""Records: what was published is read, whatever it holds; changed bytes and newer versions are refused."""

from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.errors import DamagedError, StoreError
from storage.records import FORMAT, publish_record, read_record
from storage.schemas import Labels
from storage.tables import read_table, write_table
from tests.factories import flip, table

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.text(min_size=1).filter(lambda name: name not in ("seal", "format"))


@given(record=st.dictionaries(NAMES, VALUES, max_size=4), data=st.data())
def test_what_was_published_is_read_and_a_changed_byte_is_not(
    record: dict[str, object], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "record.json"
    publish_record(str(path), record)
    assert read_record(str(path)) == record
    kept = path.read_bytes()
    flip(path, data.draw(st.integers(0, len(kept) - 1)))
    with suppress(DamagedError):  # but for a byte between values, which says nothing
        assert read_record(str(path)) == record


def test_numbers_of_numpy_and_keys_that_are_numbers(tmp_path: Path) -> None:
    publish_record(f"{tmp_path}/a.json", {"mean": np.float64(0.1), "by_step": {1: (2, 3)}})
    assert read_record(f"{tmp_path}/a.json") == {"mean": 0.1, "by_step": {"1": [2, 3]}}


def test_older_and_newer_records(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"asset": "media"}')  # as release 0.1.0 wrote it
    assert read_record(str(path)) == {"asset": "media"}
    with pytest.raises(DamagedError, match="has no seal, so it cannot be checked; make it again"):
        read_record(str(path), "make it again", sealed=True)
    publish_record(str(path), {"asset": "media"})
    for changed in ('"sea1"', '"forma1"'):
        said = path.read_text().replace(changed.replace("1", "l" if "sea" in changed else "t"), changed)
        path.write_text(said)
        with pytest.raises(DamagedError):
            read_record(str(path))
        publish_record(str(path), {"asset": "media"})
    path.write_text('["no mapping"]')
    with pytest.raises(DamagedError, match="is no record"):
        read_record(str(path))


def test_what_a_newer_version_wrote_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = table(Labels, [{"media_id": b"1" * 16, "target": "animal", "value": "cat"}])
    with monkeypatch.context() as newer:
        newer.setattr("storage.records.FORMAT", FORMAT + 1)
        newer.setattr("storage.tables._SEALED", f"crc32c=00000000 format={FORMAT + 1}")
        publish_record(f"{tmp_path}/a.json", {"asset": "media"})
        write_table(f"{tmp_path}/a.parquet", rows, Labels)
    for read in (lambda: read_record(f"{tmp_path}/a.json"), lambda: read_table(f"{tmp_path}/a.parquet", Labels)):
        with pytest.raises(StoreError, match=r"a\.\w+ was written by a newer version of nextvid .*: update nextvid"):
            read()
    write_table(f"{tmp_path}/a.parquet", rows, Labels)
    assert f"format={FORMAT}".encode() in Path(tmp_path, "a.parquet").read_bytes()
    assert read_table(f"{tmp_path}/a.parquet", Labels).equals(rows)
