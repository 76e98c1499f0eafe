"""What the sandbox does to a file before any clip is cut: its id and its facts, then the first pass.

The sandbox's processes import this module, so it imports no tables: polars would cost each process half a second.
"""

from dataclasses import dataclass
from pathlib import Path

from nextvid.config.curation import ShotConfig
from nextvid.video.probe import MediaFacts, probe
from nextvid.video.shots import ShotFacts, first_pass
from storage.digest import digest_file
from storage.errors import MediaError


@dataclass(frozen=True)
class Inspection:
    """A file's id in hex, its size, and its facts or the reason why there are none."""

    media: str
    size_bytes: int
    facts: MediaFacts | None
    reason: str | None = None
    error: str | None = None


def inspect_file(path: Path) -> Inspection:
    """Digest and probe a local file. Raises MediaError only where not even its bytes can be read."""
    media, size_bytes = identify(path)
    try:
        return Inspection(media, size_bytes, probe(path))
    except MediaError as error:
        return Inspection(media, size_bytes, None, error.reason, str(error))


def identify(path: Path) -> tuple[str, int]:
    """A file's id in hex and its size in bytes. Raises MediaError."""
    try:
        return digest_file(path), path.stat().st_size
    except FileNotFoundError:
        raise MediaError("missing", f"{path}: no such file; list the dataset again") from None
    except OSError as error:
        raise MediaError("unreadable", f"{path}: {error}") from None


@dataclass(frozen=True)
class Viewing:
    """One first pass: a local file, what is known of it, and how it is cut."""

    path: Path
    facts: MediaFacts
    config: ShotConfig


def view_file(viewing: Viewing) -> list[ShotFacts]:
    """The first pass over a file. Raises MediaError."""
    return first_pass(viewing.path, viewing.facts, viewing.config)
