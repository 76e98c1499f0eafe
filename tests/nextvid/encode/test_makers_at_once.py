"""Three makers of one batch at once, with sweep, withdrawal and verify beside them, as users run them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from nextvid.config.project import Project, open_project
from nextvid.encode.plan import accepted_spec
from storage.reader import read_row
from storage.schemas import Clips
from storage.store import LatentStore
from storage.tables import read_table
from tests.factories import make_corpus
from tests.nextvid.encode.small_corpus import FILMS, F, texture, write_corpus, write_video

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1200)]
TRIES = max(1, int(os.environ.get("NEXTVID_TRIES", "200")) // 100)
FILES = 12


def nextvid(project: Project, *words: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "nextvid", *words, "--corpus", str(project.path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: "subprocess.Popen[str]", code: int = 0) -> str:
    out, err = process.communicate(timeout=600)
    assert "Traceback" not in err, err
    assert process.returncode == code, err
    return out


def test_each_row_is_committed_once_and_the_withdrawn_file_is_gone(
    tmp_path: Path, cosine_autoencoder: Path, record_property: Callable[[str, object], None]
) -> None:
    for turn in range(TRIES):
        project = write_corpus(tmp_path / str(turn), cosine_autoencoder)
        folder = tmp_path / str(turn) / "films"
        for number in range(FILES):
            write_video(folder / f"{number:02d}.mp4", texture(100 * turn + number))
        make_corpus(project)
        gone = str(folder / f"{turn % FILES:02d}.mp4")
        makers = [nextvid(project, "make", "latents", "--batch", FILMS) for _ in range(3)]
        beside = [nextvid(project, "withdraw", gone, "--yes"), nextvid(project, "sweep", "--yes")]
        looking = nextvid(project, "verify")
        for process in [*makers, *beside]:
            ended(process)
        out, err = looking.communicate(timeout=600)
        assert looking.returncode in (0, 3), (out, err)  # 3: there was no store yet
        assert ended(nextvid(project, "make", "latents"))
        assert json.loads(ended(nextvid(project, "withdraw", gone, "--yes", "--json")))["done"]
        ended(nextvid(project, "verify"))
        check(open_project(project.path), gone)
    record_property("tries", TRIES)


def check(project: Project, gone: str) -> None:
    clips = read_table(project.root.table("clips", FILMS), Clips)
    store = LatentStore(project.root, accepted_spec(project))
    commits = store.commits(FILMS).filter(pl.col("status") == "ok")
    assert commits["row_id"].n_unique() == commits.height
    withdrawn = set(clips.filter(pl.col("uri") == gone)["row_id"])
    wanted = set(clips.filter((pl.col("status") == "ok") & (pl.col("uri") != gone))["row_id"])
    assert withdrawn
    assert wanted
    assert wanted <= set(commits["row_id"]) <= wanted | withdrawn
    for row in commits.iter_rows(named=True):
        values = read_row(store, FILMS, F, row["part"], row["slot"])
        assert bool(np.any(values)) is (row["row_id"] not in withdrawn)
