"""storage/verify.py and withdrawn.py: damage is named with file, row and remedy; a sound store says nothing."""

import errno
import io
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from storage import atomic
from storage.errors import DamagedError, StoreError
from storage.part import LatentPart
from storage.reader import RowReader, addresses
from storage.root import DataRoot
from storage.shard import INDEX_BYTES
from storage.store import LatentStore
from storage.verify import LEFTOVER_AGE_S
from storage.withdrawn import record_withdrawal, withdrawn_media, withdrawn_rows
from tests.storage.stores import BATCH, FRAMES, full_store, ids, spec, write

MEDIA = "ab" * 16


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def change_json(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def fill_failed_slot(part: LatentPart) -> None:
    with Path(part.shard_path(0)).open("r+b") as file:
        file.seek(2 * part.spec.row_bytes(FRAMES))
        file.write(b"\0\0")


def leave_litter(part: LatentPart, age_s: float) -> None:
    path = Path(part.path, "commits", ".x.partial")
    path.touch()
    os.utime(path, (time.time() - age_s,) * 2)


DAMAGE: list[tuple[str, Callable[[LatentPart], object], str, str, int | None]] = [
    ("data", lambda part: flip(Path(part.shard_path(1)), 5), "c.1.0.0.0.0", "differ from their checksum", 256),
    ("index", lambda part: flip(Path(part.shard_path(0)), -INDEX_BYTES), "c.0.0.0.0.0", "index at its end", None),
    ("crc of index", lambda part: flip(Path(part.shard_path(0)), -1), "c.0.0.0.0.0", "index at its end", None),
    ("commit", lambda part: flip(Path(part.commit_path(0)), 90), "000000.parquet", "checksum", None),
    ("plan", lambda part: flip(Path(part.path, "plan.parquet"), 90), "plan.parquet", "damaged", None),
    ("no shard", lambda part: Path(part.shard_path(1)).unlink(), "c.1.0.0.0.0", "cannot be read", None),
    ("short", lambda part: Path(part.shard_path(1)).write_bytes(b"x"), "c.1.0.0.0.0", "1 bytes where", None),
    ("no commit", lambda part: Path(part.commit_path(1)).unlink(), "c.1.0.0.0.0", "without its commit", None),
    ("failed slot", fill_failed_slot, "c.0.0.0.0.0", "holds values", 2),
    ("stray", lambda part: leave_litter(part, LEFTOVER_AGE_S + 60), ".x.partial", "belongs to", None),
    ("beyond", lambda part: Path(part.path, "latent/c.2").write_bytes(b""), "c.2", "belongs to", None),
    (
        "shape",
        lambda part: change_json(Path(part.path, "latent/zarr.json"), "300", "301"),
        "latent/zarr.json",
        "describes",
        None,
    ),
    (
        "fill",
        lambda part: change_json(Path(part.path, "latent/zarr.json"), '"NaN"', "0.0"),
        "latent/zarr.json",
        "describes",
        None,
    ),
    ("torn zarr.json", lambda part: flip(Path(part.path, "latent/zarr.json"), 0), "zarr.json", "cannot open", None),
]


@pytest.mark.parametrize(("name", "damage", "file", "what", "row"), DAMAGE, ids=[case[0] for case in DAMAGE])
def test_damage_is_named(
    data_root: DataRoot, name: str, damage: Callable[[LatentPart], object], file: str, what: str, row: int | None
) -> None:
    store, part = full_store(data_root, 300, failed=[ids(300)[2]])
    assert store.verify() == store.verify(BATCH) == []
    damage(store.part(BATCH, FRAMES, part.number))
    (problem,) = store.verify()
    assert problem.file.endswith(file), name
    assert what in problem.what
    assert problem.row == (None if row is None else ids(300)[row].hex())
    assert problem.remedy
    assert problem.file in str(problem)


REGIONS: dict[str, Callable[[LatentPart], str]] = {
    "shard": lambda part: part.shard_path(0),
    "partial shard": lambda part: part.shard_path(1),
    "commit": lambda part: part.commit_path(1),
    "plan": lambda part: f"{part.path}/plan.parquet",
    "zarr.json of the group": lambda part: part.metadata_paths[0],
    "zarr.json of the array": lambda part: part.metadata_paths[1],
    "spec.json": lambda part: f"{part.path.split(BATCH)[0]}spec.json",
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[LatentStore, LatentPart]:
    """Without failed rows, so that every byte of a shard counts."""
    return full_store(DataRoot.open(str(tmp_path_factory.mktemp("sound"))), 300)


@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@pytest.mark.parametrize("region", REGIONS.values(), ids=REGIONS)
def test_a_flipped_bit_anywhere_is_named(
    sound: tuple[LatentStore, LatentPart], region: Callable[[LatentPart], str], where: float, bit: int
) -> None:
    """With its file, and its row where it is in one."""
    store, part = sound[0], sound[0].part(BATCH, FRAMES, 0)
    path = Path(region(part))
    data = path.read_bytes()
    changed, place = bytearray(data), int(where * len(data))
    changed[place] ^= 1 << bit
    path.write_bytes(changed)
    try:
        problems = store.verify()
    finally:
        path.write_bytes(data)
    assert {problem.file for problem in problems} == {str(path)}
    assert all(problem.remedy for problem in problems)
    rows: list[bytes] = part.rows_of(int(path.name.split(".")[1]))["row_id"].to_list() if path.name[:2] == "c." else []
    row_bytes = part.spec.row_bytes(FRAMES)
    if place < len(rows) * row_bytes:
        assert [problem.row for problem in problems] == [rows[place // row_bytes].hex()]


def test_what_a_living_writer_has_under_way_is_no_problem(data_root: DataRoot) -> None:
    store, part = full_store(data_root, 300)
    leave_litter(part, 1.0)
    Path(part.commit_path(1)).unlink()
    with part.lock():
        assert store.verify() == []
    (problem,) = store.verify()  # the writer has gone
    assert problem.what == "a shard without its commit, left by a writer that died"


def test_a_name_that_goes_while_it_is_listed(data_root: DataRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    store, part = full_store(data_root, 3)
    leave_litter(part, LEFTOVER_AGE_S + 60)
    real = Path.stat

    def stat(path: Path, **how: bool) -> os.stat_result:
        if path.name == ".x.partial":
            path.unlink(missing_ok=True)
        return real(path, **how)

    monkeypatch.setattr(Path, "stat", stat)
    assert store.verify() == []


@pytest.mark.parametrize("region", REGIONS.values(), ids=REGIONS)
def test_a_file_that_the_disk_cannot_read_is_named(
    data_root: DataRoot, region: Callable[[LatentPart], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, part = full_store(data_root, 300)
    refuse(monkeypatch, region(part), errno.EIO)
    problems = store.verify()
    assert {problem.file for problem in problems} == {region(part)}
    assert "Input/output error" in problems[0].what


@pytest.mark.parametrize("code", [errno.EACCES, errno.EMFILE, errno.ENOMEM])
@pytest.mark.parametrize("region", REGIONS.values(), ids=REGIONS)
def test_a_system_that_refuses_says_nothing_of_the_file(
    data_root: DataRoot, region: Callable[[LatentPart], str], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever followed the remedy for damage would remove what is sound."""
    store, part = full_store(data_root, 300)
    refuse(monkeypatch, region(part), code)
    with pytest.raises(OSError, match=os.strerror(code)) as caught:
        store.verify()
    assert caught.value.errno == code
    assert "Remedy" not in str(caught.value)


def test_a_store_that_does_not_answer_is_not_damaged(data_root: DataRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = full_store(data_root, 3)

    def silent(path: str) -> bytes:
        raise StoreError(f"{path}: 6 tries failed")

    monkeypatch.setattr(atomic, "read_bytes", silent)
    with pytest.raises(StoreError, match="6 tries"):
        store.verify()


def refuse(monkeypatch: pytest.MonkeyPatch, path: str, code: int) -> None:
    """Opening and reading this file fails so."""
    real_open, real_read, real_file = Path.open, Path.read_bytes, io.FileIO

    def refused(file: Path) -> None:
        if str(file) == path:
            raise OSError(code, os.strerror(code), path)

    def opened(file: Path, *args: Any, **how: Any) -> Any:
        refused(file)
        return real_open(file, *args, **how)

    def read(file: Path) -> bytes:
        refused(file)
        return real_read(file)

    def raw(file: Path, *args: Any) -> io.FileIO:
        refused(file)
        return real_file(file, *args)

    monkeypatch.setattr(io, "FileIO", raw)
    monkeypatch.setattr(Path, "open", opened)
    monkeypatch.setattr(Path, "read_bytes", read)


def test_the_remedy_heals(data_root: DataRoot) -> None:
    """A damaged shard: remove its commit, write it again."""
    store, part = full_store(data_root, 300)
    flip(Path(part.shard_path(1)), 5)
    (problem,) = store.verify()
    assert problem.remedy.startswith(f"remove {part.commit_path(1)} ")
    Path(part.commit_path(1)).unlink()
    unfinished = store.unfinished(BATCH, FRAMES)
    assert unfinished is not None
    write(unfinished, 1)
    assert store.verify() == []


def test_a_changed_spec_is_found(data_root: DataRoot) -> None:
    store, _ = full_store(data_root, 3)
    change_json(Path(data_root.spec_folder(store.digest), "spec.json"), "48", "49")
    (problem,) = store.verify()
    assert "was changed" in problem.what


def test_withdrawals_are_recorded_and_united(data_root: DataRoot) -> None:
    assert withdrawn_rows(data_root) == frozenset()
    record_withdrawal(data_root, MEDIA, ids(2))
    record_withdrawal(data_root, MEDIA, ids(2, first=1))
    record_withdrawal(data_root, "cd" * 16, ids(1, first=9))
    assert withdrawn_rows(data_root) == frozenset(ids(3) + ids(1, first=9))
    record = json.loads(Path(data_root.withdrawn(), f"{MEDIA}.json").read_text())
    assert record["media_id"] == MEDIA


def test_a_damaged_withdrawal_is_never_an_empty_one(data_root: DataRoot) -> None:
    record_withdrawal(data_root, MEDIA, ids(2))
    for said in ("{}", "null", "3", '["row_ids"]', '{"row_ids": ["zz"]}', '{"row_ids": [7]}', '{"row_ids": 7}', "{"):
        Path(data_root.withdrawn(), f"{MEDIA}.json").write_text(said)
        with pytest.raises(DamagedError, match=MEDIA):
            withdrawn_rows(data_root)
    Path(data_root.withdrawn(), f"{MEDIA}.json").write_text("{}")
    with pytest.raises(DamagedError, match="no record of a withdrawal"):
        withdrawn_rows(data_root)
    with pytest.raises(DamagedError):
        record_withdrawal(data_root, MEDIA, ids(1))
    store, _ = full_store(data_root, 3)
    (problem,) = store.verify()
    assert MEDIA in str(problem)


def test_other_files_beside_withdrawals_mean_nothing(data_root: DataRoot) -> None:
    record_withdrawal(data_root, MEDIA, ids(2))
    for name in ("notes.json", f"{MEDIA}.json.bak", MEDIA.upper() + ".json", ".json"):
        Path(data_root.withdrawn(), name).write_text("nobody knows")
    assert withdrawn_media(data_root) == {bytes.fromhex(MEDIA)}
    assert withdrawn_rows(data_root) == frozenset(ids(2))


def test_withdrawn_rows_are_zeros_and_the_rest_stands(data_root: DataRoot) -> None:
    store, part = full_store(data_root, 300)
    slots = [0, 255, 256]
    found = addresses(store.commits(BATCH), [BATCH])
    record_withdrawal(data_root, MEDIA, [ids(300)[slot] for slot in slots])
    problems = store.verify()
    assert [problem.row for problem in problems] == [ids(300)[slot].hex() for slot in slots]
    assert all("withdraw the file again" in problem.what for problem in problems)
    part.erase(slots)
    assert store.verify() == []
    array = np.asarray(zarr.open_array(f"{part.path}/latent", mode="r")[:])
    assert not array[slots].any()
    reader, out = RowReader(data_root, store.spec, [BATCH]), np.empty((FRAMES, 2, 2, 3), np.float16)
    for slot, address in enumerate(found):
        if slot in slots:
            with pytest.raises(DamagedError, match="withdrawn"):
                reader.read_into(FRAMES, address, out)
        else:
            reader.read_into(FRAMES, address, out)
            np.testing.assert_array_equal(out, array[slot])


def test_erasing_skips_shards_that_were_never_committed(data_root: DataRoot) -> None:
    store = LatentStore(data_root, full_store(data_root, 3)[0].spec)
    part = store.plan_part(BATCH, FRAMES, ids(3, first=10))
    part.erase([0])
    assert not Path(part.shard_path(0)).exists()


def test_a_discarded_shard_is_free_and_sound(data_root: DataRoot) -> None:
    store, part = full_store(data_root, 300)
    kept = Path(part.shard_path(1)).read_bytes()
    size_bytes = Path(part.shard_path(0)).stat().st_size
    assert part.discard(0) == size_bytes
    assert (part.is_stored(0), part.committed(0), part.is_stored(1)) == (False, True, True)
    assert Path(part.shard_path(1)).read_bytes() == kept
    assert store.verify() == []
    assert store.unfinished(BATCH, FRAMES) is None
    assert store.commits(BATCH)["reason"].to_list() == ["swept"] * 256 + [None] * 44
    array = np.asarray(zarr.open_array(f"{part.path}/latent", mode="r")[:])
    assert np.isnan(array[:256]).all()
    assert np.isfinite(array[256:]).all()
    assert part.discard(0) == 0
    part.erase([0])  # nothing is left to erase
    assert store.verify() == []


def test_a_row_cited_from_a_discarded_shard_is_an_error(data_root: DataRoot) -> None:
    store, part = full_store(data_root, 3)
    (address, *_) = addresses(store.commits(BATCH), [BATCH])
    part.discard(0)
    with pytest.raises(DamagedError, match="cannot be read"):
        RowReader(data_root, store.spec, [BATCH]).read_into(FRAMES, address, np.empty((FRAMES, 2, 2, 3), np.float16))


def test_every_store_is_found(data_root: DataRoot) -> None:
    assert LatentStore.every(data_root) == []
    stores = [full_store(data_root, 3)[0], LatentStore(data_root, spec(resolution=96))]
    stores[1].create()
    assert [store.spec for store in LatentStore.every(data_root)] == [
        store.spec for store in sorted(stores, key=lambda store: store.digest)
    ]
