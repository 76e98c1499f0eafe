"""Source files as local files: decoders read local paths and never open a URL.

A local file stays where it is; a file of an object store, or one inside an archive, is copied into a folder while it is
read. Errors name the file by its URI, wherever it was read.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TypeVar

from nextvid.video.archives import copy_member, split_uri
from nextvid.video.sandbox import Sandbox
from storage import remote
from storage.digest import digest
from storage.errors import MediaError, NExTVidError

T = TypeVar("T")


@contextmanager
def local_file(uri: str, folder: Path) -> Iterator[Path]:
    """The file as a local path, a copy in `folder` where it is remote. Raises MediaError `unreachable`."""
    path = _fetch(uri, folder)
    try:
        yield path
    except MediaError as error:
        raise MediaError(error.reason, by_uri(str(error), path, uri)) from None
    finally:
        _release(uri, path)


def map_files(
    sandbox: Sandbox,
    function: Callable[..., T],
    files: Iterable[tuple[str, tuple[object, ...]]],
    folder: Path,
    timeout_s: float,
) -> Iterator[tuple[str, Path | None, T | MediaError]]:
    """`function(path, *arguments)` in the sandbox for each (URI, arguments): (URI, path, result or error) as they end.

    A file is copied when its turn comes and removed after its result was taken; one without a copy has no path.
    """
    uris: dict[Path, str] = {}
    failed: list[tuple[str, MediaError]] = []

    def tasks() -> Iterator[tuple[Path, *tuple[object, ...]]]:
        for uri, arguments in files:
            try:
                path = _fetch(uri, folder)
            except MediaError as error:
                failed.append((uri, error))
                continue
            uris[path] = uri
            yield (path, *arguments)

    for (path, *_), result in sandbox.map_unordered(function, tasks(), timeout_s):
        uri = uris.pop(path)
        if isinstance(result, MediaError):
            result = MediaError(result.reason, by_uri(str(result), path, uri))
        yield uri, path, result
        _release(uri, path)
    yield from ((uri, None, error) for uri, error in failed)


def by_uri(message: str, path: Path, uri: str) -> str:
    """A message about the local path, as one that names the URI; FFmpeg writes paths as `file:/...`."""
    said = message.replace(f"file:{path}", uri).replace(str(path), uri)
    return said if uri in said else f"{uri}: {said}"


def _fetch(uri: str, folder: Path) -> Path:
    if _stays(uri):
        return Path(uri.removeprefix("file://"))
    path = folder / (digest(["copy of", uri]) + PurePosixPath(uri).suffix)
    try:
        if split_uri(uri):
            copy_member(uri, path)
        else:
            remote.get_file(uri, str(path))
    except MediaError:
        raise
    except Exception as error:  # object stores raise their clients' own classes
        message = str(error) if isinstance(error, NExTVidError) else f"{uri}: {error!r}"
        raise MediaError("unreachable", f"{message}; list the dataset again or retry later") from error
    return path


def _release(uri: str, path: Path) -> None:
    if not _stays(uri):
        path.unlink(missing_ok=True)


def _stays(uri: str) -> bool:
    """Whether a file is read in place."""
    return remote.is_local(uri) and split_uri(uri) is None
