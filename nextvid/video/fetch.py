"""Source files as local files: decoders read local paths and never open a URL.

A local file stays where it is; a file of an object store is copied into a folder while it is read.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import fsspec

from storage.digest import digest
from storage.errors import MediaError
from storage.remote import is_local


@contextmanager
def local_file(uri: str, folder: Path) -> Iterator[Path]:
    """The file as a local path, a copy in `folder` where it is remote. Raises MediaError `unreachable`."""
    path = fetch(uri, folder)
    try:
        yield path
    finally:
        release(uri, path)


def fetch(uri: str, folder: Path) -> Path:
    """As `local_file`, for callers that release it themselves."""
    if is_local(uri):
        return Path(uri.removeprefix("file://"))
    fs, key = fsspec.core.url_to_fs(uri)
    path = folder / (digest(["copy of", uri]) + PurePosixPath(key).suffix)
    try:
        fs.get_file(key, str(path))
    except Exception as error:  # object stores raise their clients' own classes
        raise MediaError("unreachable", f"{uri}: {error!r}; list the dataset again or retry later") from error
    return path


def release(uri: str, path: Path) -> None:
    """Remove the copy, if `path` is one."""
    if not is_local(uri):
        path.unlink(missing_ok=True)
