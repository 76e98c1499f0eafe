"""A disk that may only be read: one error with place, cause and remedy, nothing half-written, and reading goes on."""

import errno
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from storage import atomic
from storage.errors import UnwritableError
from storage.root import DataRoot
from storage.store import LatentStore
from tests.storage.pixel_stores import pixel_store, write_pixels
from tests.storage.read_only import read_only, tree
from tests.storage.stores import BATCH, FRAMES, full_store, ids, new_store, spec, write

CODES = {"EROFS": errno.EROFS, "EACCES": errno.EACCES}


def stage(path: str) -> None:
    with atomic.staged_folder(path):
        pytest.fail("the block ran")


WRITES: dict[str, Callable[[str], object]] = {
    "publish": lambda folder: atomic.publish_bytes(f"{folder}/old", b"new"),
    "publish new": lambda folder: atomic.publish_bytes(f"{folder}/a/b/c", b"new"),
    "create": lambda folder: atomic.create_exclusively(f"{folder}/fresh", b"new"),
    "json": lambda folder: atomic.publish_json(f"{folder}/x.json", {}),
    "folder": lambda folder: stage(f"{folder}/a/b"),
    "zero": lambda folder: atomic.zero(f"{folder}/old", [(0, 1)]),
    "remove": lambda folder: atomic.remove_tree(f"{folder}/old"),
}


@pytest.mark.parametrize("code", CODES.values(), ids=CODES)
@pytest.mark.parametrize("act", WRITES.values(), ids=WRITES)
def test_every_way_to_write(tmp_path: Path, act: Callable[[str], object], code: int) -> None:
    (tmp_path / "old").write_bytes(b"old")
    before = tree(tmp_path)
    with read_only(tmp_path, code) as refused, pytest.raises(UnwritableError, match="cannot be written") as caught:
        act(str(tmp_path))
    assert refused
    assert str(tmp_path) in str(caught.value)
    assert ("read-only file system" if code == errno.EROFS else "lets this user write nothing") in str(caught.value)
    assert "another folder" in str(caught.value)
    assert isinstance(caught.value, OSError)  # for callers who know nothing of us
    assert tree(tmp_path) == before


def test_what_is_forbidden_elsewhere_is_not_blamed_on_the_target(tmp_path: Path) -> None:
    """A block that may not read its input says so."""

    def act() -> None:
        with atomic.staged_file(str(tmp_path / "out" / "file")):
            raise PermissionError(errno.EACCES, "Permission denied", "/elsewhere/input")

    with pytest.raises(PermissionError, match="/elsewhere/input") as caught:
        act()
    assert not isinstance(caught.value, UnwritableError)


def test_a_shard_its_plan_and_its_spec(data_root: DataRoot) -> None:
    """The store's own writes, latents and pixels; mended, the same calls go on."""
    Path(data_root.url).mkdir(parents=True)
    with read_only(data_root.url), pytest.raises(UnwritableError, match=r"spec\.json cannot be written"):
        new_store(data_root)
    assert tree(data_root.url) == {}
    store = new_store(data_root)
    pixels, _ = pixel_store(data_root, 3)
    before = tree(data_root.url)
    with read_only(data_root.url):
        with pytest.raises(UnwritableError, match=f"/{BATCH}/f{FRAMES}/0000 cannot be written"):
            store.plan_part(BATCH, FRAMES, ids(5))
        with pytest.raises(UnwritableError, match=f"/{BATCH}/f{FRAMES}/0001 cannot be written"):
            pixels.plan_part(BATCH, FRAMES, ids(5, first=50))
    assert tree(data_root.url) == before
    part, twin = store.plan_part(BATCH, FRAMES, ids(5)), pixels.plan_part(BATCH, FRAMES, ids(5, first=50))
    planned = tree(data_root.url)
    with read_only(data_root.url):
        for act in (lambda: write(part, 0), lambda: write_pixels(twin, 0)):
            with pytest.raises(UnwritableError, match=r"cannot be written.*read-only file system"):
                act()
    assert tree(data_root.url) == planned
    write(part, 0)
    write_pixels(twin, 0)
    assert store.verify() == pixels.verify() == []


def test_what_stands_is_read_and_verified(data_root: DataRoot) -> None:
    full_store(data_root, 5)
    before = tree(data_root.url)
    with read_only(data_root.url):
        store = new_store(data_root)  # created already
        assert store.verify() == []
        assert LatentStore.open(data_root, spec().digest()).commits(BATCH).height == 5
        with pytest.raises(UnwritableError):
            store.part(BATCH, FRAMES, 0).erase([0])
        with pytest.raises(UnwritableError):
            store.part(BATCH, FRAMES, 0).discard(0)
    assert tree(data_root.url) == before


WRITER = """
import sys
from storage.errors import UnwritableError
from storage.root import DataRoot
from tests.storage.stores import BATCH, FRAMES, ids, new_store, write
store = new_store(DataRoot.open(sys.argv[1]))
for act in (lambda: write(store.part(BATCH, FRAMES, 1), 0), lambda: store.plan_part(BATCH, FRAMES, ids(5, 99))):
    try:
        act()
    except UnwritableError as error:
        print(error)
print(store.verify())
"""


def test_a_real_mount(data_root: DataRoot, repository: Path) -> None:
    """The kernel itself refuses: the folder mounted read-only in a namespace of its own."""
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-Urm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system gives no namespaces to mount in")
    store, _ = full_store(data_root, 5)
    store.plan_part(BATCH, FRAMES, ids(3, first=50))
    before = tree(data_root.url)
    mounted = f'mount --bind {data_root.url} {data_root.url} && mount -o remount,bind,ro {data_root.url} && exec "$@"'
    command = [unshare, "-Urm", "sh", "-c", mounted, "sh", sys.executable, "-c", WRITER, data_root.url]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    locked, planned, problems = done.stdout.splitlines()
    assert f"/f{FRAMES}/0001/" in locked
    assert "cannot be written" in locked
    assert "0002 cannot be written" in planned
    assert "is on a read-only file system. Make it writable" in locked
    assert problems == "[]"
    assert tree(data_root.url) == before
