"""One small labelled corpus, made and curated once a session; tests that change something work on a copy."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nextvid.config.project import Project
from nextvid.making.outcome import Outcome
from tests.factories import edit_project, make_corpus, write_project
from tests.nextvid.corpus.small_media import FPS, scene, write_film, write_picture

POLICY = {"frames": 4, "fps": 4}
LABELS = """path,action,split,person,start_s,end_s
one.mp4,walk,train,anna,0,2
one.mp4,jump,train,anna,2,4
two.mp4,walk,test,ben,,
three.mp4,jump,train,cleo,,
"""


@dataclass(frozen=True)
class Made:
    """A project, where its files are, and what the first call of each maker said of the films."""

    project: Project
    folder: Path
    outcomes: dict[str, Outcome]


def films_of(folder: Path) -> dict[str, Any]:
    """The dataset of films as corpus.yaml says it."""
    return {
        "uri": str(folder / "films"),
        "weight": 1.0,
        "clips": [{**POLICY, "crop": "random", "views": 2, "flip": True}],
        "labels": {
            "layout": "csv",
            "file": str(folder / "labels.csv"),
            "targets": {"action": "action"},
            "split_column": "split",
            "group_column": "person",
        },
        "quarantine_budget": 0.5,
    }


@pytest.fixture(scope="session")
def small_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six films (one without motion, one broken, one a copy), four pictures, a label file."""
    folder = tmp_path_factory.mktemp("files")
    films = folder / "films"
    write_film(films / "one.mp4", [scene("dunes", 2 * FPS), scene("waves", 2 * FPS)])
    write_film(films / "two.mp4", [scene("forest", 3 * FPS)])
    write_film(films / "three.mp4", [scene("street", 3 * FPS)])
    write_film(films / "still.mp4", [scene("wall", 1).repeat(2 * FPS, axis=0)])
    (films / "broken.mp4").write_bytes(b"\x00\x01no film at all" * 50)
    shutil.copy(films / "three.mp4", films / "copy_of_three.mp4")
    (films / "notes.txt").write_text("not media")
    for name in ("apple", "pear"):
        for number in range(2):
            write_picture(folder / "stills" / name / f"{number}.jpg", f"{name}{number}")
    (folder / "labels.csv").write_text(LABELS)
    return folder


@pytest.fixture(scope="session")
def small_corpus(small_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The corpus through media, shots and clips. Nobody writes here."""
    project = write_project(
        tmp_path_factory.mktemp("project"),
        {
            "films": films_of(small_files),
            "stills": {
                "uri": str(small_files / "stills"),
                "weight": 0.5,
                "clips": [{"frames": 4, "fps": 4, "crop": "whole"}],
                "labels": {"layout": "folders", "targets": {"fruit": ""}},
            },
        },
        benchmarks={
            "actions": {"datasets": ["films"], "target": "action", "policy": {**POLICY, "crop": "whole"}},
            "fruits": {"datasets": ["stills"], "target": "fruit", "policy": {"frames": 1, "crop": "whole"}},
        },
    )
    return Made(project, small_files, make_corpus(project))


@pytest.fixture
def own_copy(small_corpus: Made, tmp_path: Path) -> Callable[..., Project]:
    """A function that copies files and tables of the small corpus to a folder of the test's own, with other
    settings."""

    def copy(**changed: Any) -> Project:
        shutil.copytree(small_corpus.project.root.url, tmp_path / "root")
        shutil.copy(small_corpus.project.path, tmp_path)
        return edit_project(tmp_path / "corpus.yaml", lambda said: said.update(changed))

    return copy
