"""The blocks `datasets` and `benchmarks` of corpus.yaml: files, labels, how clips are cut, what is probed."""

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from nextvid.config.strict import Count, Positive, Share, Strict

RESERVED_TARGETS = frozenset({"split", "group"})  # columns of the labels table


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
