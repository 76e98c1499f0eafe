"""`nextvid make` on small folders, read as a user reads it: what was left out, why, and what to look at."""

from pathlib import Path
from typing import Any

import pytest

from tests.factories import write_settings
from tests.nextvid.conftest import Command
from tests.nextvid.corpus.small_media import FPS, scene, write_film

POLICY = {"frames": 4, "fps": 4}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four films; beside them a text, a hidden file and one without extension."""
    for name in ("a", "b", "c", "d"):
        write_film(tmp_path / "films" / f"{name}.mp4", [scene(name, 2 * FPS)])
    for name in ("notes.txt", "more.TXT", ".hidden", "README"):
        (tmp_path / "films" / name).write_text("no film")
    return tmp_path


def settings(folder: Path, labels: str | None = None, **dataset: Any) -> str:
    given: dict[str, Any] = {"uri": "films", "weight": 1.0, "clips": [POLICY], "split": {"val": 0.0, "test": 0.0}}
    if labels is not None:
        (folder / "labels.csv").write_text(labels)
        given["labels"] = {
            "layout": "csv", "file": "labels.csv", "targets": {"class": "class"}, "split_column": "split"
        }  # fmt: skip
    return str(write_settings(folder, {"films": given | dataset}))


def test_nothing_to_look_at_is_said(nextvid: Command, folder: Path) -> None:
    for path in (folder / "films").iterdir():
        if path.suffix != ".mp4":
            path.unlink()
    code, out, _ = nextvid("make", "clips", "--corpus", settings(folder))
    assert code == 0
    assert "left out:" not in out
    assert out.splitlines()[-1] == "nothing to look at: all checks passed, nothing was left out"


def test_files_that_are_not_ours_are_counted_by_extension(nextvid: Command, folder: Path) -> None:
    code, out, _ = nextvid("make", "sources", "--corpus", settings(folder))
    assert code == 0
    first, second, last = out.splitlines()
    assert first.startswith("sources")
    assert second == "    left out: 4 files ignored by extension (.txt 2, hidden 1, no extension 1)"
    assert last == "to look at: 4 files ignored by extension (sources)"


def test_a_label_file_that_names_no_file_is_a_failed_check(nextvid: Command, folder: Path) -> None:
    """As the lists of public data sets are with another path in front: official test films were trained on."""
    lines = "".join(f"/mnt/k400/{name}.mp4,run,test\n" for name in ("a", "b", "c", "d"))
    code, out, error = nextvid("make", "clips", "--corpus", settings(folder, f"path,class,split\n{lines}"))
    assert code == 3
    assert "4 labels without a file (such as films: '/mnt/k400/a.mp4')" in out
    assert "failed: labels_name_files" in out
    assert "to look at: 1 failed check (media films.000000: labels_name_files)" in out.splitlines()[-1]
    assert f"no file of dataset films has a name that {folder}/labels.csv lists, such as '/mnt/k400/a.mp4'" in error
    assert not list(Path(folder, "root").rglob("clips/**/*.parquet"))


@pytest.mark.parametrize("base", [None, "/"])
def test_absolute_paths_below_the_uri_are_labels(nextvid: Command, folder: Path, base: str | None) -> None:
    front = f"{folder}/films/" if base is None else f"{folder}/films/".lstrip("/")
    lines = "".join(f"{front}{name}.mp4,run,{'test' if name == 'a' else 'train'}\n" for name in ("a", "b", "c", "d"))
    path = settings(folder, f"path,class,split\n{lines}")
    if base is not None:
        Path(path).write_text(Path(path).read_text().replace("layout: csv", "layout: csv\n      path_base: /"))
    code, out, _ = nextvid("make", "clips", "--corpus", path)
    assert code == 0
    assert "labels" not in out
    assert "left out: 1 held out of training by their split" in out
    assert "1 held out of training by their split (clips)" in out.splitlines()[-1]
    assert "rejected" not in out


def test_one_that_names_few_files_is_a_warning_with_the_first_names(nextvid: Command, folder: Path) -> None:
    lines = "".join(f"{name}.mp4,run,train\n" for name in ("a", "w", "x", "y", "z"))
    code, out, _ = nextvid("make", "media", "--corpus", settings(folder, f"path,class,split\n{lines}"))
    assert code == 0
    assert (
        "warning: labels_meet_files: dataset films: 4 of 5 names in its label files have no file, such as 'w.mp4', "
        "'x.mp4', 'y.mp4'; 3 of 4 files have no label, such as 'b.mp4', 'c.mp4', 'd.mp4'" in out
    )
    assert "1 warning (media films.000000: labels_meet_files)" in out.splitlines()[-1]


def test_one_dataset_with_wrong_labels_does_not_stop_another(nextvid: Command, folder: Path) -> None:
    write_film(folder / "others" / "e.mp4", [scene("e", 2 * FPS)])
    (folder / "labels.csv").write_text("path,class\n/elsewhere/e.mp4,run\n")
    labels = {"layout": "csv", "file": "labels.csv", "targets": {"class": "class"}}
    both = {
        "films": {"uri": "films", "weight": 1.0, "clips": [POLICY]},
        "others": {"uri": "others", "weight": 1.0, "clips": [POLICY], "labels": labels},
    }
    code, out, error = nextvid("make", "clips", "--corpus", str(write_settings(folder, both)))
    assert code == 3
    assert "clips films.000000" in out
    assert "clips others.000000" not in out
    assert "others.000000: media: blocking checks failed: labels_name_files" in error


def test_unreadable_films_are_said_with_their_reason(nextvid: Command, folder: Path) -> None:
    (folder / "films" / "broken.mp4").write_bytes(b"no film")
    code, out, _ = nextvid("make", "media", "--corpus", settings(folder, quarantine_budget=0.5))
    assert code == 0
    assert "left out: 1 quarantined (unknown_format 1)" in out
    assert "1 quarantined (media)" in out.splitlines()[-1]
    code, out, _ = nextvid("make", "media", "--json", "--corpus", settings(folder, quarantine_budget=0.5))
    assert all(line.startswith("{") for line in out.splitlines())
