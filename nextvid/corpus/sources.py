"""The asset `sources`: list the datasets' folders, compare with the last listing, assign new files to batches.

No file is opened but archives that are new or changed, whose members are files like others (video/archives.py). A
listing that fails is an error, never "all files deleted".
"""

import difflib
import errno
import os
import stat
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
import polars as pl

from nextvid.config.project import Project
from nextvid.corpus import assignment
from nextvid.corpus.assignment import BatchChange, latest, merge
from nextvid.corpus.labels import label_digests, label_files, readable_labels
from nextvid.corpus.members import ARCHIVE, DAMAGED, Row, archives_of, known_members, opened
from nextvid.making.batches import dataset_of
from nextvid.making.outcome import Outcome
from nextvid.video.archives import fingerprint_of, split_uri
from nextvid.video.probe import kind_of
from storage import atomic, remote, tables
from storage.digest import digest
from storage.errors import ConfigError, ConflictError, CorpusError, LabelError, NExTVidError
from storage.records import publish_record, read_record
from storage.remote import is_local
from storage.schemas import Sources

Known = Mapping[str, tuple[int, str]]  # URI -> (size in bytes, fingerprint) in an earlier listing

NOT_UTF8 = "name is not UTF-8"  # the fingerprint of a file whose name no table can hold; media.py rejects it
NAMED = 5  # our choice: batches that a message names
EXTENSIONS = 50  # our choice: of ignored files, the most frequent ones are counted one by one
TRIES = 8  # our choice: how often other writers may be faster before we give up


@dataclass(frozen=True)
class Listing:
    """A dataset's media files: columns uri, path, kind, size_bytes, fingerprint; sorted by uri."""

    dataset: str
    files: pl.DataFrame
    waiting: pl.DataFrame  # not yet seen twice with the same size and fingerprint
    ignored: Counter[str]  # files that are none of ours, by extension
    empty: tuple[str, ...]  # empty sub-folders

    def unseen(self, known: pl.DataFrame) -> list[str]:
        """URIs of which this listing says nothing: files that wait, and those in archives that are damaged now."""
        damaged = {uri for uri, text in self.files.select("uri", "fingerprint").iter_rows() if text.startswith(DAMAGED)}
        inside = [uri for uri in known["uri"].unique() if (split := split_uri(uri)) and split[0] in damaged]
        return [*self.waiting["uri"], *inside]


def list_dataset(
    project: Project, name: str, known: Known | None = None, sources: pl.DataFrame | None = None
) -> Listing:
    """List a dataset's folder. With `known`, an earlier listing, files that it lacks or that changed are `waiting`.

    Archives that are as `sources`, the dataset's rows of Sources, has them are not opened. Raises CorpusError where the
    folder is missing or any part of it cannot be listed.
    """
    config = project.corpus.datasets[name]
    uri = config.uri
    try:
        rows, empty, ignored = list_folder(uri, config.follow_links, archives_of(config))
        below, roots = f"{uri.rstrip('/')}/", (project.root.url, project.root.runs_url)
        made = tuple(f"{url}/" for url in roots if url.startswith(below))  # previews and reports are no sources
        rows = [row for row in rows if not row[0].startswith(made)]
        if any(row[2] == ARCHIVE for row in rows):
            members = {} if sources is None else known_members(sources, config.parquet_column)
            rows = [one for row in rows for one in opened(row, config.parquet_column, members, ignored)]
    except CorpusError as error:
        raise CorpusError(f"dataset {name}: {error}") from error
    except (FileNotFoundError, NotADirectoryError) as error:
        if str(error) != uri:  # a sub-folder that was there a moment ago
            raise CorpusError(f"dataset {name}: listing {uri} failed ({error!r}); nothing was changed") from error
        raise CorpusError(f"dataset {name}: {uri} is not a folder; correct its 'uri' or mount it") from error
    except Exception as error:  # object stores raise their clients' own classes; any failure means an unknown listing
        reason = str(error) if isinstance(error, NExTVidError) else repr(error)
        raise CorpusError(f"dataset {name}: listing {uri} failed ({reason}); nothing was changed") from error
    columns = Sources.create_empty().select("uri", "path", "kind", "size_bytes", "fingerprint").schema
    frame = pl.DataFrame(rows, columns, orient="row").sort("uri")
    if known is None:
        return Listing(name, frame, frame.clear(), ignored, tuple(empty))
    same = pl.Series([known.get(row[0]) == (row[3], row[4]) for row in frame.iter_rows()], dtype=pl.Boolean)
    return Listing(name, frame.filter(same), frame.filter(~same), ignored, tuple(empty))


def list_folder(
    uri: str, followed: Sequence[str] = (), archives: tuple[str, ...] = ()
) -> tuple[list[Row], list[str], Counter[str]]:
    """The media files below a folder, its empty sub-folders, and how many other files there are by extension.

    Files of the extensions `archives` are rows of the kind ARCHIVE. Links to folders lead below `followed` alone.
    Raises FileNotFoundError or NotADirectoryError where it is no folder.
    """
    rows: list[Row] = []
    empty: list[str] = []
    ignored: Counter[str] = Counter()
    _, top = remote.connect(uri)
    for info in _walk(uri, top, empty, followed):
        row = _row(top, uri, info, archives)
        if isinstance(row, str):
            ignored[row] += 1
        else:
            rows.append(row)
    return rows, empty, ignored


def update_sources(project: Project, settle: bool = False, datasets: Sequence[str] | None = None) -> list[BatchChange]:
    """List the datasets (all unless named) and write `sources/`; returns what changed, by batch.

    With `settle`, a new or changed file is taken only once two such listings in a row saw the same size and
    fingerprint, since it may still be written. A dataset that cannot be listed stays as it was and does not stop the
    others: CorpusError names it after they are written.
    """
    changes, _, failed = _update(project, settle, project.corpus.datasets if datasets is None else datasets)
    if failed:
        raise CorpusError("; ".join(failed.values()))
    return changes


def _update(
    project: Project, settle: bool, datasets: Iterable[str]
) -> tuple[list[BatchChange], list[Listing], dict[str, str]]:
    """What changed, the listings, and by dataset why it cannot be listed."""
    names = sorted(datasets)
    for _ in range(TRIES):
        read = assignment.catch_up(project.root)
        listings, tables_after, changes = [], [], []
        failed: dict[str, str] = {}
        for name in names:
            known = known_sources(project, name)
            try:
                before = _listed_before(project, name, known) if settle else None
                listing = list_dataset(project, name, before, known)
                _refuse_vanished(project, listing, known)
            except CorpusError as error:
                failed[name] = str(error)
                continue
            config = project.corpus.datasets[name]
            now = datetime.now(UTC)
            here = assignment.placed(known, pl.concat([listing.files, listing.waiting]), config.uri)
            rows, changed = merge(here, listing.files, listing.unseen(here), name, config, now)
            if here is not known:
                told = {change.batch for change in changed}
                files = here.filter(~pl.col("batch").is_in(list(told))).group_by("batch").len()
                changed += [BatchChange(batch, 0, count, 0) for batch, count in files.sort("batch").iter_rows()]
            listings.append(listing)
            tables_after.append(rows.filter(pl.col("batch").is_in([change.batch for change in changed])))
            changes += changed
        try:
            if changes:
                assignment.publish_change(project.root, read, pl.concat(tables_after).sort("batch", "uri", "revision"))
        except ConflictError:
            continue
        if settle:
            _remember(project, listings)
        return sorted(changes, key=lambda change: change.batch), listings, failed
    raise CorpusError(f"{project.root.folder('sources')}: {TRIES} other writers were faster; list again later")


def make_sources(project: Project) -> Outcome:
    """List all datasets without waiting for files to settle.

    One whose folder or label files cannot be read stays as it was, as it does in the sensor: the outcome says why.
    """
    started_s = time.perf_counter()
    labels, unreadable = readable_labels(project.corpus.datasets)
    changes, listings, unlisted = _update(project, False, labels)
    unreadable |= unlisted
    without, faults = _labels_without_file(project, [name for name in labels if name not in unlisted])
    unreadable |= faults
    ignored = sum((listing.ignored for listing in listings), Counter[str]())
    rows = tables.read_tables(project.root, "sources", None, Sources)
    return Outcome(
        asset="sources",
        partition=None,
        made=bool(changes),
        rows=rows.height,
        size_bytes=int(rows["size_bytes"].sum()),
        seconds=time.perf_counter() - started_s,
        numbers={
            "batches": len(project.root.batches()),
            "added": sum(change.added for change in changes),
            "changed": sum(change.changed for change in changes),
            "gone": sum(change.gone for change in changes),
            "ignored": ignored.total(),
            **{f"ignored_{extension}": count for extension, count in ignored.most_common(EXTENSIONS)},
            **without,
        },
        unreadable=unreadable,
    )


def _labels_without_file(
    project: Project, datasets: Iterable[str]
) -> tuple[dict[str, int | float | str], dict[str, str]]:
    """How many names in label files no listed file has, and the first of each dataset; by dataset why nobody knows."""
    examples, count, faults = [], 0, dict[str, str]()
    for dataset in sorted(datasets):
        paths = known_sources(project, dataset)["path"].to_list()
        try:
            files = label_files(project.corpus.datasets[dataset], paths)
        except LabelError as error:
            faults[dataset] = f"dataset {dataset}: {error}"
            continue
        if without := sorted({name for file in files for name in file.without}):
            count += len(without)
            examples.append(f"{dataset}: {without[0]!r}")
    if not count:
        return {}, faults
    return {"labels_without_file": count, "labels_without_file_such_as": ", ".join(examples)}, faults


def known_sources(project: Project, name: str) -> pl.DataFrame:
    """Every row of `sources` of one dataset, sorted by uri and revision."""
    batches = [batch for batch in project.root.batches("sources") if dataset_of(batch) == name]
    return tables.read_tables(project.root, "sources", batches, Sources).sort("uri", "revision")


def refuse_unknown(project: Project, batch: str) -> None:
    """Raise ConfigError, with the nearest name, for a batch that does not exist."""
    known = project.root.batches()
    if batch in known:
        return
    near = difflib.get_close_matches(batch, known, n=1)
    listed = ", ".join(known[:NAMED]) + (", ..." if len(known) > NAMED else "")
    hint = f"did you mean '{near[0]}'?" if near else f"there are {listed or 'none yet'}"
    raise ConfigError(f"there is no batch '{batch}'; {hint}")


def batch_fingerprint(project: Project, batch: str, labels: Sequence[str] | None = None) -> str:
    """Digest of a batch's listing and of its label files' bytes: where it changes, the batch is made again.

    `labels` are the digests of the dataset's label files, where the caller has them already.
    """
    rows = tables.read_table(project.root.table("sources", batch), Sources).sort("uri", "revision")
    files = rows.select("uri", "revision", "size_bytes", "fingerprint", pl.col("gone_at").is_not_null().alias("gone"))
    config = project.corpus.datasets.get(dataset_of(batch))
    if labels is None:
        labels = label_digests(config.labels) if config else []
    return digest({"files": [list(row) for row in files.iter_rows()], "labels": list(labels)})


def is_below(real: str, folders: Iterable[str]) -> bool:
    """Whether a real path is below one of these local folders, which may be links themselves."""
    return any(real.startswith(os.path.realpath(folder).rstrip("/") + "/") for folder in folders)


def _walk(uri: str, top: str, empty: list[str], followed: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    """Every file below `top`, the key of `uri`; empty folders are added to `empty`, and links to folders elsewhere.

    A link to a folder below one of `followed` is that folder; any other is given like a file, so that it is counted.
    Not fsspec's own walk, which ignores errors below the first level with any setting. Raises FileNotFoundError(uri)
    where `top` is no folder.
    """
    folders, targets = [top], set[str]()
    while folders:
        folder = folders.pop()
        found = _entries(uri, folder, is_top=folder == top)
        if not found:
            empty.append(folder.removeprefix(top).strip("/"))
        for info in found:
            if info.get("islink") and Path(info["name"]).is_dir():
                target = os.path.realpath(info["name"])
                if is_below(f"{target}/", followed) and target not in targets:  # a link may lead to its own folder
                    targets.add(target)
                    folders.append(info["name"])
                else:
                    empty.append(info["name"].removeprefix(top).strip("/"))
                    yield info
            elif info["type"] != "directory":
                yield info
            elif info["name"].rstrip("/") != folder.rstrip("/"):
                folders.append(info["name"])
            else:
                yield from _behind_empty_name(uri, folder)


def _behind_empty_name(uri: str, folder: str) -> Iterator[Mapping[str, Any]]:
    """Keys such as `folder//b.mp4`, which no client lists as a folder; none where it was the folder's own marker."""
    found = remote.ask(uri, lambda fs, _: fs.find(folder, prefix="/", detail=True))
    yield from (info for key, info in found.items() if key.startswith(folder.rstrip("/") + "//"))


def _entries(uri: str, folder: str, *, is_top: bool) -> list[Mapping[str, Any]]:
    if is_local(uri):
        fs = fsspec.filesystem("file")
        if is_top and not fs.isdir(folder):
            raise FileNotFoundError(uri)
        return list(fs.ls(folder, detail=True))
    if is_top:  # the Hub's client keeps listings whatever it is told
        remote.connect(uri)[0].invalidate_cache()
    try:
        found = remote.ask(uri, lambda fs, _: list(fs.ls(folder, detail=True)))
    except FileNotFoundError as error:
        raise FileNotFoundError(uri if is_top else folder) from error
    if is_top and [info["name"] for info in found if info["type"] != "directory"] == [folder]:
        raise FileNotFoundError(uri)  # it is a file
    return found


def _row(top: str, uri: str, info: Mapping[str, Any], archives: tuple[str, ...]) -> Row | str:
    """A media file, or the word under which another file is counted: its extension, `hidden`, `link to a folder`."""
    name = str(info["name"])
    if (shown := _utf8(name)) != name:
        path, kind = shown.removeprefix(top.rstrip("/") + "/"), str(kind_of(shown) or "")
        return (f"{uri.rstrip('/')}/{path}", path, kind, 0, NOT_UTF8) if kind else "no extension"
    path = name.removeprefix(top.rstrip("/") + "/")
    if any(part.startswith(".") for part in path.split("/")):
        return "hidden"
    if info.get("islink") and Path(name).is_dir():
        return "link to a folder"
    kind = ARCHIVE if path.endswith(archives) else str(kind_of(name) or "")
    if not kind or name.endswith("/"):
        return PurePosixPath(path).suffix.lower() or "no extension"
    size = int(info.get("size") or 0)
    fingerprint = fingerprint_of(info)
    if is_local(uri):
        size, fingerprint, regular = _local(name)
        if not regular:
            return "no regular file"
    return f"{uri.rstrip('/')}/{path}", path, kind, size, fingerprint


def _utf8(name: str) -> str:
    """A name as tables can hold it: bytes that are no UTF-8 as escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _local(path: str) -> tuple[int, str, bool]:
    """Size, modification time and whether it is a file, links followed; a broken link counts as an unreadable file."""
    try:
        found = os.stat(path)  # noqa: PTH116 - one call per file of a listing
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):
            return 0, "broken link", True
        raise
    return found.st_size, f"mtime {found.st_mtime_ns}", stat.S_ISREG(found.st_mode)


def _refuse_vanished(project: Project, listing: Listing, known: pl.DataFrame) -> None:
    """Refuse an empty folder, at the top or below, that had files: more often it is an unmounted disk than intended."""
    seen = listing.files.height + listing.waiting.height
    present = latest(known).filter(pl.col("gone_at").is_null())
    uri = project.corpus.datasets[listing.dataset].uri
    if present.height and not seen:
        raise CorpusError(
            f"dataset {listing.dataset}: {uri} holds none of its {present.height} files; mount it, or, if they were "
            "deleted on purpose, remove the dataset from corpus.yaml"
        )
    for folder in map(_utf8, filter(None, listing.empty)):
        if missed := present.filter(pl.col("path").str.starts_with(f"{folder}/")).height:
            raise CorpusError(
                f"dataset {listing.dataset}: {uri.rstrip('/')}/{folder} is empty, or a link that is not followed, "
                f"where {missed} files were; mount it, name its target in 'follow_links', or, if they were deleted on "
                "purpose, remove it"
            )


def _pending(project: Project) -> str:
    return f"{project.root.folder('sources')}/pending.json"


def _waiting_before(project: Project) -> dict[str, dict[str, Any]]:
    """What the last settling listings left waiting, by dataset and URI; the file may be removed without harm."""
    path = _pending(project)
    return dict(read_record(path, "remove it").get("waiting", {})) if atomic.exists(path) else {}


def _listed_before(project: Project, name: str, known: pl.DataFrame) -> dict[str, tuple[int, str]]:
    """A dataset's files by the tables and the last settling listing."""
    rows = latest(known).select("uri", "size_bytes", "fingerprint")
    found = {uri: (size, fingerprint) for uri, size, fingerprint in rows.iter_rows()}
    return found | {uri: (size, text) for uri, (size, text) in _waiting_before(project).get(name, {}).items()}


def _remember(project: Project, listings: Sequence[Listing]) -> None:
    """Keep the waiting files for the next settling listing to compare with."""
    before = _waiting_before(project)
    after = dict(before)
    for listing in listings:
        rows = listing.waiting.select("uri", "size_bytes", "fingerprint")
        after[listing.dataset] = {uri: [size, text] for uri, size, text in rows.iter_rows()}
    after = {name: files for name, files in after.items() if files}
    if after != before:
        publish_record(_pending(project), {"waiting": after})
