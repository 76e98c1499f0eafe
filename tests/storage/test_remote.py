"""storage/remote.py and listing.py: bounded repetition, one clear error, no answer that was lost counted as a loss."""

import errno
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from storage import atomic, listing, remote
from storage.errors import ConfigError, ConflictError, StoreError, UpstreamError
from storage.root import DataRoot

TRIES = len(remote.WAITS_S) + 1


@pytest.fixture
def bucket(tmp_path: Path) -> str:
    """An empty folder of fsspec's memory file system, which is one for the whole process."""
    return f"memory://{tmp_path.name}"


@pytest.fixture(autouse=True)
def waited(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits that were asked for, none of which happens."""
    waits: list[float] = []
    monkeypatch.setattr("storage.remote.time.sleep", waits.append)
    return waits


def failing(method: str, monkeypatch: pytest.MonkeyPatch, times: int, error: Exception, *, after: bool = False) -> None:
    """Make a method of the memory file system fail so many times, before or `after` it did its work."""
    real: Callable[..., Any] = getattr(MemoryFileSystem, method)
    left = [times]

    def fails(self: MemoryFileSystem, *args: Any, **kwargs: Any) -> Any:
        if left[0] == 0:
            return real(self, *args, **kwargs)
        left[0] -= 1
        if after:
            real(self, *args, **kwargs)
        raise error

    monkeypatch.setattr(MemoryFileSystem, method, fails)


def test_a_passing_failure_passes(bucket: str, monkeypatch: pytest.MonkeyPatch, waited: list[float]) -> None:
    failing("pipe_file", monkeypatch, TRIES - 1, ConnectionError("reset"))
    atomic.publish_bytes(f"{bucket}/x", b"data")
    assert atomic.read_bytes(f"{bucket}/x") == b"data"
    assert len(waited) == TRIES - 1
    for asked, wait_s in zip(waited, remote.WAITS_S, strict=True):
        assert 0.5 * wait_s <= asked <= 1.5 * wait_s


BUSY = OSError(errno.EBUSY, "Please reduce your request rate.")  # what s3fs makes of 503


def test_a_storm_of_a_minute_is_survived(bucket: str, monkeypatch: pytest.MonkeyPatch, waited: list[float]) -> None:
    atomic.publish_bytes(f"{bucket}/x", b"data")
    monkeypatch.setattr("storage.remote.random.uniform", lambda low, _: low)  # the least patience
    left = 60.0

    def cat_file(self: MemoryFileSystem, path: str, start: int | None = None, end: int | None = None) -> bytes:
        if sum(waited) < left:
            raise BUSY
        return b"data"[start:end]

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    assert atomic.read_bytes(f"{bucket}/x") == b"data"
    assert sum(waited) >= left
    closing = threading.Event()
    monkeypatch.setattr(closing, "wait", lambda wait_s: waited.append(wait_s))
    waited.clear()
    assert remote.read_ranges([(f"{bucket}/x", 0, 2), (f"{bucket}/x", 1, 2)], closing) == [b"da", b"at"]


def test_patience_ends(bucket: str, monkeypatch: pytest.MonkeyPatch, waited: list[float]) -> None:
    failing("cat_file", monkeypatch, 1000, BUSY)
    with pytest.raises(StoreError, match=r"36 tries failed, the last with OSError.*reduce your request rate"):
        atomic.read_bytes(f"{bucket}/x")
    assert 120 < sum(waited) < 480
    assert len({round(wait_s, 6) for wait_s in waited[5:]}) > 20  # many processes do not come back at once
    closing = threading.Event()
    closing.set()
    assert remote.read_ranges([(f"{bucket}/x", 0, 2)], closing) == [None]


def test_repetition_is_bounded_and_told(bucket: str, monkeypatch: pytest.MonkeyPatch, waited: list[float]) -> None:
    failing("cat_file", monkeypatch, 1000, TimeoutError("no answer"))
    with pytest.raises(StoreError, match=f"{TRIES} tries failed, the last with TimeoutError: no answer"):
        atomic.read_bytes(f"{bucket}/x")
    assert len(waited) == TRIES - 1


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError("Access Denied"), "access was denied"),
        (type("NoCredentialsError", (Exception,), {})(), "there are no credentials"),
        (ValueError("bad request"), "refused the request"),
    ],
)
def test_what_no_repetition_mends_is_told_at_once(
    bucket: str, monkeypatch: pytest.MonkeyPatch, waited: list[float], error: Exception, said: str
) -> None:
    failing("info", monkeypatch, 1000, error)
    for ask in (atomic.exists, listing.size_bytes):
        with pytest.raises((ConfigError, StoreError), match=said):
            ask(f"{bucket}/x")
    assert waited == []


def test_a_put_whose_answer_was_lost_is_no_conflict(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first try arrives, its answer does not, and the second finds the name taken: by the first."""
    failing("pipe_file", monkeypatch, 1, ConnectionError("reset"), after=True)
    atomic.create_exclusively(f"{bucket}/commit", b"ours")
    assert atomic.read_bytes(f"{bucket}/commit") == b"ours"


def test_a_lost_answer_does_not_hide_a_winner(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    atomic.create_exclusively(f"{bucket}/commit", b"theirs")
    failing("pipe_file", monkeypatch, 1, ConnectionError("reset"))
    with pytest.raises(ConflictError, match="somebody else"):
        atomic.create_exclusively(f"{bucket}/commit", b"ours")
    assert atomic.read_bytes(f"{bucket}/commit") == b"theirs"


def test_stores_that_word_the_conflict_otherwise(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """s3fs turns a refused condition into EINVAL where the answer lacks Amazon's element `Condition`."""
    cause = Exception()
    cause.response = {"Error": {"Code": "PreconditionFailed"}}  # type: ignore[attr-defined]
    error = OSError(22, "At least one of the pre-conditions you specified did not hold")
    error.__cause__ = cause
    failing("pipe_file", monkeypatch, 1, error)
    with pytest.raises(ConflictError):
        atomic.create_exclusively(f"{bucket}/commit", b"ours")


def test_a_package_that_is_missing_is_named() -> None:
    with pytest.raises(ConfigError, match="install the package"):
        atomic.exists("nosuchprotocol://place/x")


@pytest.mark.parametrize("url", ["s3://key:secret@bucket/prefix", "s3://bucket/prefix?token=secret"])
def test_credentials_in_a_url_are_refused_and_not_repeated(url: str) -> None:
    for act in (lambda: DataRoot.open(url, "/tmp/runs"), lambda: atomic.exists(url)):
        with pytest.raises(ConfigError, match="carries credentials") as caught:
            act()
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_listings(kind: str, bucket: str, tmp_path: Path) -> None:
    top = bucket if kind == "memory" else str(tmp_path)
    assert listing.files(f"{top}/none") == listing.folders(f"{top}/none", ".*") == []
    assert listing.files_below(f"{top}/none") == {}
    atomic.publish_bytes(f"{top}/a/one.json", b"1")
    atomic.publish_bytes(f"{top}/a/b/two.json", b"22")
    atomic.publish_bytes(f"{top}/a/b/.three.partial", b"333")
    assert listing.files(f"{top}/a") == ["one.json"]
    assert listing.folders(f"{top}/a", "[a-z]") == ["b"]
    assert listing.folders(f"{top}/a", "[0-9]") == []
    assert listing.files_below(f"{top}/a") == {
        f"{top}/a/b/.three.partial": 3,
        f"{top}/a/b/two.json": 2,
        f"{top}/a/one.json": 1,
    }
    assert listing.size_bytes(f"{top}/a/b/two.json") == 2
    assert listing.size_bytes(f"{top}/a/b/none.json") is None


def test_a_listing_that_fails_is_never_an_empty_one(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    atomic.publish_bytes(f"{bucket}/sources/a.parquet", b"1")
    failing("ls", monkeypatch, 1000, PermissionError("denied"))
    root = DataRoot.open(bucket, "/tmp/runs")
    with pytest.raises(ConfigError, match="denied"):
        root.batches()


def test_zeroing_in_place(bucket: str, tmp_path: Path) -> None:
    for path in (f"{bucket}/x", str(tmp_path / "x")):
        atomic.publish_bytes(path, b"0123456789")
        atomic.zero(path, [(1, 2), (6, 2)])
        assert atomic.read_bytes(path) == b"0\0\x00345\0\x0089"
    with pytest.raises((UpstreamError, FileNotFoundError)):
        atomic.zero(f"{bucket}/none", [(0, 1)])


def test_a_folder_on_an_object_store_is_made_by_its_last_file(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    real = MemoryFileSystem.put_file

    def put_file(self: MemoryFileSystem, local: str, key: str, **kwargs: Any) -> None:
        order.append(key.rsplit("/", 1)[-1])
        real(self, local, key, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "put_file", put_file)
    with atomic.staged_folder(f"{bucket}/set", last="about.json") as folder:
        (folder / "about.json").write_text("{}")
        (folder / "rows").mkdir()
        (folder / "rows" / "a.npy").write_bytes(b"a")
        (folder / "z.npy").write_bytes(b"z")
    assert order == ["a.npy", "z.npy", "about.json"]
    assert atomic.read_bytes(f"{bucket}/set/rows/a.npy") == b"a"
    with pytest.raises(ConflictError), atomic.staged_folder(f"{bucket}/set", last="about.json") as folder:
        (folder / "about.json").write_text("other")
    assert atomic.read_bytes(f"{bucket}/set/about.json") == b"{}"
