"""Label files: layouts, spans, reserved targets, contradictions, and cells that are wrong."""

import errno
from pathlib import Path
from typing import Any
from unicodedata import normalize

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextvid.config.datasets import DatasetConfig, LabelConfig
from nextvid.corpus.labels import (
    contradictions,
    label_bytes,
    label_checks,
    label_files,
    read_labels,
    readable_labels,
)
from storage.errors import CorpusError


def dataset(folder: Path, text: str, **labels: Any) -> DatasetConfig:
    file = folder / "labels.csv"
    file.write_text(text, encoding="utf-8")
    given = {"layout": "csv", "file": str(file), "targets": {"action": "label"}} | labels
    return DatasetConfig(uri=str(folder / "d"), labels=LabelConfig.model_validate(given))


def rows(config: DatasetConfig, *paths: str) -> list[tuple[Any, ...]]:
    return list(read_labels(config, paths).iter_rows())


def without_file(config: DatasetConfig, paths: list[str]) -> list[str]:
    return sorted(name for file in label_files(config, paths) for name in file.without)


def test_without_labels_there_are_none() -> None:
    assert rows(DatasetConfig(uri="/d"), "a.mp4") == []


def test_folders_name_the_class() -> None:
    config = DatasetConfig(uri="/d", labels=LabelConfig(layout="folders"))
    assert rows(config, "train/cat/1.jpg", "dog/2.jpg", "top.jpg") == [
        ("dog/2.jpg", None, None, "class", "dog"),
        ("train/cat/1.jpg", None, None, "class", "cat"),
    ]
    renamed = DatasetConfig(uri="/d", labels=LabelConfig(layout="folders", targets={"animal": ""}))
    assert rows(renamed, "dog/2.jpg") == [("dog/2.jpg", None, None, "animal", "dog")]


def test_folders_above_the_class_name_the_split_where_split_names_are_given() -> None:
    labels = LabelConfig(layout="folders", split_names={"Held out": "test"})
    config = DatasetConfig(uri="/d", labels=labels)
    found = rows(config, "train/cat/1.jpg", "validation/cat/2.jpg", "held out/cat/3.jpg", "cat/4.jpg", "x/train/5.jpg")
    assert [row[0::4] for row in found if row[3] == "split"] == [
        ("held out/cat/3.jpg", "test"),
        ("train/cat/1.jpg", "train"),
        ("validation/cat/2.jpg", "val"),
    ]


def test_columns_become_targets_and_empty_cells_no_label(tmp_path: Path) -> None:
    text = (
        "path,label,colour,split,who,extra\na.mp4, run ,red,training,anna,1\nb.mp4,,blue,,,2\nother.mp4,x,y,test,z,3\n"
    )
    config = dataset(
        tmp_path, text, targets={"action": "label", "colour": "colour"}, split_column="split", group_column="who"
    )
    assert rows(config, "a.mp4", "b.mp4") == [
        ("a.mp4", None, None, "action", "run"),
        ("a.mp4", None, None, "colour", "red"),
        ("a.mp4", None, None, "group", "anna"),
        ("a.mp4", None, None, "split", "train"),
        ("b.mp4", None, None, "colour", "blue"),
    ]


def test_spans_label_their_part_and_splits_the_whole(tmp_path: Path) -> None:
    text = "path,label,split,start_s,end_s\na.mp4,run,val,0,1.5\na.mp4,sit,val,1.5,2.0000005\na.mp4,all,val,,\n"
    assert rows(dataset(tmp_path, text, split_column="split"), "a.mp4") == [
        ("a.mp4", None, None, "action", "all"),
        ("a.mp4", 0, 1_500_000, "action", "run"),
        ("a.mp4", 1_500_000, 2_000_000, "action", "sit"),
        ("a.mp4", None, None, "split", "val"),
    ]


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 10**6)), min_size=1, max_size=5, unique=True))
def test_spans_are_exact_to_the_microsecond(tmp_path: Path, spans: list[tuple[int, int]]) -> None:
    lines = [f"a.mp4,v{n},{start / 1e3!r},{(start + length) / 1e3!r}" for n, (start, length) in enumerate(spans)]
    config = dataset(tmp_path, "path,label,start_s,end_s\n" + "\n".join(lines) + "\n")
    found = {(start, end) for _, start, end, _, _ in rows(config, "a.mp4")}
    assert found == {(start * 1000, (start + length) * 1000) for start, length in spans}


def test_paths_may_start_from_another_folder(tmp_path: Path) -> None:
    text = "path,label\nd/a.mp4,run\n./d/sub/b.mp4,sit\nelsewhere/a.mp4,no\n"
    config = dataset(tmp_path, text, path_base=str(tmp_path))
    assert [row[0] for row in rows(config, "a.mp4", "sub/b.mp4")] == ["a.mp4", "sub/b.mp4"]


def test_lines_that_repeat_are_one_label(tmp_path: Path) -> None:
    assert len(rows(dataset(tmp_path, "path,label\na.mp4,run\na.mp4,run\n"), "a.mp4")) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,name\na.mp4,run\n", "no column label; it has path, name"),
        ("path,label,start_s,end_s\na.mp4,run,soon,2\n", "line 2: start_s is 'soon'"),
        ("path,label,start_s,end_s\na.mp4,sit,1,2\na.mp4,run,nan,2\n", "line 3: start_s is 'nan'"),
        ("path,label,start_s,end_s\na.mp4,run,2,2\n", "line 2: a span needs a start and a later end"),
        ("path,label,start_s,end_s\na.mp4,run,2,\n", "line 2: a span needs"),
        (
            "path,label\na.mp4,run\na.mp4,run,and,more\n",
            "no csv table with a header: line 3 has 4 cells, its header 2$",
        ),
        ("path,label,path\na.mp4,run,b.mp4\n", "has the column path twice; rename one"),
        ("path,label,end_s,start_s,end_s\na.mp4,run,1,0,2\n", "has the column end_s twice"),
        ("", "no csv table"),
    ],
)
def test_wrong_files_are_named_with_their_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        rows(dataset(tmp_path, text), "a.mp4")


def test_an_unknown_split_is_refused(tmp_path: Path) -> None:
    config = dataset(tmp_path, "path,label,split\na.mp4,run,all\n", split_column="split")
    with pytest.raises(CorpusError, match="has the split 'all'"):
        rows(config, "a.mp4")


def test_a_missing_label_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="correct 'labels'"):
        label_bytes(str(tmp_path / "none.csv"))


def test_two_values_of_one_target_for_one_span_contradict(tmp_path: Path) -> None:
    head = "path,label,split,start_s,end_s\n"
    spans = "a.mp4,run,train,0,1\na.mp4,sit,train,1,2\nb.mp4,run,train,0,1\nb.mp4,sit,train,0,1\n"
    text = head + spans + "c.mp4,run,train,,\nc.mp4,run,test,,\n"
    labels = read_labels(dataset(tmp_path, text, split_column="split"), ["a.mp4", "b.mp4", "c.mp4"])
    assert dict(contradictions(labels, "path").iter_rows()) == {
        "b.mp4": "action is run and sit",
        "c.mp4": "split is test and train",
    }


@pytest.mark.parametrize("base", [None, "/", "elsewhere"])
def test_absolute_paths_name_files_below_the_uri(tmp_path: Path, base: str | None) -> None:
    text = f"path,label\n{tmp_path}/d/a/1.mp4,run\n{tmp_path}/d2/2.mp4,sit\n/other/3.mp4,sit\n"
    config = dataset(tmp_path, text, **({} if base is None else {"path_base": base}))
    assert rows(config, "a/1.mp4", "2.mp4", "3.mp4") == [("a/1.mp4", None, None, "action", "run")]
    assert without_file(config, ["a/1.mp4"]) == []


@pytest.mark.parametrize("uri", ["{}", "file://{}"])
@pytest.mark.parametrize("name", ["{}/a/1.mp4", "file://{}/a/1.mp4", "{}//a/./1.mp4", "a//1.mp4"])
def test_local_names_are_compared_however_they_are_written(tmp_path: Path, uri: str, name: str) -> None:
    folder = tmp_path / "d"
    config = dataset(tmp_path, f"path,label\n{name.format(folder)},run\n")
    config = config.model_copy(update={"uri": uri.format(folder)})
    assert [row[0] for row in rows(config, "a/1.mp4")] == ["a/1.mp4"]
    assert without_file(config, ["a/1.mp4"]) == []


def test_a_label_file_that_is_lost_while_it_is_read_is_told_like_one_that_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataset(tmp_path, "path,label\na.mp4,run\n")

    def lost(opened: object) -> str:
        raise OSError(errno.EIO, "the disk is gone")

    monkeypatch.setattr("nextvid.corpus.labels.digest_stream", lost)
    found, errors = readable_labels({"d": config})
    assert not found
    assert "cannot be read: [Errno 5] the disk is gone; put it back" in errors["d"]


def test_urls_name_files_below_the_uri(tmp_path: Path) -> None:
    config = dataset(tmp_path, "path,label\ns3://bucket/d/a.mp4,run\ns3://other/d/b.mp4,sit\nc.mp4,lie\n")
    config = config.model_copy(update={"uri": "s3://bucket/d"})
    assert [row[0] for row in rows(config, "a.mp4", "b.mp4", "c.mp4")] == ["a.mp4", "c.mp4"]


def test_a_list_that_names_no_file_of_the_dataset_is_told_whole(tmp_path: Path) -> None:
    config = dataset(tmp_path, "path,label\n/mnt/k400/a.mp4,run\n/mnt/k400/b.mp4,sit\n")
    assert rows(config, "a.mp4") == []
    assert without_file(config, ["a.mp4"]) == ["/mnt/k400/a.mp4", "/mnt/k400/b.mp4"]


@pytest.mark.parametrize(("listed", "labelled"), [("NFC", "NFD"), ("NFD", "NFC"), ("NFD", "NFD")])
def test_names_are_compared_in_one_form(tmp_path: Path, listed: Any, labelled: Any) -> None:
    name = "caf\u00e9/na\u00efve.mp4"
    config = dataset(tmp_path, f"path,label\n{normalize(labelled, name)},run\n")
    path = normalize(listed, name)
    assert rows(config, path) == [(path, None, None, "action", "run")]
    assert without_file(config, [path]) == []


@pytest.mark.parametrize(
    ("text", "listed", "passed"),
    [
        ("path,label\nx.mp4,run\ny.mp4,run\n", ["a.mp4"], (False, False)),
        ("path,label\na.mp4,run\ny.mp4,run\n", ["a.mp4"], (True, True)),
        ("path,label\na.mp4,run\ny.mp4,run\nz.mp4,run\n", ["a.mp4"], (True, False)),
        ("path,label\na.mp4,run\n", ["a.mp4", "b.mp4"], (True, True)),
        ("path,label\na.mp4,run\n", ["a.mp4", "b.mp4", "c.mp4"], (True, False)),
        ("path,label\n", ["a.mp4"], (True, False)),
    ],
)
def test_names_and_files_are_compared(tmp_path: Path, text: str, listed: list[str], passed: tuple[bool, bool]) -> None:
    config = dataset(tmp_path, text)
    labelled = {row[0] for row in rows(config, *listed)}
    bare = [path for path in listed if path not in labelled]
    checks = label_checks("d", config, listed, listed, bare)
    assert tuple(check.passed for check in checks) == passed
    assert [check.blocking for check in checks] == [True, False]
    assert all(bool(check.description) is not check.passed for check in checks)
    if not passed[0]:
        assert f"no file of dataset d has a name that {tmp_path}/labels.csv lists, such as 'x.mp4', 'y.mp4'" in (
            checks[0].description
        )
