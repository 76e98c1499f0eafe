"""Label files that are huge, endless, no text, or full of odd cells: one error that names them, or labels as written.

Nothing in a cell is acted on, and no reader takes memory or time without bound.
"""

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from nextvid.config.datasets import DatasetConfig, LabelConfig
from nextvid.corpus.draft import draft_corpus
from nextvid.corpus.labels import label_digests, label_files, read_labels
from storage.errors import CorpusError
from tests.hostile.conftest import NAMES, Measured

PATHS = ["a.mp4", "b.mp4"]
FORMULAS = ["=cmd|' /C calc'!A0", "@SUM(1+1)*cmd|' /C calc'!A0", "+1+1", "-2+3", '=HYPERLINK("http://127.0.0.1:9","x")']
ROLES = {"kinetics400": ".csv", "ssv2": ".json", "diving48": ".json", "internvid": ".jsonl", "imagenet": ".csv"}


def csv_labels(folder: Path, data: bytes, **labels: Any) -> DatasetConfig:
    (folder / "labels.csv").write_bytes(data)
    given = {"layout": "csv", "file": str(folder / "labels.csv"), "targets": {"class": "label"}} | labels
    return DatasetConfig(uri=str(folder), labels=LabelConfig.model_validate(given))


REFUSED = {
    "a line of 10 MB": b"path,label\na.mp4," + b"x" * 10_000_000 + b"\n",
    "a quoted cell without an end": b'path,label\na.mp4,"' + b"x\n" * 1_000_000,
    "a header of 10 MB": b"path," + b"x" * 10_000_000 + b"\na.mp4,1\n",
    "a million columns": b"path,label," + b",".join(b"c%d" % n for n in range(1_000_000)) + b"\na.mp4,run\n",
    "a million empty columns": b"path,label" + b"," * 1_000_000 + b"\na.mp4,run\n",
    "UTF-16": "path,label\na.mp4,run\n".encode("utf-16"),
    "a pickle": b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x05mkdir\x94\x93\x94.",
    "a zip archive": b"PK\x03\x04" + bytes(1000),
    "nothing but NUL": bytes(10_000),
    "seconds without end": b"path,label,start_s,end_s\na.mp4,run,0,1e308\n",
    "seconds that are none": b"path,label,start_s,end_s\na.mp4,run,nan,1\n",
    "seconds of 6,000 digits": b"path,label,start_s,end_s\na.mp4,run,0," + b"9" * 6000 + b"\n",
    "one longer line": b"path,label\na.mp4,run\nb.mp4,run," + b"," * 100_000 + b"\n",
}  # fmt: skip


@pytest.mark.parametrize("data", REFUSED.values(), ids=REFUSED)
def test_a_table_that_is_none_is_one_error(tmp_path: Path, data: bytes) -> None:
    config = csv_labels(tmp_path, data)
    for read in (read_labels, label_files):
        if read is label_files and b"start_s" in data:
            continue  # spans are not read for names
        with pytest.raises(CorpusError) as caught:
            read(config, PATHS)
        assert "labels.csv" in str(caught.value)
        assert len(str(caught.value)) < 5000


@pytest.mark.parametrize("value", [*FORMULAS, *NAMES.values(), "nul\0byte", "\u202e", "a" * 10_000])
def test_cells_are_text(tmp_path: Path, value: str) -> None:
    """As written, but for spaces at both ends; nothing in them is a formula, tag or code."""
    quoted = value.replace('"', '""')
    data = f'\ufeffpath,label\na.mp4,"{quoted}"\n../b.mp4,x\n/etc/passwd,x\n'.encode()
    found = read_labels(csv_labels(tmp_path, data), PATHS)
    assert list(found.iter_rows()) == [("a.mp4", None, None, "class", value.strip())]


def lists(folder: Path, layout: str, text: str | bytes, **more: str) -> DatasetConfig:
    file = folder / f"list{ROLES[layout]}"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    files = {"train": str(file)} | {role: str(folder / name) for role, name in more.items()}
    return DatasetConfig(uri=str(folder), labels=LabelConfig.model_validate({"layout": layout, "files": files}))


INTERNVID = {"YoutubeID": "a", "Start_timestamp": "00:00:00.0", "End_timestamp": "00:00:01.0", "Caption": "x"}


@pytest.mark.parametrize(
    ("layout", "text"),
    [
        ("kinetics400", "youtube_id,time_start,time_end\na,0," + "9" * 6000 + "\n"),
        ("kinetics400", "youtube_id,time_start,time_end\na,0," + "9" * 3_000_000 + "\n"),
        ("kinetics400", "x" * 3_000_000),
        ("kinetics400", 'youtube_id,time_start,time_end\n"' + "a\n" * 500_000),
        ("imagenet", "ImageId,PredictionString\na,n" + "0" * 200_000 + "\n"),
        ("ssv2", "[" * 100_000),
        ("ssv2", '{"a":' * 100_000),
        ("ssv2", '[{"id": "a", "template": ' + "9" * 6000 + "}]"),
        ("ssv2", '[{"id": ["a"], "template": "x"}]'),
        ("diving48", '[{"vid_name": "a", "label": 1e400}]'),
        ("diving48", '[{"vid_name": "a", "label": ' + "9" * 5000 + "}]"),
        ("internvid", "[" * 100_000),
        ("internvid", json.dumps(INTERNVID | {"Caption": "x" * 2_000_000})),
        ("internvid", json.dumps(INTERNVID | {"End_timestamp": "9" * 5000 + ":00:00"})),
        ("internvid", json.dumps(INTERNVID | {"End_timestamp": {"a": 1}})),
        ("internvid", b"\x80\x04\x95"),
    ],
)
def test_a_list_that_is_none_is_one_error(tmp_path: Path, layout: str, text: str | bytes) -> None:
    with pytest.raises(CorpusError) as caught:
        read_labels(lists(tmp_path, layout, text), ["a.mp4"])
    assert "list." in str(caught.value)
    assert len(str(caught.value)) < 5000


@pytest.mark.parametrize("classes", ['[["a", {}]]', "[{}]", "[1]", '["word"]', "{}", "[" * 50_000])
def test_a_vocabulary_that_is_none(tmp_path: Path, classes: str) -> None:
    (tmp_path / "classes.json").write_text(classes)
    config = lists(tmp_path, "diving48", '[{"vid_name": "a", "label": 0}]', classes="classes.json")
    with pytest.raises(CorpusError):
        read_labels(config, ["a.mp4"])


@pytest.mark.parametrize("kind", ["pipe", "device", "socket", "folder", "loop"])
def test_what_never_ends_is_not_read(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path may have 107 bytes
    file = tmp_path / "labels.csv"
    with socket.socket(socket.AF_UNIX) as opened:
        match kind:
            case "pipe":
                os.mkfifo(file)
            case "device":
                file.symlink_to("/dev/zero")
            case "socket":
                opened.bind("labels.csv")
            case "folder":
                file.mkdir()
            case _:
                file.symlink_to(file)
        labels = LabelConfig(layout="csv", file=str(file), targets={"class": "label"})
        named = LabelConfig.model_validate({"layout": "ssv2", "files": {"train": str(file)}})
        for config in (labels, named):
            with pytest.raises(CorpusError, match="cannot be read"):
                read_labels(DatasetConfig(uri=str(tmp_path), labels=config), PATHS)
            with pytest.raises(CorpusError, match="cannot be read"):
                label_digests(config)


def test_a_folder_full_of_such_files_is_drafted(tmp_path: Path) -> None:
    """`nextvid init` tries every list that it finds."""
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "a.mp4").write_bytes(b"no video")
    for number, data in enumerate(REFUSED.values()):
        if len(data) < 3_000_000:
            (folder / f"{number}.csv").write_bytes(data)
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "deep.jsonl").write_text("[" * 100_000)
    os.mkfifo(folder / "pipe.csv")
    (folder / "zero.json").symlink_to("/dev/zero")
    assert draft_corpus(str(folder), str(tmp_path / "corpus.yaml")).labels == "none"


def test_a_double_colon_in_a_name_is_no_chain_of_file_systems(tmp_path: Path) -> None:
    folder = tmp_path / "simplecache::x"
    folder.mkdir()
    config = csv_labels(folder, b"path,label\na.mp4,run\n")
    assert read_labels(config, PATHS)["value"].to_list() == ["run"]
    assert len(label_digests(config.labels)) == 1


@pytest.mark.faults
@pytest.mark.parametrize("layout", ["csv", "one line", "quoted", "kinetics400", "internvid", "ssv2", "ssv2 one line"])
def test_100_megabytes_are_read_or_refused_in_bounded_memory(tmp_path: Path, measured: Measured, layout: str) -> None:
    size = 100_000_000
    match layout:
        case "csv":
            text = b"path,label\n" + b"".join(
                b"videos/%09d.mp4,class number %04d\n" % (n, n % 1000) for n in range(2_600_000)
            )
        case "one line":
            text = b"path,label\na.mp4," + b"x" * size
        case "quoted":
            text = b'path,label\na.mp4,"' + b"xxxxxxxxx\n" * (size // 10)
        case "kinetics400":
            line = b"some class,%011d,%d,%d,train\n"
            text = b"label,youtube_id,time_start,time_end,split\n" + b"".join(
                line % (n, n, n + 10) for n in range(2_200_000)
            )
        case "internvid":
            text = (json.dumps(INTERNVID) + "\n").encode() * 900_000
        case "ssv2":
            text = (
                b"["
                + b",".join(b'{"id": "%d", "template": "Putting [something]"}' % n for n in range(1_900_000))
                + b"]"
            )
        case _:
            text = b"[" * size
    file = tmp_path / "list"
    file.write_bytes(text)
    assert len(text) > 0.85 * size
    name = layout.split()[0]
    labels = {"layout": name, "files": {"all": str(file)}}
    if name in ("csv", "one", "quoted"):
        labels = {"layout": "csv", "file": str(file), "targets": {"class": "label"}}
    code = f"""
from nextvid.config.datasets import DatasetConfig, LabelConfig
from nextvid.corpus.labels import read_labels
from storage.errors import CorpusError
config = DatasetConfig(uri="/videos", labels=LabelConfig.model_validate({labels!r}))
try:
    print(read_labels(config, ["a.mp4"]).height)
except CorpusError as error:
    print(str(error)[:300])
"""
    ended = measured("-c", code)
    assert ended.code == 0, ended.err
    assert ended.peak_bytes < 1.6e9, f"{ended.peak_bytes:,} bytes, {ended.out}"
