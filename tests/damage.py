"""Kinds of files under a root, and kinds of damage to them, for the tests that every damage is found and told."""

import re
from collections.abc import Callable
from pathlib import Path

from tests.factories import flip

# What no reader of ours opens: curves of other programs, logs, pages of reports, and locks.
NOT_OURS = re.compile(r"/tensorboard/|/lock$|\.(log|html|md)$")


def kinds(root: Path) -> dict[str, list[Path]]:
    """Files by kind: the path without digests, runs, steps and batches."""
    found: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("*")):
        name = re.sub(r"[0-9a-f]{12,32}|\d{4,}|pets|stills", "*", path.relative_to(root).as_posix())
        if path.is_file() and not NOT_OURS.search(f"/{name}"):
            found.setdefault(name, []).append(path)
    return found


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zeroed(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def other_type(path: Path) -> None:
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))


def list_of_nothing(path: Path) -> None:
    path.write_text("[]")


def no_keys(path: Path) -> None:
    path.write_text("{}")


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def flipped(path: Path) -> None:
    flip(path, path.stat().st_size // 2)


def swapped(path: Path) -> None:
    """Another with the same ending in its place."""
    others = [each for each in path.parents[2].rglob(f"*{path.suffix}") if each.is_file()]
    data = path.read_bytes()
    path.write_bytes(next((new for each in sorted(others) if (new := each.read_bytes()) != data), b""))


DAMAGE: tuple[Callable[[Path], None], ...] = (
    cut, zeroed, other_type, list_of_nothing, no_keys, folder, flipped, swapped,
)  # fmt: skip
