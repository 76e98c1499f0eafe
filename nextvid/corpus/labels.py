"""Read a dataset's labels into one long table by path, whatever their layout, and find contradictions.

A row is one value of one target for a span of a file; a null span means the whole file. `split`, `group` and `licence`
are reserved targets and always about the whole file. Empty cells are no labels; wrong cells are errors that name the
file and line.
"""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import PurePosixPath
from unicodedata import normalize

import polars as pl

from nextvid.config.datasets import DatasetConfig, LabelConfig
from nextvid.corpus.layouts import in_class_folder, named_columns, opened_bytes, read_lines, short, split_words
from nextvid.making.outcome import Check, Number
from nextvid.video.archives import PARQUET, split_uri
from storage.digest import digest_stream
from storage.errors import LabelError
from storage.remote import is_local
from storage.schemas import SPLITS

NAMED = 3  # names without a file that a message shows; our choice
# Our choices: of a csv table, which is in memory as a whole
LARGEST_BYTES, MOST_COLUMNS, LONGEST_CELL = 2_000_000_000, 10_000, 100_000
FAULT_SHOWN = 300  # our choice: characters of a parser's message
LATEST_S = 1e9  # of a span in seconds, 30 years: microseconds have to fit 64 bits
SCHEMA = {"path": pl.String, "start_us": pl.Int64, "end_us": pl.Int64, "target": pl.String, "value": pl.String}


def label_bytes(file: str) -> bytes:
    """A label file's bytes. Raises LabelError where it cannot be read, or is larger than what is read at once."""
    with opened_bytes(file) as opened:
        data = opened.read(LARGEST_BYTES + 1)
    if len(data) > LARGEST_BYTES:
        raise LabelError(f"label file {file}: more than {LARGEST_BYTES} bytes, which a csv table needs at once")
    return data


def label_digests(labels: LabelConfig) -> list[str]:
    """Digests of the label files' bytes, read in pieces, since some have 45 GB. Raises LabelError."""
    digests = []
    for file in labels.every_file():
        with opened_bytes(file) as opened:
            digests.append(digest_stream(opened))
    return digests


def readable_labels(datasets: Mapping[str, DatasetConfig]) -> tuple[dict[str, Sequence[str]], dict[str, str]]:
    """Digests of label files by dataset, and by dataset why its label files cannot be read."""
    found: dict[str, Sequence[str]] = {}
    errors: dict[str, str] = {}
    for name, dataset in datasets.items():
        try:
            found[name] = label_digests(dataset.labels)
        except LabelError as error:
            errors[name] = f"dataset {name}: {error}"
    return found, errors


def read_labels(config: DatasetConfig, paths: Sequence[str]) -> pl.DataFrame:
    """Labels of the files at `paths` (relative to the dataset's URI): columns path, start_us, end_us, target, value.

    Unique and sorted. Raises LabelError for a file that cannot be read or lacks a column, and for wrong cells.
    """
    match config.labels.layout:
        case "none":
            return pl.DataFrame(schema=SCHEMA)
        case "folders":
            rows = [row for path in sorted(set(paths)) for row in _from_folders(path, config.labels)]
            return pl.DataFrame(rows, SCHEMA, orient="row")
        case "csv":
            return _from_csv(config, paths)
        case _:
            return _by_name(config.labels, paths)


def _from_folders(path: str, labels: LabelConfig) -> Iterator[tuple[str, None, None, str, str]]:
    """The class of a file, which is its last folder, and with `split_names` the split that another folder names."""
    folders = PurePosixPath(path).parts[:-1]
    if inside := split_uri(path):  # an archive is no folder, and rows of a table have none
        archive, member = map(PurePosixPath, inside)
        folders = archive.parts[:-1] + (() if archive.suffix == PARQUET else member.parts[:-1])
    *above, last = ("", *folders)
    if last:  # at the top there is no class
        yield path, None, None, labels.target, last
    words = split_words(labels)
    if labels.split_names and (splits := [words[folder.lower()] for folder in above if folder.lower() in words]):
        yield path, None, None, "split", splits[-1]


def doubled(config: DatasetConfig, paths: Sequence[str]) -> dict[str, str]:
    """Of `paths`, those that share their name with another, and that other: labels by name cannot tell them apart."""
    if not config.labels.by_name:
        return {}
    found: dict[str, list[str]] = {}
    for path in sorted(set(paths)):
        if config.labels.layout != "imagenet" or not in_class_folder(path):
            found.setdefault(PurePosixPath(path).stem, []).append(path)
    return {path: next(p for p in same if p != path) for same in found.values() if len(same) > 1 for path in same}


@dataclass(frozen=True)
class LabelFile:
    """One label file: the names that have a listed file, and those, sorted, that have none."""

    file: str
    with_file: frozenset[str]
    without: tuple[str, ...]


def label_files(config: DatasetConfig, paths: Sequence[str]) -> list[LabelFile]:
    """What the label files of a dataset name, where `paths` are all of its files.

    Of a csv file paths outside of the dataset count only where no line names a file of it.
    """
    labels = config.labels
    if labels.layout == "csv":
        assert labels.file is not None, "LabelConfig refuses csv without a file"
        given = _table(labels)[labels.path_column].drop_nulls()
        named = set(_relative(given, labels, config.uri).drop_nulls())
        listed = {normalize("NFC", path) for path in paths}
        without = set(given) if named.isdisjoint(listed) else named - listed
        return [LabelFile(labels.file, frozenset(named & listed), tuple(sorted(without)))]
    stems, found = {PurePosixPath(path).stem for path in paths}, []
    for role, file in sorted(labels.files.items()):
        if role != "classes":
            alone = labels.model_copy(
                update={"files": {r: f for r, f in labels.files.items() if r in (role, "classes")}}
            )
            names = {line.names[0]: not stems.isdisjoint(line.names) for line in read_lines(alone, (), None)}
            without = {name for name, has_file in names.items() if not has_file}
            found.append(LabelFile(file, frozenset(names.keys() - without), tuple(sorted(without))))
    return found


def label_checks(
    dataset: str, config: DatasetConfig, listed: Sequence[str], files: Sequence[str], unlabelled: Sequence[str]
) -> tuple[Check, Check]:
    """Whether each label file names a file of the dataset, and whether names and files have few of each other.

    `listed` are all paths of the dataset, `files` the usable ones of a batch, of which `unlabelled` have no label.
    """
    found = label_files(config, listed)
    vain = [file for file in found if file.without and not file.with_file]
    named, without = sum(len(file.with_file) for file in found), [name for file in found for name in file.without]
    numbers: dict[str, Number] = {
        "label_files": len(found),
        "names": named + len(without),
        "without_file": len(without),
    }
    if vain:
        numbers |= {"dataset": dataset, "file": vain[0].file, "such_as": _quoted(vain[0].without)}
    told = [
        f"no file of dataset {dataset} has a name that {file.file} lists, such as {_quoted(file.without)}: correct "
        "'uri' or 'labels' in corpus.yaml"
        for file in vain
    ]
    few = []
    if named < len(without):
        total = named + len(without)
        few.append(f"{len(without)} of {total} names in its label files have no file, such as {_quoted(without)}")
    if config.labels.layout != "none" and len(files) - len(unlabelled) < len(unlabelled):
        few.append(f"{len(unlabelled)} of {len(files)} files have no label, such as {_quoted(unlabelled)}")
    return (
        Check("labels_name_files", not vain, numbers, description="; ".join(told)),
        Check(
            "labels_meet_files",
            not few,
            {"files": len(files), "unlabelled": len(unlabelled)},
            description=f"dataset {dataset}: {'; '.join(few)}" if few else "",
        ),
    )


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:NAMED]))


def contradictions(labels: pl.DataFrame, key: str) -> pl.DataFrame:
    """(key, what): paths or media ids with several values of one target for one span; one row each, sorted."""
    spans = labels.group_by(key, "start_us", "end_us", "target").agg(pl.col("value").unique().sort())
    several = spans.filter(pl.col("value").list.len() > 1).with_columns(
        pl.concat_str([pl.col("target"), pl.lit(" is "), pl.col("value").list.join(" and ")]).alias("what")
    )
    return (
        several.sort(key, "start_us", "end_us", "target").group_by(key, maintain_order=True).agg(pl.col("what").first())
    )


def _by_name(labels: LabelConfig, paths: Sequence[str]) -> pl.DataFrame:
    """Lines of a public data set's lists, joined to paths by their stems; ImageNet's folders by whole paths."""
    by_name: dict[str, list[str]] = {path: [path] for path in paths}
    for path in sorted(set(paths)):
        stem = PurePosixPath(path).stem
        if stem != path:
            by_name.setdefault(stem, []).append(path)
    rows: list[tuple[str, int | None, int | None, str, str]] = []
    for line in read_lines(labels, paths, by_name.keys()):
        name = next(name for name in line.names if name in by_name)
        values = (
            (labels.target, line.value, line.start_us, line.end_us),
            ("group", line.group, None, None),
            ("split", line.split, None, None),
        )
        rows += [
            (path, start_us, end_us, target, value)
            for path in by_name[name]
            for target, value, start_us, end_us in values
            if value
        ]
    table = pl.DataFrame(rows, SCHEMA, orient="row")
    split = pl.col("target") == "split"
    where = " and ".join(labels.every_file()) or "folders"
    table = pl.concat([table.filter(~split), _splits(table.filter(split), where, labels)])
    return table.unique().sort("path", "target", "start_us", "end_us", "value")


def _from_csv(config: DatasetConfig, paths: Sequence[str]) -> pl.DataFrame:
    labels = config.labels
    assert labels.file is not None, "LabelConfig refuses csv without a file"
    table = _table(labels)
    named = _relative(table[labels.path_column], labels, config.uri)
    listed = pl.DataFrame({"path": sorted(set(paths))}, {"path": pl.String})
    listed = listed.with_columns(pl.col("path").str.normalize("NFC").alias("_named"))  # macOS writes names in NFD
    table = table.drop("path", strict=False).with_columns(named.alias("_named"))
    table = table.join(listed, on="_named", maintain_order="left_right")
    spanned = table.with_columns(
        _micros(table, labels.start_column, labels.file).alias("start_us"),
        _micros(table, labels.end_column, labels.file).alias("end_us"),
    )
    half = spanned["start_us"].is_null() != spanned["end_us"].is_null()
    wrong = spanned.filter(half | (spanned["end_us"] <= spanned["start_us"]).fill_null(False))
    if wrong.height:
        raise LabelError(
            f"{labels.file}, line {wrong['_line'][0]}: a span needs a start and a later end, found "
            f"{wrong['start_us'][0]} to {wrong['end_us'][0]} microseconds"
        )
    whole = spanned.with_columns(pl.lit(None, pl.Int64).alias("start_us"), pl.lit(None, pl.Int64).alias("end_us"))
    parts = [_column(spanned, column, target) for target, column in labels.targets.items()]
    if labels.group_column:
        parts.append(_column(whole, labels.group_column, "group"))
    if labels.licence_column:
        parts.append(_column(whole, labels.licence_column, "licence"))
    if labels.split_column:
        parts.append(_splits(_column(whole, labels.split_column, "split"), labels.file, labels))
    rows = pl.concat([pl.DataFrame(schema=SCHEMA), *parts])
    rows = rows.filter(pl.col("value").is_not_null() & (pl.col("value") != ""))
    return rows.unique().sort("path", "target", "start_us", "end_us", "value")


def _column(table: pl.DataFrame, column: str, target: str) -> pl.DataFrame:
    """One column of a csv file as rows of labels."""
    return table.select("path", "start_us", "end_us", pl.lit(target).alias("target"), pl.col(column).alias("value"))


def _table(labels: LabelConfig) -> pl.DataFrame:
    """The csv file, all cells as text, with a column `_line`. LabelError where a configured column is missing."""
    assert labels.file is not None
    data = label_bytes(labels.file)
    lines = csv.reader(io.TextIOWrapper(io.BytesIO(data), "utf-8-sig", "replace", newline=""))
    header: list[str] = []
    try:
        header = next(lines, [])
        if len(header) > MOST_COLUMNS:
            raise LabelError(f"label file {labels.file} has {len(header)} columns, more than {MOST_COLUMNS}")
        table = pl.read_csv(io.BytesIO(data), infer_schema=False)
    except (csv.Error, pl.exceptions.PolarsError) as error:
        fault = str(error).partition("\n")[0][:FAULT_SHOWN]  # the whole file may be in it
        with suppress(csv.Error):
            longer = (f"line {lines.line_num} has {len(line)} cells" for line in lines if len(line) > len(header))
            fault = next((f"{found}, its header {len(header)}" for found in longer if header), fault)
        raise LabelError(f"label file {labels.file} is no csv table with a header: {fault}") from None
    columns = [labels.split_column, labels.group_column, labels.licence_column]
    named = {labels.path_column, *labels.targets.values(), *(name for name in columns if name is not None)}
    spans = {labels.start_column, labels.end_column}
    if twice := sorted(name for name in named | spans if header.count(name) > 1):
        raise LabelError(f"label file {labels.file} has the column {', '.join(twice)} twice; rename one")
    if missing := sorted(named - set(table.columns)):
        raise LabelError(
            f"label file {labels.file} has no column {', '.join(missing)}; it has {named_columns(table.columns)}"
        )
    read = table.select(name for name in table.columns if name in named | spans)
    # header is line 1
    read = read.with_columns(pl.all().str.strip_chars(), (pl.int_range(pl.len()) + 2).alias("_line"))
    long = read.filter(pl.any_horizontal(pl.exclude("_line").str.len_bytes() > LONGEST_CELL))
    if long.height:
        raise LabelError(f"{labels.file}, line {long['_line'][0]}: a cell has more than {LONGEST_CELL} bytes")
    return read


def _relative(paths: pl.Series, labels: LabelConfig, uri: str) -> pl.Series:
    """Paths relative to the dataset's URI, in NFC; null for one outside of it, such as another dataset's file.

    A path may be absolute, as in the lists of VideoMAE, V-JEPA and mmaction2; others start from `path_base`.
    """
    top = normalize("NFC", uri.removeprefix("file://").rstrip("/") + "/")
    base = top if labels.path_base is None else labels.path_base.rstrip("/") + "/"
    given = pl.col("given")
    absolute = given.str.starts_with("/") | given.str.contains("://", literal=True)
    whole = pl.when(absolute).then(given).otherwise(pl.lit(base) + given.str.strip_prefix("./")).str.normalize("NFC")
    if is_local(uri):  # on object stores `//` is a part of the key
        whole = whole.str.strip_prefix("file://").str.replace_all(r"/(?:\.?/)+", "/")
    inside = pl.when(whole.str.starts_with(top)).then(whole.str.strip_prefix(top))
    return pl.DataFrame({"given": paths}).select(path=inside)["path"]


def _micros(table: pl.DataFrame, column: str, file: str) -> pl.Series:
    """A column of seconds as whole microseconds; null where it is missing or empty."""
    if column not in table.columns:
        return pl.Series(column, [None] * table.height, pl.Int64)
    text = table[column].replace("", None)
    seconds = text.cast(pl.Float64, strict=False)
    # nothing that is not finite is between these
    wrong = (seconds.is_null() & text.is_not_null()) | ~seconds.is_between(-LATEST_S, LATEST_S).fill_null(True)
    if wrong.any():
        row = table.filter(wrong).row(0, named=True)
        raise LabelError(f"{file}, line {row['_line']}: {column} is {short(row[column])}; seconds were expected")
    return (seconds * 1_000_000).round(0, mode="half_to_even").cast(pl.Int64)


def _splits(rows: pl.DataFrame, file: str, labels: LabelConfig) -> pl.DataFrame:
    """Official splits as train, val or test."""
    value = pl.col("value").str.to_lowercase().replace(split_words(labels))
    named = rows.with_columns(value.alias("value"))
    wrong = named.filter(pl.col("value").is_not_null() & ~pl.col("value").is_in([*SPLITS, ""]))
    if wrong.height:
        raise LabelError(
            f"{file}: {wrong['path'][0]} has the split {wrong['value'][0]!r}; expected one of {', '.join(SPLITS)} or "
            f"{', '.join(sorted(split_words(labels)))}"
        )
    return named
