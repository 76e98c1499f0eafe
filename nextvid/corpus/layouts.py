"""Parse public data sets' own label files: ImageNet, Kinetics-400, Something-Something V2, Diving48, InternVid.

The lists have ids, neither folders nor extensions, so files are matched by their stem. A line that is not as its layout
requires is an error that names file and line.
"""

import csv
import io
import json
import re
import stat
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TextIO

from nextvid.config.datasets import LabelConfig
from storage.errors import LabelError
from storage.remote import connect, is_local
from storage.schemas import SPLITS

WNID = re.compile(r"n\d{8}")  # WordNet's synset ids, ImageNet's class folders
CLOCK = re.compile(r"(\d{1,6}):([0-5]\d):([0-5]\d)(?:\.(\d{1,6}))?")  # InternVid: 00:03:10.567

LONGEST_LINE, LONGEST_NUMBER = 1 << 20, 9  # our choice, in characters; captions of InternVid have hundreds
LARGEST_JSON = 200_000_000  # our choice: SSv2's list has 25 MB; each character takes about ten bytes while it is read
COLUMNS_NAMED, COLUMN_SHOWN = 20, 80  # our choice: columns that a message names, characters of each

# Names of official splits in public data sets (ImageNet, Kinetics, SSv2, Diving48) besides train, val and test.
# fmt: off
SPLIT_NAMES = {
    "training": "train", "validation": "val", "validate": "val", "valid": "val", "dev": "val", "testing": "test",
}
# fmt: on


def split_words(labels: LabelConfig) -> dict[str, str]:
    """Words for splits in lower case, with the dataset's own, and the split that each means."""
    own = {word.lower(): split for word, split in labels.split_names.items()}
    usual = {split: split for split in SPLITS} | SPLIT_NAMES
    return {word: own.get(split, split) for word, split in usual.items()} | own


@dataclass(frozen=True)
class Line:
    """Labels of the files whose path or stem is one of `names`, the most specific first. A null span is the file."""

    names: tuple[str, ...]
    value: str | None
    split: str | None = None
    group: str | None = None
    start_us: int | None = None
    end_us: int | None = None


def read_lines(labels: LabelConfig, paths: Sequence[str], stems: Set[str] | None) -> Iterator[Line]:
    """Lines with one of `stems` (None: all); for ImageNet, whose folders are labels, also a line for each of `paths`.

    Lists are read line by line where the format allows it. Raises LabelError.
    """
    match labels.layout:
        case "imagenet":
            yield from _image_folders(paths, split_words(labels).keys())
            lines = _each(labels, _imagenet)
        case "kinetics400":
            lines = _each(labels, _kinetics)
        case "ssv2":
            lines = _each(labels, _something(_classes(labels)))
        case "diving48":
            lines = _each(labels, _diving(_classes(labels)))
        case "internvid":
            lines = _each(labels, _internvid)
        case _:
            raise AssertionError(f"{labels.layout} is no list of a public data set")
    yield from (line for line in lines if stems is None or not stems.isdisjoint(line.names))


Parser = Callable[[TextIO, str, str | None], Iterator[Line]]  # (open file, its name, its split) to lines


@contextmanager
def opened_bytes(file: str) -> Iterator[BinaryIO]:
    """A label file, local or by URL, whose `::` is no chain of file systems. Raises LabelError."""
    try:
        if is_local(file) and not stat.S_ISREG(Path(file.removeprefix("file://")).stat().st_mode):
            raise LabelError("it is a folder, pipe or device, not a file")
        fs, key = connect(file)
        opened = fs.open(key, "rb")
    except Exception as error:  # object stores raise their clients' own classes
        raise _unreadable(file, error) from None
    with opened:
        try:
            yield opened
        except OSError as error:  # a disk or network that is lost meanwhile, or a right to list and not to read
            raise _unreadable(file, error) from None


def _unreadable(file: str, error: Exception) -> LabelError:
    why = "there is no such file" if isinstance(error, FileNotFoundError) else error
    return LabelError(f"label file {file} cannot be read: {why}; put it back, or correct 'labels' in corpus.yaml")


@contextmanager
def _text(file: str) -> Iterator[TextIO]:
    """A label file as text. Raises LabelError where it cannot be read or is not UTF-8."""
    with opened_bytes(file) as opened, io.TextIOWrapper(opened, encoding="utf-8-sig", newline="") as text:
        try:
            yield text
        except UnicodeDecodeError as error:
            raise LabelError(f"label file {file} is not UTF-8 text: {error}") from None


def _lines(opened: TextIO, file: str) -> Iterator[str]:
    """Lines of a label file. Raises LabelError for one that is too long: it may be all of a file of 45 GB."""
    for number, line in enumerate(iter(lambda: opened.readline(LONGEST_LINE), ""), 1):
        if len(line) == LONGEST_LINE:
            raise LabelError(f"{file}, line {number}: more than {LONGEST_LINE} characters: is it the right file?")
        yield line


def _each(labels: LabelConfig, parse: Parser) -> Iterator[Line]:
    for role, file in sorted(labels.files.items()):
        if role == "classes":
            continue
        with _text(file) as opened:
            yield from parse(opened, file, None if role == "all" else role)


def _image_folders(paths: Sequence[str], splits_named: Set[str]) -> Iterator[Line]:
    """`[...]/train/n01440764/n01440764_10026.JPEG`: folders name the class and the split."""
    for path in sorted(set(paths)):
        folders = PurePosixPath(path).parts[:-1]
        classes = [folder for folder in folders if WNID.fullmatch(folder)]
        splits = [folder for folder in folders if folder.lower() in splits_named]
        if classes or splits:
            value, split = (found[-1] if found else None for found in (classes, splits))
            yield Line((path,), value, split)


def in_class_folder(path: str) -> bool:
    """Whether a folder of ImageNet's names the class of a file, so that no list need know its name."""
    return any(WNID.fullmatch(folder) for folder in PurePosixPath(path).parts[:-1])


def _imagenet(opened: TextIO, file: str, split: str | None) -> Iterator[Line]:
    """`LOC_val_solution.csv`: ImageId,PredictionString, the latter `class x0 y0 x1 y1` for each box."""
    for number, row in _rows(opened, file, ("ImageId", "PredictionString"), ","):
        value = row["PredictionString"].split(" ")[0]
        if not WNID.fullmatch(value):
            raise LabelError(f"{file}, line {number}: {short(value)} is not a class of ImageNet, such as n01440764")
        yield Line((row["ImageId"],), value, split)


def _kinetics(opened: TextIO, file: str, split: str | None) -> Iterator[Line]:
    """label,youtube_id,time_start,time_end,split[,is_cc]; files are named `id_start_end`, older copies `id`."""
    for number, row in _rows(opened, file, ("youtube_id", "time_start", "time_end"), ","):
        name = row["youtube_id"]
        for column in ("time_start", "time_end"):
            if not row[column].isdecimal() or len(row[column]) > LONGEST_NUMBER:
                raise LabelError(
                    f"{file}, line {number}: {column} is {short(row[column])}; whole seconds were expected"
                )
        names = (f"{name}_{int(row['time_start']):06d}_{int(row['time_end']):06d}", name)
        yield Line(names, row.get("label") or None, split or row.get("split") or None, name)


def _something(classes: Any) -> Parser:  # noqa: ANN401 - JSON is Any
    """[{id, label, template, placeholders}], and of the test set [{id}] or lines `id;template`."""
    known = set(classes) if isinstance(classes, dict) else None

    def parse(opened: TextIO, file: str, split: str | None) -> Iterator[Line]:
        if file.endswith(".csv"):
            reader = csv.reader(_lines(opened, file), delimiter=";")
            try:
                entries = [{"id": row[0], "template": row[1]} if len(row) == 2 else row for row in reader if row]
            except csv.Error as error:
                raise LabelError(f"{file}, line {reader.line_num}: {error}") from None
        else:
            entries = _json(opened, file)
        for number, entry in enumerate(_entries(entries, file), 1):
            value = entry.get("template")
            if not isinstance(entry.get("id"), str) or not isinstance(value, str | None):
                raise LabelError(f"{file}, entry {number}: 'id' and 'template' were expected, found {short(entry)}")
            value = value.replace("[", "").replace("]", "") if value is not None else None
            if known is not None and value is not None and value not in known:
                raise LabelError(f"{file}, entry {number}: {short(value)} is not among the classes")
            yield Line((entry["id"],), value, split)

    return parse


def _diving(classes: Any) -> Parser:  # noqa: ANN401 - JSON is Any
    """[{vid_name, label, start_frame, end_frame}], one file for each dive; each class is a list of words."""

    def parse(opened: TextIO, file: str, split: str | None) -> Iterator[Line]:
        for number, entry in enumerate(_entries(_json(opened, file), file), 1):
            name, label = entry.get("vid_name"), entry.get("label")
            if not isinstance(name, str) or not isinstance(label, int):
                raise LabelError(f"{file}, entry {number}: 'vid_name' and 'label' were expected, found {short(entry)}")
            if classes is not None and not (isinstance(classes, list) and 0 <= label < len(classes)):
                raise LabelError(f"{file}, entry {number}: label {label} is not among the {len(classes)} classes")
            words: Any = [str(label)] if classes is None else classes[label]
            if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
                raise LabelError(f"the class {label} of {file} is no list of words but {short(words)}")
            value = "_".join(words)
            competition = name.rsplit("_", 1)[0]  # the video that the dive was cut from
            yield Line((name,), value, split, competition)

    return parse


def _internvid(opened: TextIO, file: str, split: str | None) -> Iterator[Line]:
    """One JSON object on each line: YoutubeID, Start_timestamp, End_timestamp, Caption and scores."""
    for number, text in enumerate(_lines(opened, file), 1):
        if not text.strip():
            continue
        try:
            entry = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise LabelError(f"{file}, line {number}: no JSON object: {error}") from None
        if not isinstance(entry, dict) or not isinstance(entry.get("YoutubeID"), str):
            raise LabelError(f"{file}, line {number}: 'YoutubeID' was expected, found {short(entry)}")
        start_us, end_us = (_clock(entry, key, file, number) for key in ("Start_timestamp", "End_timestamp"))
        if end_us <= start_us:
            raise LabelError(f"{file}, line {number}: a span needs a later end, found {start_us} to {end_us} us")
        caption = entry.get("Caption")
        yield Line((entry["YoutubeID"],), str(caption) if caption else None, split, None, start_us, end_us)


def _classes(labels: LabelConfig) -> Any:  # noqa: ANN401 - JSON is Any
    if (file := labels.files.get("classes")) is None:
        return None
    with _text(file) as opened:
        return _json(opened, file)


def _json(opened: TextIO, file: str) -> Any:  # noqa: ANN401 - JSON is Any
    text = opened.read(LARGEST_JSON + 1)
    if len(text) > LARGEST_JSON:
        raise LabelError(f"label file {file}: more than {LARGEST_JSON} characters, which JSON would need at once")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LabelError(f"label file {file} is not JSON: {error}") from None


def _entries(value: Any, file: str) -> Iterator[dict[str, Any]]:  # noqa: ANN401 - JSON is Any
    if not isinstance(value, list):
        raise LabelError(f"label file {file}: a list was expected, found {short(value)}")
    for number, entry in enumerate(value, 1):
        if not isinstance(entry, dict):
            raise LabelError(f"{file}, entry {number}: an object was expected, found {short(entry)}")
        yield entry


def _rows(opened: TextIO, file: str, needed: Sequence[str], mark: str) -> Iterator[tuple[int, dict[str, str]]]:
    reader = csv.DictReader(_lines(opened, file), delimiter=mark, strict=True)
    try:
        missing = [name for name in needed if name not in (reader.fieldnames or ())]
        if missing:
            found = named_columns(reader.fieldnames or ())
            raise LabelError(f"label file {file} has no column {', '.join(missing)}; it has {found}")
        for row in reader:
            if None in row or None in row.values():
                raise LabelError(f"{file}, line {reader.line_num}: another number of cells than the header has")
            yield reader.line_num, row
    except csv.Error as error:
        raise LabelError(f"{file}, line {reader.line_num}: {error}") from None


def _clock(entry: dict[str, Any], key: str, file: str, number: int) -> int:
    """`00:03:10.567` in microseconds."""
    found = CLOCK.fullmatch(str(entry.get(key)))
    if found is None:
        raise LabelError(
            f"{file}, line {number}: {key} is {short(entry.get(key))}; a time like 00:03:10.567 was expected"
        )
    hours, minutes, seconds, part = found.groups()
    return (int(hours) * 3600 + int(minutes) * 60 + int(seconds)) * 1_000_000 + int((part or "").ljust(6, "0"))


def named_columns(columns: Sequence[str]) -> str:
    """The first columns of a table, for a message."""
    return ", ".join(column[:COLUMN_SHOWN] for column in columns[:COLUMNS_NAMED]) or "none"


def short(value: object) -> str:
    """A value as a message shows it."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
