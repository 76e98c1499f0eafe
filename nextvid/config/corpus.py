"""corpus.yaml: the one file that configures a project, as frozen, strict models, and how it is found and read.

Holds what a user writes: root, encoding, curation, datasets, benchmarks (design, sections 1, 2, 5, 6). Holds no
training configuration (nextvid/config/recipe.py) and touches no data.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import Field, field_validator, model_validator

from nextvid.config.strict import Count, Share, Strict, parse
from storage.digest import digest_config
from storage.errors import ConfigError
from storage.remote import refuse_credentials
from storage.root import CACHE_FOLDER, DataRoot

NAME = re.compile(r"[a-z0-9_]+")  # design 2: dataset names are part of paths and partition keys
RESERVED_TARGETS = frozenset({"split", "group"})  # design 2
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
AtLeastZero = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Threshold = Annotated[float, Field(allow_inf_nan=False)] | None


class PixelConfig(Strict):
    """Frames kept beside the latents, as JPEG, for recipes that read or predict pixels (docs/decisions/0010)."""

    quality: int = Field(default=90, ge=1, le=100)  # research store E: 40.7 dB at 271 kB a clip of 16 x 256 x 256
    subsampling: Literal["4:2:0", "4:2:2", "4:4:4"] = "4:2:0"


class EncodingConfig(Strict):
    """How given frames become stored bytes. The autoencoder's digest, not its path, enters the encoding spec."""

    autoencoder: str  # folder of diffusers weights, relative to corpus.yaml
    resolution: Count = 256  # pixels of the square view
    precision: Literal["fp32", "bf16"] = "fp32"
    posterior: Literal["mean", "sample"] = "mean"
    storage: Literal["float16", "keepbits7", "int8"] = "float16"
    pixels: PixelConfig | None = None  # none are kept; they have a spec of their own and may be added later
    batch_frames: Count = 64  # how, not what: frames per forward; in no digest
    device: Literal["auto", "cpu", "cuda"] = "auto"  # how, not what
    devices: int = Field(default=0, ge=0)  # how: processes that encode, one a GPU; 0 is every GPU, or one on CPU


class ShotConfig(Strict):
    """The first pass: what changes here decodes again."""

    thumb_width: Count = 80  # research video 8: detectors fed 80x45 thumbnails
    thumb_height: Count = 45
    # Cuts and dissolves: tuned on one half of the real media (docs/decisions/0018)
    cut_change: Positive = 16.0  # grey levels, the changes of Y, Cb and Cr added up
    cut_ratio: Positive = 2.6  # of the steps beside it
    min_shot_s: AtLeastZero = 0.25
    dissolve_lag_s: Positive = 0.32  # a lag in seconds, not frames (research video 8)
    dissolve_change: Positive = 20.0  # grey levels over two lags (research video 8)
    dissolve_residual: Positive = 0.6  # share of the change
    dissolve_dip: AtLeastZero = 0.3  # by how much the dip of the variance exceeds the residual
    fade_luma: AtLeastZero = 12.0  # ThresholdDetector(12)
    sample_hz: Positive = 4.0  # motion and freeze are measured at this rate
    hash_hz: Positive = 1.0  # PDQ at 1 fps


class FilterConfig(Strict):
    """Thresholds on scores: what changes here decodes nothing again. None switches a test off."""

    trim_s: AtLeastZero = 0.25  # design 6: at cuts, not at file ends
    motion_min: Threshold = 0.1  # % of the diagonal per 0.25 s (research video 8)
    motion_max: Threshold = 6.0
    freeze_max: Threshold = 0.5
    luma_min: Threshold = 16.0
    luma_max: Threshold = 235.0
    blur_min: Threshold = 8.0


class DuplicateConfig(Strict):
    """Near-duplicate search over PDQ hashes."""

    distance: int = Field(
        default=31, ge=0, le=31
    )  # bits of 256, what the search finds without fail; no unrelated pair below 102 (research video 8)
    quality_min: int = Field(default=50, ge=0, le=100)  # design 4: flatter frames join nothing


class CurationConfig(Strict):
    """First pass, filters, duplicates."""

    shots: ShotConfig = ShotConfig()
    filters: FilterConfig = FilterConfig()
    duplicates: DuplicateConfig = DuplicateConfig()


class ClipPolicy(Strict):
    """How clips are cut from a shot: F frames at `fps` or every `stride`-th source frame."""

    frames: Count
    fps: Positive | None = None
    stride: Count | None = None
    clips_per_shot: Count = 1
    starts: Literal["tile", "random"] = "tile"
    views: Count = 1
    # random: area 0.3-1.0, aspect 0.75-1.35 (method.md 8); centre: a square, with three views also those at the ends of
    # the longer side (method.md 9)
    crop: Literal["whole", "centre", "random"] = "random"
    flip: bool = False  # flip half of the views
    pad: Literal["skip", "fit", "repeat_last"] = "fit"

    @model_validator(mode="after")
    def _one_rate(self) -> Self:
        if self.frames > 1 and (self.fps is None) == (self.stride is None):
            raise ValueError("a clip policy names exactly one of 'fps' and 'stride'")
        if self.crop == "centre" and self.views not in (1, 3):
            raise ValueError(f"crop 'centre' has 1 or 3 views, not {self.views}")
        return self


class SplitConfig(Strict):
    """Shares of the hash split, for files without an official one. What is left is train."""

    val: Share = 0.0
    test: Share = 0.2  # design 4: 80 to 20

    @model_validator(mode="after")
    def _shares(self) -> Self:
        if self.val + self.test > 1:
            raise ValueError(f"shares val {self.val} and test {self.test} add up to more than 1")
        return self


class LabelConfig(Strict):
    """Where labels stand: `none`, `folders` (the last folder's name), `csv` (columns by name), or as a public data set
    publishes them.

    A csv file may have two columns more, in seconds of the file's own clock: a line with both labels that span alone.
    The others take `files`, by the split that each one lists (`all`: none, or its own column) and `classes`:
    imagenet (folders; LOC_val_solution.csv for flat ones), kinetics400 (csv), ssv2 (json; labels.json as classes),
    diving48 (json; the vocabulary as classes), internvid (jsonl, a caption a span).
    """

    layout: Literal["none", "folders", "csv", "imagenet", "kinetics400", "ssv2", "diving48", "internvid"] = "none"
    file: str | None = None  # csv: path relative to corpus.yaml
    files: dict[Literal["train", "val", "test", "all", "classes"], str] = Field(default_factory=dict)
    split_names: dict[str, Literal["train", "val", "test"]] = Field(
        default_factory=dict
    )  # other words for splits, in columns and ImageNet's folders; {val: test} where val is what is tested on
    path_column: str = "path"
    path_base: str | None = None  # folder that the file's paths start from; the dataset's URI unless given
    targets: dict[str, str] = Field(
        default_factory=dict
    )  # csv: target -> column; others: {target: ""}, by default the target is `class`, of internvid `caption`
    split_column: str | None = None
    group_column: str | None = None
    start_column: str = "start_s"
    end_column: str = "end_s"

    @model_validator(mode="after")
    def _fits_layout(self) -> Self:
        if self.layout == "csv" and self.file is None:
            raise ValueError("labels of layout 'csv' need 'file'")
        if self.layout != "csv" and (self.file or self.path_base or self.split_column or self.group_column):
            raise ValueError(f"'file', 'path_base' and columns belong to layout 'csv', not '{self.layout}'")
        if self.layout != "csv" and len(self.targets) > 1:
            raise ValueError(f"layout '{self.layout}' has one target")
        if self.files and not self.by_name:
            raise ValueError(f"'files' belong to the layouts of public data sets, not to '{self.layout}'")
        if self.by_name and self.layout != "imagenet" and not set(self.files) - {"classes"}:
            raise ValueError(f"labels of layout '{self.layout}' need 'files', by split")
        if RESERVED_TARGETS & set(self.targets):
            raise ValueError("targets 'split' and 'group' are reserved: use 'split_column' and 'group_column'")
        return self

    @property
    def by_name(self) -> bool:
        """Whether labels name files by their stem alone, wherever they lie (layouts.py)."""
        return self.layout not in {"none", "folders", "csv"}

    @property
    def target(self) -> str:
        """The one target of every layout but csv."""
        return next(iter(self.targets), "caption" if self.layout == "internvid" else "class")

    def every_file(self) -> tuple[str, ...]:
        """The label files there are, in a fixed order."""
        return (*((self.file,) if self.file else ()), *(file for _, file in sorted(self.files.items())))


class DatasetConfig(Strict):
    """One dataset. With a weight it is pretrained on, by its clip policies; benchmarks name it for probing."""

    uri: str  # folder or fsspec URL, relative to corpus.yaml
    weight: Positive | None = None
    clips: tuple[ClipPolicy, ...] = ()
    clips_per_media: Count | None = None  # of each length; docs/decisions/0019
    labels: LabelConfig = LabelConfig()
    split: SplitConfig = SplitConfig()
    quarantine_budget: Share = 0.05  # largest share of files that may be quarantined before the batch stops
    licence: str = "unknown"
    max_batch_videos: Count = 1000  # design 2
    max_batch_images: Count = 10000

    @model_validator(mode="after")
    def _weight_needs_clips(self) -> Self:
        if self.weight is not None and not self.clips:
            raise ValueError("a dataset with a weight needs at least one clip policy under 'clips'")
        return self


class BenchmarkConfig(Strict):
    """A probe task: which datasets, which target, which clips."""

    datasets: tuple[str, ...] = Field(min_length=1)
    target: str
    policy: ClipPolicy  # segments: clips_per_shot; views: views; `crop` is `centre` unless the protocol names another
    epochs: Count = 20  # Tab. 10
    batch: Count = 32
    seeds: Count = 3  # research demo 5: one probe seed is noise for claims under 6 points

    @field_validator("policy")
    @classmethod
    def _protocol(cls, policy: ClipPolicy) -> ClipPolicy:
        if policy.flip:
            raise ValueError("clips of a benchmark are never flipped: leave 'flip' out")
        return policy if "crop" in policy.model_fields_set else policy.model_copy(update={"crop": "centre"})


class CacheConfig(Strict):
    """Local copies of a trainset's shards, where `root` is an object store. How, not what: in no digest."""

    folder: str = CACHE_FOLDER  # shared by all processes of a machine
    size_gb: AtLeastZero = 20.0  # our choice; a set that does not fit is read row by row, as with 0


class CorpusConfig(Strict):
    """The whole of corpus.yaml, paths made absolute."""

    root: str
    runs_root: str | None = None
    cache: CacheConfig = CacheConfig()
    encoding: EncodingConfig
    curation: CurationConfig = CurationConfig()
    datasets: dict[str, DatasetConfig]
    benchmarks: dict[str, BenchmarkConfig] = Field(default_factory=dict)
    reencode: Literal["ask", "auto"] = "ask"
    min_complete: Share = 1.0

    @field_validator("datasets", "benchmarks")
    @classmethod
    def _names(cls, value: dict[str, object]) -> dict[str, object]:
        for name in value:
            if not NAME.fullmatch(name):
                raise ValueError(f"'{name}' is not a name: use lower-case letters, digits and underscores")
        return value

    @model_validator(mode="after")
    def _benchmarks_exist(self) -> Self:
        for name, benchmark in self.benchmarks.items():
            for dataset in benchmark.datasets:
                if dataset not in self.datasets:
                    raise ValueError(f"benchmark '{name}' names dataset '{dataset}', which is not among the datasets")
        return self

    def weights(self) -> dict[str, float]:
        """Mixture weights by dataset, as written."""
        return {name: d.weight for name, d in self.datasets.items() if d.weight is not None}

    def curation_digest(self, dataset: str | None = None) -> str:
        """Digest of what decides rows: curation, and each dataset's clip policies, splits and the benchmarks.

        With `dataset`, of what decides that one's rows: another dataset comes and goes without it.
        """
        datasets = {
            n: d.model_dump(mode="json", include={"clips", "clips_per_media", "split", "labels"})
            for n, d in self.datasets.items()
            if dataset in (None, n)
        }
        for value in datasets.values():
            for place in ("file", "files", "path_base"):  # a path changes no row; its content belongs to the listing
                value["labels"].pop(place)
        benchmarks = {
            n: b.model_dump(mode="json", include={"target", "policy"})
            | {"datasets": [name for name in b.datasets if name in datasets]}
            for n, b in self.benchmarks.items()
            if datasets.keys() & set(b.datasets)
        }
        return digest_config(
            {"curation": self.curation.model_dump(mode="json"), "datasets": datasets, "benchmarks": benchmarks}
        )


def corpus_path(given: str | None = None) -> Path:
    """The corpus.yaml in force: as given, else NEXTVID_CORPUS, else ./corpus.yaml."""
    return Path(given or os.environ.get("NEXTVID_CORPUS") or "corpus.yaml").absolute()


def load_corpus(path: str | Path | None = None) -> CorpusConfig:
    """Read and check corpus.yaml; relative paths resolve against the file. Raises ConfigError."""
    file = corpus_path(str(path) if path else None)
    if not file.is_file():
        raise ConfigError(f"{file}: there is no corpus.yaml; name it with --corpus or the variable NEXTVID_CORPUS")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: not readable as YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: expected keys such as 'root' and 'datasets', found {type(values).__name__}")
    corpus = parse(CorpusConfig, values, str(file))
    refuse_credentials(corpus.root, f"{file}, root")
    for name, dataset in corpus.datasets.items():
        refuse_credentials(dataset.uri, f"{file}, datasets.{name}.uri")
    return _absolute(corpus, file.parent)


def _absolute(corpus: CorpusConfig, base: Path) -> CorpusConfig:
    """Resolve every relative path against the folder of corpus.yaml; URLs stay as they are."""

    def resolve(path: str) -> str:
        return path if "://" in path else str((base / Path(path).expanduser()).resolve())

    datasets = {
        name: dataset.model_copy(
            update={
                "uri": resolve(dataset.uri),
                "labels": dataset.labels.model_copy(
                    update={
                        "file": resolve(dataset.labels.file) if dataset.labels.file else None,
                        "files": {role: resolve(file) for role, file in dataset.labels.files.items()},
                        "path_base": resolve(dataset.labels.path_base) if dataset.labels.path_base else None,
                    }
                ),
            }
        )
        for name, dataset in corpus.datasets.items()
    }
    encoding = corpus.encoding.model_copy(update={"autoencoder": resolve(corpus.encoding.autoencoder)})
    runs_root = resolve(corpus.runs_root) if corpus.runs_root else None
    return corpus.model_copy(
        update={
            "root": resolve(corpus.root),
            "runs_root": runs_root,
            "cache": corpus.cache.model_copy(update={"folder": resolve(corpus.cache.folder)}),
            "datasets": datasets,
            "encoding": encoding,
        }
    )


@dataclass(frozen=True)
class Project:
    """A corpus.yaml and the data root that it names: what every maker takes first."""

    corpus: CorpusConfig
    root: DataRoot
    path: Path


def open_project(path: str | Path | None = None) -> Project:
    """The project of `--corpus`, else NEXTVID_CORPUS, else ./corpus.yaml. Raises ConfigError."""
    file = corpus_path(str(path) if path else None)
    corpus = load_corpus(file)
    cache = corpus.cache
    root = DataRoot.open(corpus.root, corpus.runs_root, cache.folder, round(cache.size_gb * 1e9))
    return Project(corpus, root, file)
