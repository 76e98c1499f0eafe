"""Draft a first corpus.yaml for a folder of media files: what is in it, how it is labelled, and clips that fit.

Labels are recognised by trial: each layout that the label files could have is read, and the one that labels the most
files is taken. Only a sample of the media files is opened, in the sandbox.
"""

import csv
import io
import json
import os
import re
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import polars as pl
from jinja2 import Environment, StrictUndefined

from nextvid.config.benchmarks import BenchmarkConfig
from nextvid.config.corpus import CorpusConfig, EncodingConfig, load_corpus
from nextvid.config.datasets import RESERVED_TARGETS, DatasetConfig, LabelConfig
from nextvid.config.project import Project
from nextvid.corpus.labels import label_bytes, read_labels
from nextvid.corpus.layouts import SPLIT_NAMES, WNID
from nextvid.corpus.sources import Listing, list_dataset
from nextvid.machine import taken_cores
from nextvid.plain_text import printable
from nextvid.video.fetch import map_files
from nextvid.video.probe import Inspection, MediaFacts, inspect_file
from nextvid.video.sandbox import Sandbox
from storage import atomic, remote
from storage.errors import ConfigError, CorpusError, NExTVidError, RefusedError
from storage.root import DataRoot
from storage.schemas import SPLITS

SAMPLED = 48  # our choice: files that are opened; their median length is known to a seventh of its spread
TIMEOUT_S = 60.0  # our choice: a probe takes milliseconds
LABEL_FILE_BYTES = 200_000_000  # our choice: a larger list is not tried; InternVid's has 45 GB
SMALL_BATCH = 0.25  # of the labelled files: the hash split and the held-out clips leave .64 of them to the heads
LABELLED_SHARE = 0.5  # our choice: fewer labelled files than this are chance
CLASSES_A_FILE = 0.5  # our choice: a column with more values than this a file is no class
DEMO_FRAMES, DEMO_FPS_HZ = 8, 4.0  # what the recipe `demo` reads (docs/demo.md)
DEMO_AUTOENCODER = Path(__file__).parents[2] / "examples" / "demo" / "autoencoder"
SPLIT_WORDS = {**{split: split for split in SPLITS}, **SPLIT_NAMES}
CLASS_COLUMNS = frozenset(
    {"label", "labels", "class", "classes", "category", "action", "target"}
)  # names of csv columns
ROLES = {**SPLIT_WORDS, "vali": "val"}  # in names of label files, such as something-something-v2-validation.json

TEMPLATE = """\
# A first project for {{ shown }}, drafted by `nextvid init`. Every key: docs/corpus.md.
# {{ seen }}
{%- for note in notes %}
# {{ note }}
{%- endfor %}

root: {{ root }} # everything that is made; it may be an object store, beside a local `runs_root`

encoding:
  # The small autoencoder of the demo, trained on drawings: good to try the whole graph on a laptop, not for results.
  # For results convert VA-VAE once, `nextvid import-vavae vavae-imagenet256-f16d32-dinov2.pt vavae`, write
  # `autoencoder: vavae` and `resolution: 256`, clips of 16 frames, and train `--recipe nextvid_s_latent` on a GPU.
  autoencoder: {{ autoencoder }}
  resolution: 64

datasets:
  {{ name }}:
    uri: {{ uri }}
    {%- if tar %}
    tar: true # its files are members of tar files
    {%- endif %}
    weight: 1.0 # share of training draws, relative to the other datasets
    clips:
      # {{ spans }}
      - {{ policy }}
    {%- if labels %}
    labels:
      {%- for key, value in labels %}
      {{ key }}: {{ value }}
      {%- endfor %}
    {%- else %}
    # No labels were found. They can be folders, a csv file, or as ImageNet, Kinetics, SSv2, Diving48 publish them:
    # labels: {layout: csv, file: labels.csv, targets: {class: label}, split_column: split}
    {%- endif %}
    quarantine_budget: {{ budget }} # a batch with a larger share of unreadable files fails its checks
    licence: unknown # shown in the model card
{%- if targets %}

benchmarks: # probe tasks; what their test split holds is never trained on
  {%- for target in targets %}
  {{ target }}:
    datasets: [{{ name }}]
    target: {{ target }}
    policy: {{ policy }}
    {%- if batch %}
    batch: {{ batch }} # clips of a step of the probe's heads; 32 where there are enough
    {%- endif %}
  {%- endfor %}
{%- endif %}
"""


@dataclass(frozen=True)
class Draft:
    """A corpus.yaml that was written, and what was seen."""

    path: str
    dataset: str
    files: dict[str, int]  # by kind
    unreadable: int  # of the sampled ones
    labels: str  # the layout
    labelled: int  # files
    targets: tuple[str, ...]
    notes: tuple[str, ...]
    next: str  # a command

    def text(self) -> str:
        """The draft, for people."""
        counts = " and ".join(f"{count:,} {kind}s" for kind, count in self.files.items())
        labels = "no labels found"
        if self.labels != "none":
            labels = f"labels of layout '{self.labels}' for {self.labelled:,} files: {', '.join(self.targets)}"
        return "\n".join(
            [f"{self.path}: dataset {self.dataset}, {counts}; {labels}", *self.notes, f"next: {self.next}"]
        )


def draft_corpus(folder: str, out: str = "corpus.yaml", autoencoder: str | None = None) -> Draft:
    """Look at a folder or fsspec URL and write a corpus.yaml that works as it is.

    Raises RefusedError where `out` exists, ConfigError without an autoencoder, CorpusError for a folder that cannot be
    listed or holds no media files.
    """
    remote.refuse_protocol(folder, "folder")
    path = Path(out).absolute()
    if path.exists():
        raise RefusedError(f"{path} exists: name another file with --out, or remove it")
    if autoencoder is None and not DEMO_AUTOENCODER.is_dir():
        raise ConfigError("the demo's autoencoder is not installed: name a folder of weights with --autoencoder")
    weights = str(Path(autoencoder).absolute()) if autoencoder else str(DEMO_AUTOENCODER)
    uri = folder.rstrip("/") if "://" in folder else str(Path(folder).expanduser().absolute())
    if remote.is_local(uri) and not (place := Path(uri.removeprefix("file://"))).is_dir():
        raise CorpusError(f"{folder} is not a folder" + (": name the one that it is in" if place.exists() else ""))
    name = re.sub(r"[^a-z0-9]+", "_", PurePosixPath(uri).name.lower()).strip("_") or "media"
    root = _root(name, uri, path.parent)
    tar, listing = _listed(uri, name, root, weights, path)
    paths = listing.files["path"].to_list()
    facts, unreadable = _sample(listing.files)
    labels, labelled, targets = _labels(uri, paths)
    policy, spans = _policy(facts)
    batch = max(1, round(SMALL_BATCH * labelled))
    kinds = Counter(listing.files["kind"].to_list())
    notes = []
    if listing.ignored:
        ignored = ", ".join(f"{n} {printable(extension)}" for extension, n in listing.ignored.most_common(5))
        notes.append(f"ignored: {ignored}")
    if not kinds["video"]:
        notes.append("images alone are encoded, not trained on: a recipe needs videos too, here or in another dataset")
    if unreadable:
        notes.append(f"{unreadable} of {len(facts) + unreadable} sampled files cannot be read; `media` says why")
    if labels.layout != "none" and labelled < len(paths):
        notes.append(f"{len(paths) - labelled:,} of {len(paths):,} files have no label in what was recognised")
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)  # noqa: S701 - YAML
    text = environment.from_string(TEMPLATE).render(
        uri=_quoted(uri),
        shown=printable(uri),
        name=name,
        tar=tar,
        root=_quoted(os.path.relpath(root, path.parent)),
        autoencoder=_quoted(weights),
        seen=_seen(kinds, facts),
        notes=notes,
        policy=policy,
        spans=spans,
        labels=[
            (key, _quoted(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
            for key, value in labels.model_dump(mode="json", exclude_defaults=True).items()
        ],
        targets=targets,
        batch=batch if batch < BenchmarkConfig.model_fields["batch"].default else None,
        budget=0.05 if not unreadable else min(0.5, round(0.05 + 2 * unreadable / (len(facts) + unreadable), 2)),
    )
    atomic.create_exclusively(str(path), f"{text.rstrip()}\n".encode())
    load_corpus(path)  # what was written is what is read
    goal = f"{'report' if targets else 'samples'} --recipe demo" if kinds["video"] else "latents"
    command = f"nextvid make {goal} --corpus {out}"
    return Draft(str(path), name, dict(kinds), unreadable, labels.layout, labelled, targets, tuple(notes), command)


def _listed(uri: str, name: str, root: str, weights: str, path: Path) -> tuple[bool, Listing]:
    """Whether the files are members of tar files, and the files. Raises CorpusError where there are none."""
    for tar in (False, True):
        datasets = {name: DatasetConfig(uri=uri, tar=tar)}
        corpus = CorpusConfig(root=root, encoding=EncodingConfig(autoencoder=weights), datasets=datasets)
        listing = list_dataset(Project(corpus, DataRoot.open(root), path, corpus), name)
        if listing.files.height:
            return tar, listing
        if ".tar" not in listing.ignored:
            break
    ignored = ", ".join(f"{count} {extension}" for extension, count in listing.ignored.most_common(5))
    what = f"it has {ignored}" if ignored else "it is empty"
    what += "; pictures in parquet files need 'parquet_column'" if ".parquet" in listing.ignored else ""
    raise CorpusError(f"{uri} holds no video and no image ({what})")


def _quoted(text: str) -> str:
    """Text as YAML reads it; JSON's strings are YAML's."""
    return text if re.fullmatch(r"[\w./-]+", text, re.ASCII) else json.dumps(text, ensure_ascii=False)


def _root(name: str, uri: str, folder: Path) -> str:
    """A folder beside corpus.yaml, but never within the media folder, whose pictures would be listed as sources."""
    if not remote.is_local(uri):
        return str(folder / f"{name}_nextvid")
    media = Path(uri.removeprefix("file://"))
    inside = folder == media or media in folder.parents
    return str((media.parent if inside else folder) / f"{name}_nextvid")


def _sample(files: pl.DataFrame) -> tuple[list[MediaFacts], int]:
    """Facts of a sample spread over the listing, and how many of it cannot be read."""
    step = max(1, files.height // SAMPLED)
    chosen = files.gather_every(step).head(SAMPLED)
    facts, unreadable = [], 0
    with (
        taken_cores(min(2, chosen.height)) as workers,  # a sample of SAMPLED files is worth no more
        tempfile.TemporaryDirectory(prefix="nextvid-") as folder,
        Sandbox(workers) as sandbox,
    ):
        tasks = ((uri, ()) for uri in chosen["uri"])
        for _, _, found in map_files(sandbox, inspect_file, tasks, Path(folder), TIMEOUT_S):
            if isinstance(found, Inspection) and found.facts is not None:
                facts.append(found.facts)
            else:
                unreadable += 1
    return facts, unreadable


def _seen(kinds: Counter[str], facts: Sequence[MediaFacts]) -> str:
    """One line about what is in the folder."""
    seen = " and ".join(f"{count:,} {kind}s" for kind, count in kinds.items())
    videos = [fact for fact in facts if fact.kind == "video"]
    if facts:
        seen += f"; {statistics.median(f.width for f in facts):.0f} x {statistics.median(f.height for f in facts):.0f}"
    if videos:
        lengths = sorted(fact.duration_us / 1e6 for fact in videos)
        rate = statistics.median(fact.fps_hz for fact in videos)
        seen += f", {lengths[0]:.1f} to {lengths[-1]:.1f} s (median {statistics.median(lengths):.1f}), {rate:.3g} fps"
    return f"{seen} in a sample of {len(facts)} files"


def _policy(facts: Sequence[MediaFacts]) -> tuple[str, str]:
    """A clip policy for the recipe `demo`, and what it spans, in words."""
    videos = [fact for fact in facts if fact.kind == "video"]
    if facts and not videos:
        return "{frames: 1, crop: centre}", "images: one frame each"
    slowest = min((fact.fps_hz for fact in videos if fact.fps_hz), default=DEMO_FPS_HZ)
    fps_hz = DEMO_FPS_HZ if slowest >= DEMO_FPS_HZ else max(0.1, round(slowest, 2))
    spans = (
        f"{DEMO_FRAMES} frames at {fps_hz:g} a second: {DEMO_FRAMES / fps_hz:g} s; in a shorter shot they are closer"
    )
    return f"{{frames: {DEMO_FRAMES}, fps: {fps_hz:g}, crop: centre}}", spans


def _labels(uri: str, paths: Sequence[str]) -> tuple[LabelConfig, int, tuple[str, ...]]:
    """The labels that name the most files, how many, and targets that a benchmark can predict."""
    best: tuple[LabelConfig, int, tuple[str, ...]] = (LabelConfig(), 0, ())
    for labels in _candidates(uri, paths):
        try:
            found = read_labels(DatasetConfig(uri=uri, labels=labels), paths)
        except NExTVidError:  # not this layout
            continue
        values = found.filter(~pl.col("target").is_in([*RESERVED_TARGETS, "caption"]))
        labelled = values["path"].n_unique()
        classes = values.group_by("target").agg(pl.col("value").n_unique())
        targets = tuple(sorted(t for t, count in classes.iter_rows() if 2 <= count <= CLASSES_A_FILE * labelled))
        if labelled > best[1] and labelled >= LABELLED_SHARE * len(paths) and (targets or labels.layout == "internvid"):
            splits = set(found.filter(pl.col("target") == "split")["value"])
            if "val" in splits and "test" not in splits:  # as where the test labels are kept back
                labels = labels.model_copy(update={"split_names": {**labels.split_names, "val": "test"}})
            kept = {t: column for t, column in labels.targets.items() if t in targets}
            best = labels.model_copy(update={"targets": kept}) if labels.layout == "csv" else labels, labelled, targets
    return best


def _candidates(uri: str, paths: Sequence[str]) -> Iterator[LabelConfig]:
    """Every way in which the folder could be labelled, the most specific first."""
    names = {PurePosixPath(path).name for path in paths}
    lists: dict[str, dict[str, str]] = {}  # layout of a public data set -> role -> file
    for file, text in _label_files(uri):
        with suppress(csv.Error):  # no table
            if layout := _layout(file, text):
                parts = re.split(r"[^a-z]+", PurePosixPath(file).stem.lower())
                role = next((ROLES[part] for part in parts if part in ROLES), "all")  # the split that its name names
                lists.setdefault(layout, {})[role] = file
            elif file.lower().endswith(".csv"):
                yield from _csv_candidates(file, text, names)
    for layout, files in sorted(lists.items()):
        yield LabelConfig.model_validate({"layout": layout, "files": files})
    if any(WNID.fullmatch(part) for path in paths[:1000] for part in PurePosixPath(path).parts[:-1]):
        yield LabelConfig(layout="imagenet")
    above = {part.lower() for path in paths for part in PurePosixPath(path).parts[:-2]}
    words = {word: SPLIT_WORDS[word] for word in sorted(above & SPLIT_WORDS.keys())}
    yield LabelConfig.model_validate({"layout": "folders", "split_names": words})


def _label_files(uri: str) -> Iterator[tuple[str, str]]:
    """(path, text) of csv, json and jsonl files in the folder and beside it, that are small enough to try."""
    for place in (uri, uri.rpartition("/")[0]):
        try:
            fs, key = remote.connect(place)
            found = sorted(fs.ls(key, detail=True), key=lambda info: str(info["name"]))
        except (OSError, ValueError, NExTVidError):  # the folder above may be closed to us
            continue
        for info in found:
            name = PurePosixPath(str(info["name"])).name
            small = info["type"] == "file" and int(info.get("size") or 0) <= LABEL_FILE_BYTES
            if small and name.lower().endswith((".csv", ".json", ".jsonl")):
                file = f"{place}/{name}"
                yield file, label_bytes(file).decode("utf-8-sig", "replace").lstrip()


def _layout(file: str, text: str) -> str | None:
    """The public data set whose list this is, by its columns or keys."""
    if file.lower().endswith(".csv"):
        header = set(next(csv.reader(io.StringIO(text)), []))
        if {"youtube_id", "time_start", "time_end"} <= header:
            return "kinetics400"
        return "imagenet" if {"ImageId", "PredictionString"} <= header else None
    try:
        first: Any = json.loads(text.split("\n", 1)[0] if file.lower().endswith(".jsonl") else text)
    except (ValueError, RecursionError):
        return None
    entry = first[0] if isinstance(first, list) and first else first
    keys = {"YoutubeID": "internvid", "vid_name": "diving48", "id": "ssv2"}
    return next((layout for key, layout in keys.items() if isinstance(entry, dict) and key in entry), None)


def _csv_candidates(file: str, text: str, names: Set[str]) -> Iterator[LabelConfig]:
    """A csv file by the column that names media files, relative to the folder or to the csv file."""
    header = next(csv.reader(io.StringIO(text)), [])
    rows = list(csv.DictReader(io.StringIO(text), restval=""))
    cells = {column: [str(row[column]) for row in rows] for column in header}
    paths = next((c for c in header if any(PurePosixPath(cell).name in names for cell in cells[c])), None)
    if paths is None or len(cells) != len(header):
        return
    others = [column for column in header if column != paths]
    split = next((c for c in others if {cell.lower() for cell in cells[c]} - {""} <= SPLIT_WORDS.keys()), None)
    group = next((c for c in others if c.lower() in ("group", "group_id", "subject", "scene", "video_id")), None)
    licence = next((c for c in others if c.lower() in ("licence", "license")), None)
    classes = [c for c in others if c.lower() in CLASS_COLUMNS]
    classes = classes or [c for c in others if c not in (split, group, licence) and _repeats(cells[c])]
    targets = {re.sub(r"[^a-z0-9]+", "_", column.lower()).strip("_"): column for column in classes}
    targets = {name: column for name, column in targets.items() if name and name not in RESERVED_TARGETS}
    for base in (None, file.rpartition("/")[0]):
        yield LabelConfig(
            layout="csv",
            file=file,
            path_column=paths,
            path_base=base,
            targets=targets,
            split_column=split,
            group_column=group,
            licence_column=licence,
        )


def _repeats(cells: Sequence[str]) -> bool:
    """Whether a column's values could be classes: words that repeat, no numbers."""
    values = {cell for cell in cells if cell}
    words = not any(re.fullmatch(r"-?[\d.]+(e-?\d+)?", value) for value in values)
    return words and 2 <= len(values) <= CLASSES_A_FILE * len(cells)
