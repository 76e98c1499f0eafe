"""Encoders that run in processes of their own, to be killed or to race (tests/forked.py calls them by name)."""

import os
import sys
import time
from pathlib import Path

from nextvid.config.project import open_project
from nextvid.encode.latents import make_latents
from tests.nextvid.encode.conftest import shards_of_four
from tests.nextvid.encode.small_corpus import FILMS

SYNC_S = 0.01  # what a disk takes to force bytes down, so that names are on their way for a part of the time


def encode(corpus: str) -> None:
    """Make the latents and the pixels of the films, in shards of four rows, on a disk that syncs slowly."""
    real = os.fsync

    def fsync(file: int) -> None:
        time.sleep(SYNC_S)
        real(file)

    os.fsync = fsync  # type: ignore[assignment]
    with shards_of_four():
        make_latents(open_project(corpus), FILMS)


def race(corpus: str, start: str) -> None:
    """Make the latents of the films in shards of four rows, once the file `start` is there."""
    project = open_project(corpus)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while not Path(start).exists():
        time.sleep(0.001)
    with shards_of_four():
        make_latents(project, FILMS)


if __name__ == "__main__":
    race(*sys.argv[1:])
