"""Folders under a digest, on file systems and in buckets, whenever a maker is killed; and the pointer to the newest."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nextvid.making.outcome import Check
from nextvid.making.publishing import addressed, publish_latest, read_latest
from storage import atomic, listing, remote
from storage.errors import ConflictError, TableError, UpstreamError
from storage.root import DataRoot
from storage.tables import require_checks

DIGEST = "ab" * 16
NAMES = ("duplicates.json", "duplicates.parquet")


@pytest.fixture(params=["file system", "bucket"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> DataRoot:
    """fsspec's memory file system stands for the bucket."""
    url = str(tmp_path / "data") if request.param == "file system" else f"memory://{tmp_path.name}"
    return DataRoot.open(url, str(tmp_path / "runs"))


def fill(root: DataRoot, *, passed: bool = True, killed_after: int | None = None) -> bool:
    """Make `duplicates` by hand, or be killed after so many files; whether there was something to do."""
    with addressed(root, "duplicates", DIGEST) as made:
        if made.new:
            for number, name in enumerate(NAMES):
                if number == killed_after:
                    os.kill(os.getpid(), signal.SIGKILL)
                atomic.publish_bytes(f"{made.path}/{name}", b"content")
            if killed_after == len(NAMES):
                os.kill(os.getpid(), signal.SIGKILL)
            made.checks = (Check("rows", passed, {"rows": 2}), Check("pixels", False))
    assert made.passed == passed
    return made.new


def ready(root: DataRoot) -> bool:
    """Whether a reader takes the folder for data."""
    try:
        require_checks(f"{root.pointed('duplicates', DIGEST)}/checks.json", "duplicates")
    except UpstreamError:
        return False
    return True


def test_a_folder_is_filled_once_and_comes_back_with_its_checks(root: DataRoot) -> None:
    assert fill(root)
    folder = root.pointed("duplicates", DIGEST)
    assert listing.files(folder) == ["checks.json", *NAMES]
    assert not fill(root)
    with addressed(root, "duplicates", DIGEST) as made:
        assert (made.path, made.new, made.passed) == (folder, False, True)
        assert made.checks == (Check("rows", True, {"rows": 2}), Check("pixels", False))


def test_what_failed_its_checks_is_kept_and_read_by_nobody(root: DataRoot) -> None:
    fill(root, passed=False)
    assert not ready(root)
    assert not fill(root, passed=False)


@pytest.mark.parametrize("killed_after", [0, 1, 2])
def test_a_maker_that_is_killed_leaves_no_data_and_the_next_one_makes_all(tmp_path: Path, killed_after: int) -> None:
    root = DataRoot.open(str(tmp_path))
    code = f"from tests.nextvid.making.test_publishing import fill, DataRoot; fill(DataRoot.open({str(tmp_path)!r}), "
    child = subprocess.run([sys.executable, "-c", f"{code}killed_after={killed_after})"], check=False)
    assert child.returncode == -signal.SIGKILL
    assert not ready(root)
    assert listing.folders(f"{root.url}/duplicates", "[0-9a-f]+") == [], "what it left has a temporary name"
    assert fill(root)
    assert ready(root)


@pytest.mark.parametrize("sent", [0, 1, 2])
def test_an_upload_that_stops_leaves_no_data_and_the_next_one_sends_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: int
) -> None:
    root = DataRoot.open(f"memory://{tmp_path.name}", str(tmp_path))
    count, put = [0], remote.put

    def stopping(path: str, source: bytes | Path, *, exclusive: bool) -> None:
        if count[0] == sent:
            raise KeyboardInterrupt
        count[0] += 1
        put(path, source, exclusive=exclusive)

    with monkeypatch.context() as patched:
        patched.setattr(remote, "put", stopping)
        with pytest.raises(KeyboardInterrupt):
            fill(root)
    assert not ready(root)
    assert fill(root)
    assert ready(root)
    assert listing.files(root.pointed("duplicates", DIGEST)) == ["checks.json", *NAMES]


def test_of_two_makers_at_once_the_slower_one_takes_what_the_other_made(root: DataRoot) -> None:
    with addressed(root, "duplicates", DIGEST) as slow:
        assert slow.new
        assert fill(root)
        atomic.publish_bytes(f"{slow.path}/duplicates.json", b"content")
        slow.checks = (Check("rows", True, {"rows": 2}),)
    assert ready(root)
    assert not fill(root)


def test_a_conflict_that_no_other_maker_explains_is_told(root: DataRoot) -> None:
    with pytest.raises(ConflictError, match="elsewhere"), addressed(root, "duplicates", DIGEST):
        raise ConflictError("elsewhere")


def test_a_pointer_moves_and_is_written_only_then(tmp_path: Path) -> None:
    root = DataRoot.open(str(tmp_path))
    assert read_latest(root, "duplicates") is None
    publish_latest(root, "duplicates", "ab" * 16)
    assert read_latest(root, "duplicates") == "ab" * 16
    assert read_latest(root, "trainset") is None
    before = Path(root.latest("duplicates")).stat().st_ino
    publish_latest(root, "duplicates", "ab" * 16)
    assert Path(root.latest("duplicates")).stat().st_ino == before
    publish_latest(root, "duplicates", "cd" * 16)
    assert read_latest(root, "duplicates") == "cd" * 16


def test_a_damaged_pointer_is_an_error(tmp_path: Path) -> None:
    root = DataRoot.open(str(tmp_path))
    path = Path(root.latest("trainset"))
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    with pytest.raises(TableError, match="names no digest"):
        read_latest(root, "trainset")
