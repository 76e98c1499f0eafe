"""What runs inside a sandbox's process: its limits, and each task turned into a plain outcome.

It imports what tasks need once, before memory is limited. Limits are relative to what the libraries take at the start,
since the address space of an idle process differs by machine.
"""

import errno
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path

import av
import numpy as np

from storage.errors import MediaError
from storage.limits import causes, code_of, limit_met

OPEN_FILES = 256  # our measurement: 11 are open during a decode; the rest is room for libraries
_LOWER: set[int] = set()  # limits that whoever started us set below what a task may need


@dataclass(frozen=True)
class Outcome:
    """What a task came to: a value, or the reason and message of a MediaError."""

    value: object = None
    reason: str | None = None
    message: str = ""


def limit(memory_bytes: int, output_bytes: int) -> None:
    """Import the decoders, then bound this process: memory beyond now, open files, size of files, no core dumps."""
    import cv2

    from nextvid.video import decode, shots

    assert {decode, shots}, "imported here so that a task costs milliseconds, not their import"
    cv2.setNumThreads(1)  # a worker has one core
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else 0
    ceiling = pages * resource.getpagesize() + memory_bytes
    for kind, wanted in (
        (resource.RLIMIT_AS, ceiling),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_FSIZE, output_bytes),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        if allowed < wanted:
            _LOWER.add(kind)
        resource.setrlimit(kind, (allowed, allowed))


def run(function: Callable[..., object], args: tuple[object, ...], output_bytes: int) -> Outcome:
    """Call `function`; what a file can provoke becomes an outcome, a programmer's mistake is raised as it is.

    Raises UnwritableError or MachineError where a limit of this machine is behind it: no file is to blame for that.
    """
    try:
        value = function(*args)
    except (AssertionError, TypeError, NameError, AttributeError, ImportError):
        raise
    except Exception as error:
        if _of_the_machine(error) and (met := limit_met(error)) is not None:
            raise met from error
        if isinstance(error, MediaError):
            return Outcome(reason=error.reason, message=str(error))
        if isinstance(error, MemoryError):
            return Outcome(reason="memory", message="needs more memory than a sandbox allows")
        reason = "memory" if "Insufficient memory" in str(error) else "failed"  # OpenCV's words for it
        return Outcome(reason=reason, message=f"{type(error).__name__}: {error}")
    if (size := _size(value)) > output_bytes:
        return Outcome(
            reason="too_large", message=f"the result has {size} bytes; a sandbox returns at most {output_bytes}"
        )
    return Outcome(value=value)


def _of_the_machine(error: Exception) -> bool:
    """Whether a task failed by what the machine gives, not by what its file makes of the limits set here."""
    for found in causes(error):
        code = code_of(found)
        if code in (errno.ENOSPC, errno.EDQUOT) and not isinstance(found, av.FFmpegError):
            return True  # FFmpeg's decoders say ENOSPC of what is in a file
        if code == errno.ENFILE or (code == errno.EMFILE and resource.RLIMIT_NOFILE in _LOWER):
            return True
        if code == errno.ENOMEM and resource.RLIMIT_AS in _LOWER:
            return True
    return False


def _size(value: object) -> int:
    """Bytes of the arrays, strings and byte strings within a result."""
    match value:
        case np.ndarray():
            return value.nbytes
        case bytes() | bytearray() | str():
            return len(value)
        case list() | tuple() | set() | frozenset():
            return sum(_size(item) for item in value)
        case dict():
            return sum(_size(key) + _size(item) for key, item in value.items())
        case _ if is_dataclass(value) and not isinstance(value, type):
            return sum(_size(getattr(value, field.name)) for field in fields(value))
        case _:
            return 8  # a number
