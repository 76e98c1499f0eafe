"""storage/errors.py, `is_damage`: what does not answer, or may not be read, is never told as damage by a reader.

The remedy for damage removes a commit. Readers of latents and pixels, over a bucket (fsspec's memory file system) with
and without copies, and over this machine's disk. What verify says: test_verify.py.
"""

import errno
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from storage import remote
from storage.errors import (
    ConfigError,
    ConflictError,
    DamagedError,
    NExTVidError,
    StoreError,
    TableError,
    UnwritableError,
    UpstreamError,
    is_damage,
)
from storage.reader import RowReader, addresses
from storage.root import DataRoot
from tests.storage import test_remote_pixels, test_remote_reader
from tests.storage.pixel_stores import SIDE
from tests.storage.read_only import read_only
from tests.storage.stores import BATCH, FRAMES, Way, copies, full_store
from tests.storage.test_remote_reader import lying

Read = Callable[[], np.ndarray]  # one row
Opened = Callable[[], Read]  # by a new reader
Made = Callable[[Path], Opened]  # of a new store


class NoCredentialsError(Exception):
    """As botocore names it."""


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "WAITS_S", (0.0,) * len(remote.WAITS_S))


@pytest.mark.parametrize(
    ("error", "damage"),
    [
        (DamagedError("x"), True),
        (TableError("x"), True),
        (UpstreamError("gone"), True),
        (StoreError("network"), False),
        (ConfigError("credentials"), False),
        (ConflictError("taken"), False),
        (UnwritableError(errno.EROFS, "x"), False),
        (FileNotFoundError("fsspec gives no number"), True),
        (OSError(errno.ENOENT, "x"), True),
        (OSError(errno.EISDIR, "x"), True),
        (OSError(errno.ENOTDIR, "x"), True),
        (OSError(errno.EIO, "x"), True),
        (OSError(errno.EACCES, "x"), False),
        (OSError(errno.EMFILE, "x"), False),
        (OSError(errno.ENOMEM, "x"), False),
        (OSError(errno.ENOSPC, "x"), False),
        (OSError(errno.ESTALE, "x"), False),
        (ValueError("what a parser says"), True),
        (RuntimeError("x"), False),
    ],
    ids=repr,
)
def test_what_is_damage(error: Exception, damage: bool) -> None:
    assert is_damage(error) is damage


def latents(folder: Path, way: Way) -> Opened:
    store, stored = test_remote_reader.filled(folder)

    def opened() -> Read:
        reader, out = test_remote_reader.opened(store, stored, way), np.zeros((FRAMES, 2, 2, 3), np.float16)

        def read() -> np.ndarray:
            reader.read_into(FRAMES, stored[FRAMES][5], out)
            return out

        return read

    return opened


def pixels(folder: Path, way: Way) -> Opened:
    filled = test_remote_pixels.filled(folder)

    def opened() -> Read:
        reader, out = test_remote_pixels.opened(filled, way), np.zeros((FRAMES, SIDE, SIDE, 3), np.uint8)

        def read() -> np.ndarray:
            reader.read_into(FRAMES, filled[1][FRAMES][5], out)
            return out

        return read

    return opened


KINDS: dict[str, Made] = {
    "copied latents": lambda folder: latents(folder, "copies"),
    "latents by ranges": lambda folder: latents(folder, "ranges"),
    "copied pixels": lambda folder: pixels(folder, "copies"),
    "pixels by ranges": lambda folder: pixels(folder, "ranges"),
}
COPIED: dict[str, Made] = {name: made for name, made in KINDS.items() if name.startswith("copied")}


@pytest.mark.parametrize(
    ("answer", "told", "said"),
    [
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), StoreError, "reset"),
        (TimeoutError("no answer"), StoreError, "no answer"),
        (PermissionError("ExpiredToken"), ConfigError, "ExpiredToken"),
        (NoCredentialsError("x"), ConfigError, "there are no credentials"),
    ],
    ids=["reset", "silent", "expired", "no credentials"],
)
@pytest.mark.parametrize("made", KINDS.values(), ids=KINDS)
def test_a_bucket_that_does_not_answer(
    tmp_path: Path,
    made: Made,
    answer: Exception,
    told: type[NExTVidError],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read = made(tmp_path)()

    def refuses(*_: Any, **__: Any) -> Any:
        raise answer

    with monkeypatch.context() as patch:
        for call in ("cat_file", "info", "ls", "find"):
            patch.setattr(MemoryFileSystem, call, refuses)
        patch.setattr(MemoryFileSystem, "cat_ranges", lambda _, paths, *__, **___: [answer] * len(paths))
        with pytest.raises(told, match=said) as caught:
            read()
    assert not isinstance(caught.value, DamagedError)
    assert "remove" not in str(caught.value)
    assert read().any()  # and nothing is remembered


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("made", COPIED.values(), ids=COPIED)
def test_a_disk_that_keeps_no_copies(tmp_path: Path, made: Made, code: int) -> None:
    read = made(tmp_path)()
    with read_only(tmp_path / "cache", code), pytest.raises(UnwritableError, match=r"cache\.folder") as caught:
        read()
    assert str(tmp_path / "cache") in str(caught.value)
    assert os.strerror(code) in str(caught.value)
    assert "remove" not in str(caught.value)
    assert read().any()


@pytest.mark.parametrize("made", COPIED.values(), ids=COPIED)
def test_a_copy_that_this_disk_changed_is_made_again(tmp_path: Path, made: Made) -> None:
    opened = made(tmp_path)
    wanted = opened()().copy()
    (copy,) = copies(tmp_path / "cache")
    sound = copy.read_bytes()
    for last in (len(sound), -5):  # all of its bytes are others, or its end is as it was
        copy.write_bytes(bytes(byte ^ 1 for byte in sound[:last]) + sound[last:])
        np.testing.assert_array_equal(opened()(), wanted)
        assert copy.read_bytes() == sound
    copy.write_bytes(sound[:-9])
    np.testing.assert_array_equal(opened()(), wanted)


@pytest.mark.parametrize("made", COPIED.values(), ids=COPIED)
def test_what_is_wrong_in_the_bucket_is_damage(tmp_path: Path, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    read = made(tmp_path)()
    lying(monkeypatch, lambda data: bytes(byte ^ 1 for byte in data), 1000)
    with pytest.raises(DamagedError, match="Remedy: remove memory://"):
        read()
    assert copies(tmp_path / "cache") == []


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("batch", 7, "an address names batch 7 of 1: the trainset's file of rows"),
        ("slot", 200, "has 3 rows, none in slot 200: the trainset's file of rows"),
        ("part", 9, "is not committed. Remedy: make the latents of batch demo.000000 again, and 'trainset'"),
        ("shard", 9, "is not committed. Remedy: make the latents of batch demo.000000 again, and 'trainset'"),
    ],
)
def test_an_address_that_leads_nowhere(data_root: DataRoot, field: str, value: int, said: str) -> None:
    store, _ = full_store(data_root, 3)
    found = addresses(store.commits(BATCH), [BATCH])
    found[field][1] = value
    with pytest.raises(DamagedError, match=said):
        RowReader(store.root, store.spec, [BATCH]).rows(FRAMES, found)


@pytest.mark.parametrize("field", ["batch", "part", "shard"])
@pytest.mark.parametrize("copied", [True, False])
def test_an_address_of_pixels_that_leads_nowhere(tmp_path: Path, field: str, copied: bool) -> None:
    store, stored = filled = test_remote_pixels.filled(tmp_path)
    reader = test_remote_pixels.opened(filled, "copies" if copied else "ranges")
    address = stored[FRAMES][5].copy()
    address[field] = 9
    with pytest.raises(DamagedError, match=r"batch 9 of 2|not committed|no such file|does not exist"):
        reader.read_into(FRAMES, address, np.zeros((FRAMES, SIDE, SIDE, 3), np.uint8))
    assert store.verify() == []


@pytest.mark.parametrize("code", [errno.EACCES, errno.EMFILE, errno.ENOMEM, errno.EIO, errno.ENOENT])
def test_a_local_shard_that_cannot_be_opened(data_root: DataRoot, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    store, part = full_store(data_root, 3)
    found, real = addresses(store.commits(BATCH), [BATCH]), io.FileIO

    def refused(path: str) -> io.FileIO:
        if path == part.shard_path(0):
            raise OSError(code, os.strerror(code), path)
        return real(path)

    monkeypatch.setattr("storage.shard_files.io.FileIO", refused)
    with pytest.raises((OSError, DamagedError), match=os.strerror(code)) as caught:
        RowReader(store.root, store.spec, [BATCH]).rows(FRAMES, found)
    assert isinstance(caught.value, DamagedError) is (code in {errno.EIO, errno.ENOENT})
