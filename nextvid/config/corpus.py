"""corpus.yaml: the one file that configures a project, as frozen, strict models, and how it is found and read."""

import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from nextvid.config.benchmarks import BenchmarkConfig, ProbedEncoderConfig
from nextvid.config.datasets import CurationConfig, DatasetConfig, SplitConfig
from nextvid.config.strict import SHOWN_CHARACTERS, AtLeastZero, Count, Share, Strict, parse
from nextvid.config.yaml_file import read_yaml
from storage.digest import digest_config
from storage.errors import ConfigError
from storage.remote import PROTOCOLS, refuse_credentials, refuse_protocol
from storage.root import CACHE_FOLDER

Command = Annotated[tuple[str, ...], Field(min_length=1)]
NAME = re.compile(r"[a-z0-9_]+")  # names are parts of paths and partition keys


class PixelConfig(Strict):
    """Frames kept beside the latents, as JPEG, for recipes that read or predict pixels (docs/decisions/0010)."""

    # quality 90: 40.7 dB at 271 kB a clip of 16 x 256 x 256, our measurement
    quality: int = Field(90, ge=1, le=100, description="JPEG quality")
    subsampling: Literal["4:2:0", "4:2:2", "4:4:4"] = Field("4:2:0", description="chroma subsampling of the JPEGs")


class EncodingConfig(Strict):
    """How frames become latents. The autoencoder's weights decide the encoding spec, not its path."""

    autoencoder: str = Field(description="folder of diffusers weights, relative to corpus.yaml")
    resolution: Count = Field(256, description="side in pixels of the square view that is encoded")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="arithmetic of the autoencoder")
    posterior: Literal["mean", "sample"] = Field(
        "mean", description="store the posterior's mean, or one sample of it, drawn from the row's id"
    )
    storage: Literal["float16", "int8"] = Field(
        "float16",
        description="number format of stored latents; int8 is half the bytes, with a scale for each row and channel",
    )
    pixels: PixelConfig | None = Field(
        None, description="keep the frames too, as JPEG, for recipes that read pixels; may be added later"
    )


class MachineConfig(Strict):
    """What of this machine is used: devices for latents, probes and samples, cores for everything. In no digest."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto is a GPU where there is one")
    devices: int = Field(
        0, ge=0, description="processes that encode, one a GPU; 0 is one for every free GPU, or one on the CPU"
    )
    batch_frames: Count = Field(64, description="frames of one forward of the autoencoder")
    cores: Count | None = Field(
        None, description="most cores that one process uses; null: all that affinity, cgroup and NEXTVID_CORES allow"
    )


class CacheConfig(Strict):
    """Files that can be made again: copies of a trainset's shards, and features while probes learn. In no digest."""

    folder: str = Field(CACHE_FOLDER, description="the folder of these files, shared by all processes of a machine")
    size_gb: AtLeastZero = Field(
        20.0,
        description="largest size in gigabytes, of the copies and of the features; a trainset that does not fit is "
        "read row by row, features that do not fit are encoded again in each epoch",
    )


class CorpusConfig(Strict):
    """The content of corpus.yaml."""

    root: str = Field(description="folder or fsspec URL of everything that is made, relative to corpus.yaml")
    runs_root: str | None = Field(
        None, description="folder of runs, scores, samples and reports on a file system; by default `root`"
    )
    cache: CacheConfig = Field(
        CacheConfig(), description="local copies of shards on an object store, and features while probes learn"
    )
    execution: MachineConfig = Field(MachineConfig(), description="devices and cores of this machine")
    encoding: EncodingConfig = Field(description="how frames become latents")
    curation: CurationConfig = Field(CurationConfig(), description="how shots are found, filtered and compared")
    datasets: dict[str, DatasetConfig] = Field(description="datasets by name")
    benchmarks: dict[str, BenchmarkConfig] = Field(default_factory=dict, description="probe tasks by name")
    recipes: tuple[str, ...] = Field(
        (), description="recipes that this corpus is for: `cap: auto` of a dataset stores what they draw"
    )
    encoders: dict[str, ProbedEncoderConfig] = Field(
        default_factory=dict, description="encoders of others, by name, that are probed beside those of recipes"
    )
    reencode: Literal["ask", "auto"] = Field(
        "ask",
        description="whether a changed encoding, curation or benchmark waits for 'nextvid plan --accept', or is "
        "accepted at once and rebuilds what it changes",
    )
    on_failure: Annotated[str, Field(pattern="^https?://")] | Command | None = Field(
        None,
        description="a URL that a JSON message is posted to, or a command and its arguments that read it, when a run "
        "of Dagster fails for good; variables of the environment, such as ${SLACK_PATH}, are replaced in the URL",
    )
    protocols: tuple[str, ...] = Field(
        PROTOCOLS,
        description="protocols of fsspec that URLs here may have; others, such as `simplecache::` and `github://`, are "
        "refused, since they may read what nobody meant",
    )
    min_complete: Share = Field(1.0, description="share of the batches that must be complete before a trainset is made")

    @field_validator("datasets", "benchmarks", "encoders")
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

    @model_validator(mode="after")
    def _auto_needs_recipes(self) -> Self:
        for name, dataset in self.datasets.items():
            caps = dataset.cap.values() if isinstance(dataset.cap, dict) else [dataset.cap]
            if "auto" in caps and not self.recipes:
                raise ValueError(
                    f"'datasets.{name}.cap' is 'auto': name the recipes that it is for, as 'recipes: [nextvid_s]'"
                )
        return self

    def weights(self) -> dict[str, float]:
        """Mixture weights by dataset, as written."""
        return {name: d.weight for name, d in self.datasets.items() if d.weight is not None}

    def curation_digest(self, dataset: str | None = None) -> str:
        """Digest of what decides rows: curation, and each dataset's clip policies, splits and the benchmarks.

        With `dataset`, of what decides that one's rows: another dataset comes and goes without it.
        """
        datasets = {
            n: d.digested({"clips", "clips_per_media", "split", "labels", "licences"})
            for n, d in self.datasets.items()
            if dataset in (None, n)
        }
        for value in datasets.values():
            for place in ("file", "files", "path_base"):  # a path changes no row; its content belongs to the listing
                value["labels"].pop(place)
        benchmarks = {
            n: b.digested({"target", "policy"}) | {"datasets": [name for name in b.datasets if name in datasets]}
            for n, b in self.benchmarks.items()
            if datasets.keys() & set(b.datasets)
        }
        return digest_config({"curation": self.curation.digested(), "datasets": datasets, "benchmarks": benchmarks})


def corpus_path(given: str | None = None) -> Path:
    """The path of corpus.yaml: as given, else NEXTVID_CORPUS, else ./corpus.yaml."""
    return Path(given or os.environ.get("NEXTVID_CORPUS") or "corpus.yaml").absolute()


def load_corpus(path: str | Path | None = None) -> CorpusConfig:
    """Read and check corpus.yaml; relative paths resolve against the file. Raises ConfigError."""
    file = corpus_path(str(path) if path else None)
    if not file.is_file():
        raise ConfigError(
            f"{file}: there is no corpus.yaml; name it with --corpus or the variable NEXTVID_CORPUS, "
            "or write a first one: nextvid init FOLDER"
        )
    values = read_yaml(file)
    encoding = values.get("encoding")
    moved = [key for key in MachineConfig.model_fields if isinstance(encoding, dict) and key in encoding]
    if moved:
        lines = [
            f"{file}: 'encoding.{key}' is 'execution.{key}' now: move it to the block 'execution'" for key in moved
        ]
        raise ConfigError("\n".join(lines))
    corpus = parse(CorpusConfig, values, str(file))
    for where, url in _urls(corpus):
        refuse_protocol(url, f"{file}, {where}", corpus.protocols)
        refuse_credentials(url, f"{file}, {where}")
    corpus = _without_needless_tests(_absolute(corpus, file.parent))
    _refuse_shared_files(corpus, file)
    return corpus


def _urls(corpus: CorpusConfig) -> Iterator[tuple[str, str]]:
    """The key and value of each URL; what has no `://` is a path."""
    found = [("root", corpus.root), ("runs_root", corpus.runs_root or "")]
    found.append(("encoding.autoencoder", corpus.encoding.autoencoder))
    for name, dataset in corpus.datasets.items():
        found.append((f"datasets.{name}.uri", dataset.uri))
        files = [dataset.labels.file or "", *dataset.labels.files.values(), dataset.labels.path_base or ""]
        found += [(f"datasets.{name}.labels", file) for file in files]
    found += [(f"encoders.{name}.folder", encoder.folder or "") for name, encoder in corpus.encoders.items()]
    yield from ((where, url) for where, url in found if "://" in url)


def encoder_names(path: Path) -> tuple[str, ...]:
    """Names of the encoders of a corpus.yaml, for partitions; none of one that is not valid, as every step will say."""
    try:
        return tuple(load_corpus(path).encoders)
    except ConfigError:
        return ()


def _without_needless_tests(corpus: CorpusConfig) -> CorpusConfig:
    """A dataset that no benchmark names and whose `split` is not written holds nothing out (docs/decisions/0039)."""
    probed = {name for benchmark in corpus.benchmarks.values() for name in benchmark.datasets}
    datasets = {
        name: dataset
        if name in probed or "split" in dataset.model_fields_set
        else dataset.model_copy(update={"split": SplitConfig(val=0.0, test=0.0)})
        for name, dataset in corpus.datasets.items()
    }
    return corpus.model_copy(update={"datasets": datasets})


def _refuse_shared_files(corpus: CorpusConfig, file: Path) -> None:
    """A file belongs to one dataset: its batch, split and labels do. And what is made is no source."""
    for name, dataset in corpus.datasets.items():
        if corpus.root.rstrip("/") == dataset.uri.rstrip("/"):
            raise ConfigError(
                f"{file}: 'root' is the folder of dataset '{name}': name another folder, such as 'root: data'"
            )
    folders = sorted((f"{dataset.uri.rstrip('/')}/", name) for name, dataset in corpus.datasets.items())
    for (outer, one), (inner, other) in itertools.pairwise(folders):
        if inner.startswith(outer):
            where = "the same folder" if inner == outer else "a folder within the other's"
            raise ConfigError(
                f"{file}: datasets '{one}' and '{other}' list {where} ({inner}), so that a file would belong to both: "
                "keep one of them, or give each a folder of its own"
            )


def _absolute(corpus: CorpusConfig, base: Path) -> CorpusConfig:
    """Resolve every relative path against the folder of corpus.yaml; URLs stay as they are."""

    def resolve(path: str) -> str:
        try:
            return path if "://" in path else str((base / Path(path).expanduser()).resolve())
        except (RuntimeError, OSError) as error:  # `~` of a user that there is not, a name that is too long
            raise ConfigError(f"{base}: {path[:SHOWN_CHARACTERS]} is no path: {error}") from None

    datasets = {
        name: dataset.model_copy(
            update={
                "uri": resolve(dataset.uri),
                "follow_links": tuple(resolve(folder) for folder in dataset.follow_links),
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
    encoders = {
        name: encoder.model_copy(update={"folder": resolve(encoder.folder) if encoder.folder else None})
        for name, encoder in corpus.encoders.items()
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
            "encoders": encoders,
        }
    )
