"""The pointer to the newest complete thing."""

from pathlib import Path

import pytest

from nextvid.making.publishing import publish_latest, read_latest
from storage.errors import TableError
from storage.root import DataRoot


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
    path.write_text("[]")
    with pytest.raises(TableError, match="names no digest"):
        read_latest(root, "trainset")
