"""Atomic publication: a file appears whole or not at all. The only module that renames, links or replaces files.

Locally: a temporary name in the same folder, fsync, then rename over the target (hard link where the name must be
new), then fsync of the folder: after a crash a name holds its old bytes or its new ones. On object stores one put is
atomic already, and conditional where the name must be new (remote.py). Temporary names begin with a dot and end with
`.partial`; a killed writer leaves them behind and `remove_leftovers` removes them.
"""

import errno
import io
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from storage import remote
from storage.errors import (
    ConfigError,
    ConflictError,
    DamagedError,
    NExTVidError,
    StoreError,
    UnwritableError,
    UpstreamError,
)
from storage.limits import GO_ON, code_of, limit_met
from storage.remote import is_local

SUFFIX = ".partial"
_FORBIDDEN = {
    errno.EROFS: "is on a read-only file system",
    errno.EACCES: "lets this user write nothing",
    errno.EPERM: "lets this user write nothing",
}
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS}  # what file systems without hard links answer


def publish_bytes(path: str, data: bytes) -> None:
    """Put `data` under `path`, replacing what was there in one step. UnwritableError where nothing may be written."""
    if not is_local(path):
        remote.put(path, data)
        return
    with staged_file(path) as temporary:
        _write(temporary, data)


def create_exclusively(path: str, data: bytes) -> None:
    """Put `data` under `path` if the name is new; else ConflictError, and the bytes of the first stay."""
    if not is_local(path):
        remote.put(path, data, exclusive=True)
        return
    with staged_file(path, exclusive=True) as temporary:
        _write(temporary, data)


def publish_json(path: str, value: object) -> None:
    """Publish strict JSON (no NaN, no infinities), indented, as people read these files."""
    publish_bytes(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def read_bytes(path: str) -> bytes:
    """Bytes under `path`; UpstreamError where there is no file."""
    try:
        return _local(path).read_bytes() if is_local(path) else remote.read(path)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise UpstreamError(f"{path} does not exist: make it first") from error


@contextmanager
def reading(path: str) -> Iterator[tuple[io.RawIOBase | io.BytesIO, int]]:
    """A file to be read once from its beginning to its end, and its size in bytes.

    A local one as it is asked for, unbuffered, so that no more is in memory; an object comes whole. UpstreamError or
    an OSError of the system where it cannot be opened.
    """
    if not is_local(path):
        data = read_bytes(path)
        yield io.BytesIO(data), len(data)
        return
    with io.FileIO(_local(path)) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)  # Linux reads twice as far ahead then
        yield file, os.fstat(file.fileno()).st_size


def read_json(path: str) -> Any:  # noqa: ANN401 - JSON is Any
    """Value of a JSON file; UpstreamError where it is missing, DamagedError where it is not JSON."""
    data = read_bytes(path)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path} is not JSON ({error}): restore it, or remove it and make it again") from error


def exists(path: str) -> bool:
    """Whether `path` is a file or folder."""
    if is_local(path):
        return _local(path).exists()
    try:
        remote.ask(path, lambda fs, key: fs.info(key))
    except FileNotFoundError:
        return False
    return True


@contextmanager
def staged_file(path: str, *, exclusive: bool = False) -> Iterator[Path]:
    """A temporary local file that becomes `path` when the block ends well and vanishes when it does not.

    The block writes and closes the file; bytes and folder are synced here. With `exclusive` a taken name is a
    ConflictError, a place where nothing may be written or nothing has room an UnwritableError. Any other OSError of the
    system (a broken disk) passes through. The old bytes are untouched.
    """
    if not is_local(path):
        with tempfile.TemporaryDirectory(prefix="nextvid-") as folder, writing(f"{folder}/staged"):
            temporary = Path(folder) / "staged"
            yield temporary
            remote.put(path, temporary, exclusive=exclusive)
        return
    target = _local(path)
    with writing(path):
        make_folder(target.parent)
        temporary = _temporary(target)
        try:
            yield temporary
            _sync(temporary)
            if exclusive:
                _link(temporary, target)
            else:
                os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        _sync(target.parent)


def publish_file(temporary: Path, target: Path) -> None:
    """Give a local file that is complete its name, replacing what was there in one step; both in one folder."""
    _sync(temporary)
    os.replace(temporary, target)
    _sync(target.parent)


@contextmanager
def written_aside(path: str, pieces: Iterable[bytes | memoryview]) -> Iterator[Callable[[], None]]:
    """Write a local file under a temporary name, synced; gives what publishes it as `path`, a name that must be new.

    For files that are large, so that a lock need be held for their name alone. Errors as of `staged_file`.
    """
    target = _local(path)
    with writing(path):
        make_folder(target.parent)
        temporary = _temporary(target)
        try:
            with naming(temporary), temporary.open("xb") as file:
                for piece in pieces:
                    file.write(piece)
            _sync(temporary)

            def publish() -> None:
                _link(temporary, target)
                _sync(target.parent)

            yield publish
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def staged_folder(path: str, *, last: str | None = None, over: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its name when the block ends well; ConflictError if it is taken.

    On object stores, which know no folders, the file `last` makes it: it is created after all others, and readers
    look for that file. What a dead writer left of the others is written over. With `over`, an existing folder keeps
    its name: its files are replaced one by one, `last` at the end, and others stay.
    """
    if not is_local(path):
        if last is None:
            raise ConfigError(f"{path} is on an object store: this folder must be on a file system")
        with tempfile.TemporaryDirectory(prefix="nextvid-") as folder:
            with writing(f"{folder}/staged"):
                yield Path(folder)
            if not over and exists(f"{path}/{last}"):
                raise ConflictError(f"{path} exists already")
            for name in _names(Path(folder), last):
                remote.put(f"{path}/{name}", Path(folder, name), exclusive=name == last and not over)
        return
    target = _local(path)
    if target.exists() and not over:
        raise ConflictError(f"{path} exists already")
    with writing(path):
        make_folder(target.parent)
        temporary = _temporary(target)
        temporary.mkdir()
        try:
            yield temporary
            for folder, _, names in os.walk(temporary, topdown=False):
                for name in names:
                    _sync(Path(folder, name))
                _sync(Path(folder))
            if over and target.exists():
                assert last is not None, "the file that says that all others are there"
                _replace_files(temporary, target, last)
            else:
                try:
                    os.rename(temporary, target)
                except OSError as error:
                    if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                        raise ConflictError(f"{target} was created by somebody else in the meantime") from error
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        _sync(target.parent)


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """An OSError of the system in the block names `path`: calls on open files name none."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def writing(path: str) -> Iterator[None]:
    """Whatever the block does to write `path`: UnwritableError where the system forbids it or has no room.

    What it forbids elsewhere, such as reading a file of somebody else's, passes through.
    """
    try:
        yield
    except NExTVidError:
        raise
    except Exception as error:  # of any library that writes the file
        target = _local(path)
        folder = next(above for above in target.parents if above.exists() or above == above.parent)
        named = error.filename if isinstance(error, OSError) else None
        here = named is None or Path(named).is_relative_to(folder)
        if here and (why := _FORBIDDEN.get(code_of(error) or 0)):
            raise UnwritableError(
                f"{path} cannot be written: {folder} {why}. Make it writable for this user, or name another folder, "
                f"{GO_ON}"
            ) from error
        if (met := limit_met(error, path if here else str(named))) is not None:
            raise met from error
        raise


def zero(path: str, extents: Sequence[tuple[int, int]]) -> None:
    """Zero these (offset, size) in bytes of a file, in place: the one exception to write-once (withdrawn media)."""
    if not is_local(path):
        data = bytearray(remote.read(path))
        for offset, size_bytes in extents:
            data[offset : offset + size_bytes] = bytes(size_bytes)
        remote.put(path, bytes(data))
        return
    with writing(path), _local(path).open("r+b") as file:
        for offset, size_bytes in extents:
            file.seek(offset)
            file.write(bytes(size_bytes))
        file.flush()
        os.fsync(file.fileno())


def is_temporary(path: str) -> bool:
    """Whether a path is the temporary name of what is being written, or was."""
    name = path.rpartition("/")[2]
    return name.startswith(".") and name.endswith(SUFFIX)


def leftovers(folder: str, older_than_s: float) -> list[str]:
    """Temporary files and folders under `folder` untouched for `older_than_s`; their paths, sorted."""
    if not is_local(folder):
        return []  # puts leave none
    newest_kept = time.time() - older_than_s
    found = []
    for place, folders, names in os.walk(_local(folder)):
        temporary = [name for name in [*folders, *names] if is_temporary(name)]
        folders[:] = [name for name in folders if name not in temporary]
        for path in (Path(place, name) for name in temporary):
            last_touched_s = 0.0  # where it vanished meanwhile
            with suppress(FileNotFoundError):
                last_touched_s = max(inside.lstat().st_mtime for inside in [path, *path.rglob("*")])
            found += [str(path)] if last_touched_s <= newest_kept else []
    return sorted(found)


def remove_leftovers(folder: str, older_than_s: float) -> list[str]:
    """Remove what `leftovers` finds; the paths removed, sorted."""
    removed = leftovers(folder, older_than_s)
    for path in removed:
        remove_tree(path)
    return removed


def remove_tree(path: str) -> None:
    """Remove a file or a whole folder, for sweeps and leftover files only. A missing path is no error."""
    if not is_local(path):
        with suppress(FileNotFoundError):
            remote.ask(path, lambda fs, key: fs.rm(key, recursive=True))
        return
    target = _local(path)
    with writing(path):
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)


def _local(path: str) -> Path:
    return Path(path.removeprefix("file://"))


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(6)}{SUFFIX}")


def _write(path: Path, data: bytes) -> None:
    """All of `data` into a new file, with the modes of the umask; os.write may take less than it is given."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        left = memoryview(data)
        with naming(path):
            while left:
                left = left[os.write(file, left) :]
    finally:
        os.close(file)


def _sync(path: Path) -> None:
    """Force a file's bytes, or a folder's names, to the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(file)
    finally:
        os.close(file)


def make_folder(folder: Path) -> None:
    """Folder and its parents, each new name synced: a file in a folder that a crash forgets is lost too."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync(folder.parent)


def _replace_files(temporary: Path, target: Path, last: str) -> None:
    """Every file of one folder into the other, the one named `last` once the others are safely on disk."""
    for name in _names(temporary, last):
        if name == last:
            _sync(target)
        make_folder((target / name).parent)
        os.replace(temporary / name, target / name)
    _sync(target)


def _link(temporary: Path, target: Path) -> None:
    try:
        os.link(temporary, target)  # fails where the name is taken, unlike a rename
    except FileExistsError as error:
        raise ConflictError(f"{target} exists already: somebody else was first") from error
    except OSError as error:
        if error.errno in _NO_LINKS:
            message = f"{target.parent} is on a file system without hard links: choose another folder as root"
            raise StoreError(message) from error
        raise


def _names(folder: Path, last: str) -> list[str]:
    """Every file below a folder, sorted, but for the one named `last`, which comes at the end."""
    names = [str(found.relative_to(folder)) for found in sorted(folder.rglob("*")) if found.is_file()]
    assert last in names, f"{last} is not among {names}"
    return sorted(names, key=lambda name: name == last)
