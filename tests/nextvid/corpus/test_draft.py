"""A corpus.yaml drafted from a folder: labels are recognised as people keep them, and what is written works."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from nextvid.config.corpus import load_corpus
from nextvid.config.project import open_project
from nextvid.corpus.draft import draft_corpus
from nextvid.corpus.labels import read_labels
from nextvid.corpus.media import make_media
from nextvid.corpus.sources import known_sources, make_sources
from storage.errors import CorpusError, RefusedError
from tests.nextvid.corpus.archives import write_parquet, write_tar
from tests.nextvid.corpus.small_media import FPS, scene, write_film, write_picture
from tests.nextvid.video import film

DIVES = [{"vid_name": f"dive_{n}", "label": n % 2, "start_frame": 0, "end_frame": 9} for n in range(6)]


def pictures(folder: Path, *paths: str) -> None:
    for path in paths:
        write_picture(folder / path, path)


def split_folders(folder: Path) -> None:
    pictures(folder, *(f"{split}/{name}/{n}.jpg" for split in ("train", "val") for name in "ab" for n in (1, 2)))


def csv_beside(folder: Path) -> None:
    """Paths from the folder above, absolute ones in another column, numbers that are no classes."""
    pictures(folder, *(f"{n}.jpg" for n in range(6)))
    lines = [
        f"{folder.name}/{n}.jpg,{'walk' if n % 2 else 'jump'},{n % 3},{'train' if n else 'test'}" for n in range(6)
    ]
    (folder.parent / "labels.csv").write_text("\n".join(["name,verb,length,split", *lines]))


def csv_inside(folder: Path) -> None:
    """A column called `label` is the class, whatever else repeats."""
    pictures(folder, *(f"{n}.jpg" for n in range(6)))
    lines = [f"{n}.jpg,{'walk' if n % 2 else 'jump'},{'CC0' if n % 2 else 'MIT'}" for n in range(6)]
    (folder / "list.csv").write_text("\n".join(["path,label,licence", *lines]))


def kinetics(folder: Path) -> None:
    pictures(folder, *(f"x{n}_000001_000011.jpg" for n in range(6)))
    for split, numbers in (("train", range(4)), ("val", range(4, 6))):
        lines = [f"{'walk' if n % 2 else 'jump'},x{n},1,11,{split}" for n in numbers]
        (folder.parent / f"k400_{split}.csv").write_text(
            "\n".join(["label,youtube_id,time_start,time_end,split", *lines])
        )


def diving(folder: Path) -> None:
    pictures(folder, *(f"dive_{n}.jpg" for n in range(6)))
    (folder.parent / "Diving48_train.json").write_text(json.dumps(DIVES[:4]))
    (folder.parent / "Diving48_test.json").write_text(json.dumps(DIVES[4:]))


def something(folder: Path) -> None:
    pictures(folder, *(f"{n}.jpg" for n in range(6)))
    entries = [{"id": str(n), "template": f"Pushing {'[something]' if n % 2 else 'it'}"} for n in range(6)]
    (folder.parent / "validation.json").write_text(json.dumps(entries[:3]))
    (folder.parent / "train.json").write_text(json.dumps(entries[3:]))


def imagenet(folder: Path) -> None:
    pictures(folder, *(f"{split}/n0000000{c}/{n}.jpg" for split in ("train", "val") for c in (1, 2) for n in (1, 2)))


def bare(folder: Path) -> None:
    pictures(folder, *(f"{n}.jpg" for n in range(3)))


def one_class(folder: Path) -> None:
    """A single folder names nothing that a probe could tell apart."""
    pictures(folder, *(f"all/{n}.jpg" for n in range(3)))


@pytest.mark.parametrize(
    ("layout", "write", "found"),
    [
        ("folders", split_folders, {"layout": "folders", "split_names": {"train": "train", "val": "test"}}),
        ("csv", csv_beside, {"path_column": "name", "targets": {"verb": "verb"}, "split_column": "split"}),
        ("csv", csv_inside, {"path_column": "path", "targets": {"label": "label"}}),
        ("kinetics400", kinetics, {"split_names": {"val": "test"}}),
        ("diving48", diving, {}),
        ("ssv2", something, {"split_names": {"val": "test"}}),
        ("imagenet", imagenet, {"split_names": {"val": "test"}}),
        ("none", bare, {}),
        ("none", one_class, {}),
    ],
)
def test_labels_are_recognised_and_label_every_file(
    tmp_path: Path, layout: str, write: Callable[[Path], None], found: dict[str, Any]
) -> None:
    folder = tmp_path / "data" / "My Files"
    folder.mkdir(parents=True)
    write(folder)
    draft = draft_corpus(str(folder), str(tmp_path / "corpus.yaml"))
    project = open_project(tmp_path / "corpus.yaml")
    config = project.corpus.datasets["my_files"]
    assert (draft.dataset, draft.labels, config.labels.layout) == ("my_files", layout, layout)
    values = config.labels.model_dump(mode="json")
    assert {key: values[key] for key in found} == found
    make_sources(project)
    paths = known_sources(project, "my_files")["path"].to_list()
    labels = read_labels(config, paths)
    assert set(labels["path"]) == (set(paths) if layout != "none" else set())
    assert set(project.corpus.benchmarks) == set(draft.targets), "each target that can be predicted is a benchmark"
    if "split_names" in found:
        assert set(labels.filter(target="split")["value"]) == {"train", "test"}, "the validation files are tested on"
    assert bool(draft.targets) == (layout != "none")
    assert all(benchmark.batch <= len(paths) // 3 for benchmark in project.corpus.benchmarks.values()), (
        "heads can learn"
    )


def test_a_draft_of_films_and_pictures_is_made_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "films"
    write_film(folder / "a" / "one.mp4", [scene("dunes", 3 * FPS)])
    write_film(folder / "b" / "two.mp4", [scene("waves", 2 * FPS)])
    write_picture(folder / "b" / "three.jpg", "forest")
    (folder / "b" / "broken.mp4").write_bytes(b"no film" * 99)
    (folder / "notes.txt").write_text("not a medium")
    draft = draft_corpus(str(folder), str(folder / "corpus.yaml"))
    text = (folder / "corpus.yaml").read_text()
    assert "3 videos and 1 images" in text
    assert "2.0 to 3.0 s (median 2.5), 8 fps" in text
    assert "# 1 of 4 sampled files cannot be read" in text
    assert "ignored: 1 .txt" in text
    assert text.endswith("\n")
    assert not text.endswith("\n\n")
    assert draft.next.startswith("nextvid make report --recipe demo")
    corpus = load_corpus(folder / "corpus.yaml")
    assert not Path(corpus.root).is_relative_to(folder), "what is made would be listed as media"
    project = open_project(folder / "corpus.yaml")
    make_sources(project)
    assert make_media(project, "films.000000").passed, "the budget leaves room for the broken file that was seen"


def test_slow_films_get_a_rate_that_they_have(tmp_path: Path) -> None:
    folder = tmp_path / "slow"
    folder.mkdir()
    film.write_film(folder / "one.mp4", scene("dunes", 20), fps=2, options=film.X264_FAST)
    draft_corpus(str(folder), str(tmp_path / "corpus.yaml"))
    assert load_corpus(tmp_path / "corpus.yaml").datasets["slow"].clips[0].fps == 2.0


def test_a_draft_never_writes_over_a_file_and_names_what_it_lacks(tmp_path: Path) -> None:
    pictures(tmp_path / "stills", "1.jpg")
    out = tmp_path / "corpus.yaml"
    out.write_text("mine")
    with pytest.raises(RefusedError, match="name another file with --out"):
        draft_corpus(str(tmp_path / "stills"), str(out))
    assert out.read_text() == "mine"
    for place, said in (("nowhere", "is not a folder$"), ("stills/1.jpg", "is not a folder: name the one")):
        with pytest.raises(CorpusError, match=said):
            draft_corpus(str(tmp_path / place), str(tmp_path / "other.yaml"))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    with pytest.raises(CorpusError, match=r"holds no video and no image \(it has 1 \.txt\)"):
        draft_corpus(str(tmp_path / "texts"), str(tmp_path / "other.yaml"))
    assert not (tmp_path / "other.yaml").exists()


def test_names_that_yaml_would_read_otherwise_are_quoted(tmp_path: Path) -> None:
    folder = tmp_path / "a: b #1"
    pictures(folder, "1.jpg", "2.jpg")
    draft_corpus(str(folder), str(tmp_path / "corpus.yaml"))
    values = yaml.safe_load((tmp_path / "corpus.yaml").read_text())
    assert values["datasets"]["a_b_1"]["uri"] == str(folder)


def test_a_folder_of_tar_files_is_drafted_by_what_is_in_them(tmp_path: Path) -> None:
    names = [f"{name}/{n}.jpg" for name in "ab" for n in range(3)]
    pictures(tmp_path / "plain", *names)
    members = [(name, (tmp_path / "plain" / name).read_bytes()) for name in names]
    for number in range(2):
        write_tar(tmp_path / "pets" / f"{number}.tar", members[number::2])
    draft = draft_corpus(str(tmp_path / "pets"), str(tmp_path / "corpus.yaml"))
    assert (draft.files, draft.labels, draft.labelled, draft.targets) == ({"image": 6}, "folders", 6, ("class",))
    assert draft.next.startswith("nextvid make latents --corpus"), "no recipe trains on images alone"
    dataset = load_corpus(tmp_path / "corpus.yaml").datasets["pets"]
    assert dataset.tar
    paths = known_paths(tmp_path / "corpus.yaml", "pets")
    assert set(read_labels(dataset, paths)["value"]) == {"a", "b"}
    write_parquet(tmp_path / "cells" / "x.parquet", [("a.jpg", b"1")])
    with pytest.raises(CorpusError, match=r"it has 1 .parquet; pictures in parquet files need 'parquet_column'"):
        draft_corpus(str(tmp_path / "cells"), str(tmp_path / "other.yaml"))


def known_paths(corpus: Path, dataset: str) -> list[str]:
    project = open_project(corpus)
    make_sources(project)
    return known_sources(project, dataset)["path"].to_list()
