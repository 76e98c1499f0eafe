"""A folder in which the system lets nothing be written, as on a disk mounted read-only; also for root, whom modes let.

Injected at the calls of the system that this package writes with. A real mount: test_read_only.py.
"""

import builtins
import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


@contextmanager
def read_only(folder: Path | str, code: int = errno.EROFS) -> Iterator[list[str]]:
    """Refuse every write at or below the folder; what was refused, by call and path."""
    top, refused = Path(folder).absolute(), list[str]()

    def forbid(call: str, path: object) -> None:
        if isinstance(path, (str, os.PathLike)) and Path(path).absolute().is_relative_to(top):
            refused.append(f"{call} {path}")
            raise OSError(code, os.strerror(code), os.fspath(path))

    def guarded(call: str, real: Callable[..., Any], places: tuple[int, ...]) -> Callable[..., Any]:
        def calls(*args: Any, **kwargs: Any) -> Any:
            for place in places:
                if call != "unlink" or os.path.lexists(args[place]):  # what is not there is told first
                    forbid(call, args[place])
            return real(*args, **kwargs)

        return calls

    real_open, real_file = os.open, builtins.open

    def low(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & _WRITES:
            forbid("open", path)
        return real_open(path, flags, *args, **kwargs)

    def high(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if set(mode) & set("wax+"):
            forbid("open", path)
        return real_file(path, mode, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        for call, places in {
            "mkdir": (0,),
            "link": (0, 1),
            "rename": (0, 1),
            "replace": (0, 1),
            "unlink": (0,),
        }.items():
            patch.setattr(os, call, guarded(call, getattr(os, call), places))
        patch.setattr(os, "open", low)
        patch.setattr(io, "open", high)
        patch.setattr(builtins, "open", high)
        yield refused


def tree(folder: Path | str) -> dict[str, bytes | None]:
    """Every name below a folder, with a file's bytes."""
    found = sorted(Path(folder).rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in found}
