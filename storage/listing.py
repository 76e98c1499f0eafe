"""Listings of folders, in a file system or in a bucket: names and sizes, not contents.

A folder that does not exist is an empty one; one that cannot be listed is an error, never an empty one.
"""

import os
import re
import stat
from contextlib import suppress
from pathlib import Path

from storage import remote
from storage.errors import StoreError
from storage.remote import is_local


def folders(folder: str, pattern: str) -> list[str]:
    """Names of the sub-folders that match; temporary ones never do. Sorted."""
    return sorted(name for name, is_folder, _ in _entries(folder) if is_folder and re.fullmatch(pattern, name))


def files(folder: str, pattern: str = ".*") -> list[str]:
    """Names of the files directly in a folder that match, sorted."""
    return list(sizes(folder, pattern))


def sizes(folder: str, pattern: str = ".*") -> dict[str, int | None]:
    """Size in bytes by name of the files directly in a folder that match, by one listing.

    None on a file system, where each size would cost a call.
    """
    found = {name: size for name, is_folder, size in _entries(folder) if not is_folder}
    return {name: size for name, size in sorted(found.items()) if re.fullmatch(pattern, name)}


def files_below(folder: str) -> dict[str, int]:
    """Path and size in bytes of every file below a folder; what is removed while it is listed may be there or not."""
    if is_local(folder):
        found: dict[str, int] = {}
        for place, _, names in os.walk(folder, onerror=_refuse_unlisted):
            for path in (f"{place}/{name}" for name in names):
                with suppress(FileNotFoundError):  # a writer gave it another name meanwhile
                    status = Path(path).stat()
                    found |= {path: status.st_size} if stat.S_ISREG(status.st_mode) else {}
        return dict(sorted(found.items()))
    protocol = folder.partition("://")[0]
    try:
        entries = remote.ask(folder, lambda fs, key: fs.find(key, detail=True))
    except FileNotFoundError:
        return {}
    if not entries:
        remote.refuse_missing_bucket(folder)
    return {f"{protocol}://{str(key).lstrip('/')}": int(info["size"]) for key, info in sorted(entries.items())}


def size_bytes(path: str) -> int | None:
    """Size of a file; None where there is none."""
    try:
        if is_local(path):
            place = Path(path.removeprefix("file://"))
            return None if place.is_dir() else place.stat().st_size
        found = remote.ask(path, lambda fs, key: fs.info(key))
        return None if found["type"] == "directory" else int(found["size"])
    except FileNotFoundError:
        return None


def untrue(what: str) -> StoreError:
    """The error for a listing that is not of this moment; `what` it says and what is."""
    return StoreError(
        f"{what}: the object store's listings are not of this moment. Nothing is damaged: run again, and if it stays "
        "so, use a store whose listings are exact"
    )


def _refuse_unlisted(error: OSError) -> None:
    """Raise, but for a folder that is not there."""
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise error


def _entries(folder: str) -> list[tuple[str, bool, int | None]]:
    """(name, whether it is a folder, size in bytes in a bucket) of what is directly in a folder."""
    if is_local(folder):
        # scandir knows what is a folder without a call per entry
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder.removeprefix("file://")) as found:
            return [(entry.name, entry.is_dir(), None) for entry in found]
        return []
    try:
        key, found = remote.ask(folder, lambda fs, key: (key.strip("/"), fs.ls(key, detail=True)))
    except (FileNotFoundError, NotADirectoryError):
        return []
    named = [(str(entry["name"]).strip("/"), entry) for entry in found]
    return [  # without a folder's own marker
        (name.rsplit("/", 1)[-1], entry["type"] == "directory", entry["size"]) for name, entry in named if name != key
    ]
