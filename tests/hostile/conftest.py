"""What attacks share: a child process whose time and memory are measured, and names of every sort."""

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

ENDS_WITHIN_S = 300.0  # on a busy machine; idle ones take seconds
NAMES = {
    "colour": "a\x1b[31mred\x1b[0m.mp4",
    "link": "\x1b]8;;http://127.0.0.1:9/\x1b\\click\x1b]8;;\x1b\\.mp4",
    "title": "\x1b]0;owned\x07.mp4",
    "8 bit code": "a\x9b31m.mp4",
    "line": "a\nwarning: all is lost.mp4",
    "carriage": "good.mp4\rbad.mp4",
    "tab": "a\tb.mp4",
    "backwards": "a\u202e4pm.exe.mp4",
    "isolate": "a\u2066b\u2069.mp4",
    "no width": "a\u200bb\ufeff.mp4",
    "paragraph": "a\u2029b.mp4",
    "tag": "<script>alert(1)<|script>.mp4".replace("|", "\u2215"),
    "picture": "<img src=x onerror=alert(1)>.mp4",
    "quotes": "\"><b>'&lt;`.mp4",
    "markdown": "![x](http:\u2215\u2215127.0.0.1:9) [y](javascript:1) | *z* `.mp4",
    "formula": "=cmd|' ∕C calc'!A0.mp4",
    "mathematics": "$\\frac{$.mp4",
    "braces": "{{ 7 * 7 }} %s {0} ${PATH}.mp4",
    "long": "x" * 251 + ".mp4",
    "letters": "Ünïcödé 中文 🎬.mp4",
}


class Ended(NamedTuple):
    """A process that came to its end."""

    code: int
    out: str
    err: str
    peak_bytes: int  # largest resident memory of it and its children


MEASURED = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[2:], stdin=subprocess.DEVNULL, check=False)
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
open(sys.argv[1], "w").write(str(peak))
sys.exit(done.returncode)
"""

Measured = Callable[..., Ended]


@pytest.fixture
def measured(tmp_path: Path, repository: Path) -> Measured:
    """Runs `python ...` as a process of its own within an address space, and says what it took."""

    def run(*arguments: str, most_bytes: int = 8 << 30) -> Ended:
        note = tmp_path / "peak.txt"
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, str(note), sys.executable, *arguments],
            capture_output=True,
            text=True,
            errors="surrogateescape",
            check=False,
            cwd=repository,
            timeout=ENDS_WITHIN_S,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (most_bytes, most_bytes)),
        )
        return Ended(done.returncode, done.stdout, done.stderr, json.loads(note.read_text()))

    return run
