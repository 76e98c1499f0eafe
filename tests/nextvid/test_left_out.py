"""`nextvid make` on small folders, read as a user reads it: what was left out, why, and what to look at."""

from pathlib import Path
from typing import Any

import pytest

from nextvid.config.project import open_project
from storage.schemas import Labels, Media
from storage.tables import read_table
from tests.factories import write_settings
from tests.nextvid.conftest import Command
from tests.nextvid.corpus.small_media import FPS, scene, write_film, write_picture

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


def test_a_label_file_that_is_away_leaves_its_dataset_as_it_is_and_another_grows(
    nextvid: Command, tmp_path: Path
) -> None:
    """Once it is back, all is as if it had never been away."""
    labels, away = tmp_path / "labels.csv", tmp_path / "away.csv"
    labels.write_text("path,class\na.jpg,cat\nb.jpg,dog\nd.jpg,cat\n")
    both: dict[str, Any] = {
        name: {"uri": name, "weight": 1.0, "clips": [{"frames": 1}], "split": {"val": 0.0, "test": 0.0}}
        for name in ("named", "others")
    }
    both["named"]["labels"] = {"layout": "csv", "file": "labels.csv", "targets": {"class": "class"}}
    for name in ("named/a", "named/b", "others/c"):
        write_picture(tmp_path / f"{name}.jpg", name)
    where = ("--corpus", str(write_settings(tmp_path, both)))
    root = open_project(where[1]).root
    assert nextvid("make", "media", *where)[0] == 0
    labels.rename(away)
    for name in ("named/d", "others/e"):
        write_picture(tmp_path / f"{name}.jpg", name)
    before = {path: path.read_bytes() for path in Path(root.url).rglob("*named.000000*") if path.is_file()}
    assert len(before) >= 4, "tables and checks"
    for asset in ("media", "sources"):
        code, out, error = nextvid("make", asset, *where)
        first, second, *_, last = out.splitlines()
        assert first.startswith("sources")
        assert second.startswith(f"    left as it was: dataset named: label file {labels} cannot be read: ")
        assert second.endswith("; put it back, or correct 'labels' in corpus.yaml")
        assert (code, last) == (2, "to look at: 1 unreadable dataset (named)")
        assert error.startswith("corpus: dataset named: label file")
    assert {path: path.read_bytes() for path in before} == before
    assert sorted(read_table(root.table("media", "others.000000"), Media)["path"]) == ["c.jpg", "e.jpg"]
    away.rename(labels)
    code, out, _ = nextvid("make", "media", *where)
    assert (code, out.splitlines()[-1]) == (0, "nothing to look at: all checks passed, nothing was left out")
    control = ("--corpus", str(write_settings(tmp_path, both, root="control")))
    assert nextvid("make", "media", *control)[0] == 0
    never = open_project(control[1]).root
    batch = "named.000000"
    assert read_table(root.table("media", batch), Media).equals(read_table(never.table("media", batch), Media))
    found = read_table(root.table("labels", batch), Labels)
    assert found.equals(read_table(never.table("labels", batch), Labels))
    assert found.height == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "named is not a folder; correct its 'uri' or mount it"),
        ("path,class,start_s,end_s\na.jpg,cat,0,x\n", "line 2: end_s is 'x'"),
        ("path,kind\na.jpg,cat\n", "has no column class"),
    ],
    ids=["folder", "cell", "column"],
)
def test_a_folder_that_is_away_or_a_mistake_in_a_label_file_stops_its_own_dataset_alone(
    nextvid: Command, tmp_path: Path, text: str | None, message: str
) -> None:
    for name in ("named/a", "others/c"):
        write_picture(tmp_path / f"{name}.jpg", name)
    both: dict[str, Any] = {
        name: {"uri": name, "weight": 1.0, "clips": [{"frames": 1}]} for name in ("named", "others")
    }
    both["named"]["labels"] = {"layout": "csv", "file": "labels.csv", "targets": {"class": "class"}}
    (tmp_path / "labels.csv").write_text(text or "path,class\na.jpg,cat\n")
    if text is None:
        (tmp_path / "named").rename(tmp_path / "away")
    code, out, error = nextvid("make", "clips", "--corpus", str(write_settings(tmp_path, both)))
    assert (code, error.startswith("corpus: ")) == (2, True)
    assert message in error
    assert message in out
    assert "clips others.000000" in out
    assert "clips named.000000" not in out
    assert "1 unreadable dataset (named)" in out.splitlines()[-1]


def test_unreadable_films_are_said_with_their_reason(nextvid: Command, folder: Path) -> None:
    (folder / "films" / "broken.mp4").write_bytes(b"no film")
    code, out, _ = nextvid("make", "media", "--corpus", settings(folder, quarantine_budget=0.5))
    assert code == 0
    assert "left out: 1 quarantined (unknown_format 1)" in out
    assert "1 quarantined (media)" in out.splitlines()[-1]
    code, out, _ = nextvid("make", "media", "--json", "--corpus", settings(folder, quarantine_budget=0.5))
    assert all(line.startswith("{") for line in out.splitlines())
