"""The blocks of corpus.yaml that decide rows: `datasets`, and `curation` of shots and near-duplicates."""

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from nextvid.config.strict import AtLeastZero, Count, Positive, Share, Strict

RESERVED_TARGETS = frozenset({"split", "group", "licence"})  # columns of the labels table
Rows = Count | Literal["auto"]
Threshold = Annotated[float, Field(allow_inf_nan=False)] | None


class ClipPolicy(Strict):
    """How clips are cut from a shot: F frames at `fps` or every `stride`-th source frame."""

    YOUNGER = frozenset({"cut_from"})
    frames: Count = Field(description="frames of a clip; 1 for images")
    fps: Positive | None = Field(None, description="frames a second; a clip of several names this or `stride`")
    stride: Count | None = Field(None, description="every how many source frames, in the place of `fps`")
    clips_per_shot: Count = Field(
        1, description="clips of each shot, or of each file by `cut_from: file`; a benchmark's are its segments"
    )
    cut_from: Literal["shot", "file"] = Field(
        "shot",
        description="what is cut into equal segments: each shot, or the whole file, across its cuts. `file` in "
        "benchmarks alone; the paper's protocols of videos have it",
    )
    starts: Literal["tile", "random"] = Field(
        "tile",
        description="tile: in the middle of equal segments of the shot; random: anywhere, drawn from the clip's id",
    )
    views: Count = Field(1, description="crops of each clip")
    crop: Literal["whole", "centre", "random"] = Field(
        "random",
        description="whole: the picture, squeezed to a square; centre: a square, with 3 views also those at the "
        "ends of the longer side; random: 0.3 to 1 of the area at an aspect of 0.75 to 1.35. Benchmarks: centre by "
        "default",
    )  # docs/method.md 8 and 9
    flip: bool = Field(False, description="mirror half of the views; never in benchmarks")
    pad: Literal["skip", "fit", "repeat_last"] = Field(
        "fit",
        description="of a shot that is too short: skip: no clip; fit: frames closer together, so that the clip spans "
        "the shot; repeat_last: its last frame repeated",
    )  # docs/method.md 8

    @model_validator(mode="after")
    def _one_rate(self) -> Self:
        if self.frames > 1 and (self.fps is None) == (self.stride is None):
            raise ValueError("a clip policy names exactly one of 'fps' and 'stride'")
        if self.crop == "centre" and self.views not in (1, 3):
            raise ValueError(f"crop 'centre' has 1 or 3 views, not {self.views}")
        return self


class SplitConfig(Strict):
    """Shares of the split by hash, for files without an official split; the rest is train.

    Where no benchmark names the dataset, nothing is held out unless `split` is written (docs/decisions/0039).
    """

    val: Share = Field(0.0, description="share of validation")
    test: Share = Field(0.2, description="share of test")  # 80 to 20: our choice

    @model_validator(mode="after")
    def _shares(self) -> Self:
        if self.val + self.test > 1:
            raise ValueError(f"shares val {self.val} and test {self.test} add up to more than 1")
        return self


class LabelConfig(Strict):
    """Where labels are: `none`, `folders` (the last folder's name), `csv` (columns by name), or as a public data set
    publishes them.

    A csv file may have two columns more, in seconds: a line with both labels that span alone.
    Public data sets: imagenet (folders; LOC_val_solution.csv for flat ones), kinetics400 (csv), ssv2 (json; labels.json
    as classes), diving48 (json; the vocabulary as classes), internvid (jsonl, a caption a span).
    """

    YOUNGER = frozenset({"clock", "licence_column"})
    layout: Literal["none", "folders", "csv", "imagenet", "kinetics400", "ssv2", "diving48", "internvid"] = Field(
        "none", description="how labels are written, see above"
    )
    file: str | None = Field(None, description="csv: the file, relative to corpus.yaml")
    files: dict[Literal["train", "val", "test", "all", "classes"], str] = Field(
        default_factory=dict,
        description="layouts of public data sets: a file for each split that it lists (`all`: none, or its own "
        "column), and the list of `classes`",
    )
    split_names: dict[str, Literal["train", "val", "test"]] = Field(
        default_factory=dict,
        description="other words for splits, in columns and ImageNet's folders, as {val: test} where val is tested on; "
        "with it, layout `folders` takes the split from the folders above the last",
    )
    path_column: str = Field("path", description="csv: column of paths")
    path_base: str | None = Field(
        None, description="csv: folder that its paths start from; by default the dataset's uri"
    )
    targets: dict[str, str] = Field(
        default_factory=dict,
        description='csv: {target: column}; other layouts have one target, {name: ""}: `class` unless named, and '
        "`caption` for internvid",
    )
    split_column: str | None = Field(None, description="csv: column of splits; without it they are split by hash")
    group_column: str | None = Field(None, description="csv: column of groups; the hash split keeps a group together")
    licence_column: str | None = Field(None, description="csv: column of files' licences; empty: the dataset's")
    start_column: str = Field("start_s", description="csv: column of spans' starts in seconds, where there is one")
    end_column: str = Field("end_s", description="csv: column of spans' ends in seconds, where there is one")

    clock: Literal["first_frame", "file"] = Field(
        "first_frame",
        description="what spans count from, in a file whose first frame is not at 0: that frame, as players and "
        "annotation tools show it, or the zero of the file's own timestamps (ffprobe)",
    )  # docs/decisions/0039

    @model_validator(mode="after")
    def _fits_layout(self) -> Self:
        if self.layout == "csv" and self.file is None:
            raise ValueError("labels of layout 'csv' need 'file'")
        columns = (self.split_column, self.group_column, self.licence_column)
        if self.layout != "csv" and (self.file or self.path_base or any(columns)):
            raise ValueError(f"'file', 'path_base' and columns belong to layout 'csv', not '{self.layout}'")
        if self.layout != "csv" and len(self.targets) > 1:
            raise ValueError(f"layout '{self.layout}' has one target")
        if self.files and not self.by_name:
            raise ValueError(f"'files' belong to the layouts of public data sets, not to '{self.layout}'")
        if self.by_name and self.layout != "imagenet" and not set(self.files) - {"classes"}:
            raise ValueError(f"labels of layout '{self.layout}' need 'files', by split")
        if RESERVED_TARGETS & set(self.targets):
            raise ValueError("targets 'split', 'group' and 'licence' are reserved: use 'split_column' and its like")
        return self

    @property
    def by_name(self) -> bool:
        """Whether labels name files by their stem alone, in whatever folder (layouts.py)."""
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

    YOUNGER = frozenset({"licences"})
    uri: str = Field(description="folder or fsspec URL of the files, relative to corpus.yaml")
    follow_links: tuple[str, ...] = Field(
        (),
        description="folders that links may lead to, beside `uri`, such as the `blobs` of a Hub cache; a link to a "
        "file elsewhere is rejected as `outside`, one to a folder is not followed",
    )
    tar: bool = Field(False, description="files are the members of tar files below `uri` too, as WebDataset has them")
    parquet_column: str | None = Field(
        None,
        pattern="^[^/]+$",
        description="files are the cells of this column of parquet files below `uri` too: bytes, or bytes and path, as "
        "data sets of the Hub have them",
    )
    weight: Positive | None = Field(
        None, description="share of training draws, relative to the other weights; without it no clip is trained on"
    )
    clips: tuple[ClipPolicy, ...] = Field((), description="how clips for training are cut; required with a weight")
    clips_per_media: Count | None = Field(
        None, description="at most so many clips of each length from one file (docs/decisions/0019)"
    )
    cap: Rows | dict[Count, Rows] | None = Field(
        None,
        description="encode at most so many rows of each clip length for training, an even sample: a number, or `auto` "
        "for what `recipes` draw and a tenth more; or either by frames, as {16: auto, 64: 100000}. Rows of benchmarks "
        "are all encoded (docs/decisions/0050)",
    )
    labels: LabelConfig = Field(LabelConfig(), description="where labels and official splits are")
    split: SplitConfig = Field(SplitConfig(), description="shares of the split by hash")
    quarantine_budget: Share = Field(
        0.05, description="a batch with a larger share of quarantined files fails its checks"
    )
    licence: str = Field(
        "unknown", description="licence of the files that `licence_column` names none for; shown in reports"
    )
    licences: tuple[str, ...] = Field(
        (), description="licences that are used: a file of another one is rejected as `licence`; by default all are"
    )
    max_batch_gb: Positive = Field(
        16.0,
        description="most gigabytes of a batch, the unit of work (docs/decisions/0058); a larger file is one alone",
    )
    max_batch_videos: Count = Field(50000, description="most files of a batch, for videos")
    max_batch_images: Count = Field(50000, description="most files of a batch, for images")

    @field_validator("cap", mode="before")
    @classmethod
    def _caps_are_rows(cls, value: object) -> object:
        for rows in value.values() if isinstance(value, dict) else [] if value is None else [value]:
            if rows != "auto" and (not isinstance(rows, int) or isinstance(rows, bool) or rows < 1):
                raise ValueError(
                    f"a cap is a number of rows from 1 on, or 'auto', not {rows!r}; without the key all are encoded"
                )
        return value

    @model_validator(mode="after")
    def _cap_fits_clips(self) -> Self:
        lengths = sorted({policy.frames for policy in self.clips})
        if self.cap is not None and self.weight is None:
            raise ValueError("'cap' is of rows for training, and without a 'weight' there are none: remove it")
        if isinstance(self.cap, dict) and (other := sorted(self.cap.keys() - set(lengths))):
            raise ValueError(f"'cap' names {other[0]} frames, and the clips have {', '.join(map(str, lengths))}")
        return self

    @model_validator(mode="after")
    def _weight_needs_clips(self) -> Self:
        if self.weight is not None and not self.clips:
            raise ValueError("a dataset with a weight needs at least one clip policy under 'clips'")
        if any(policy.cut_from == "file" for policy in self.clips):
            raise ValueError("clips for training never cross a cut: 'cut_from: file' is for the policy of a benchmark")
        return self


class ShotConfig(Strict):
    """The first pass, which finds shots and measures them. A change here decodes every video again."""

    thumb_width: Count = Field(80, description="width in pixels of the thumbnails that shot detection reads")
    thumb_height: Count = Field(45, description="height in pixels of these thumbnails")
    # Cuts and dissolves: tuned on one half of the real media (docs/decisions/0018)
    cut_change: Positive = Field(
        16.0, description="a cut changes Y, Cb and Cr by at least so many grey levels, added up, from frame to frame"
    )
    cut_ratio: Positive = Field(2.6, description="and by so many times the changes beside it")
    min_shot_s: AtLeastZero = Field(0.25, description="cuts within so many seconds of each other count as one")
    dissolve_lag_s: Positive = Field(0.32, description="frames so many seconds apart are compared to find dissolves")
    dissolve_change: Positive = Field(
        20.0, description="a dissolve changes the picture by at least so many grey levels over two lags"
    )
    dissolve_residual: Positive = Field(
        0.6, description="the frame in the middle differs from the mean of both by less than this share of the change"
    )
    dissolve_dip: AtLeastZero = Field(
        0.3, description="the dip of the variance in the middle exceeds that residual by at least this much"
    )
    fade_luma: AtLeastZero = Field(
        12.0, description="a frame with a lower mean luma is black (PySceneDetect's threshold)"
    )
    sample_hz: Positive = Field(4.0, description="motion and freeze are measured so many times a second")
    hash_hz: Positive = Field(1.0, description="PDQ hashes for near-duplicates are taken so many times a second")


class FilterConfig(Strict):
    """Thresholds on a shot's scores. A change here decodes nothing again; `null` switches a test off."""

    trim_s: AtLeastZero = Field(
        0.25, description="seconds left out of a shot beside each cut; at the ends of a file nothing is left out"
    )
    motion_min: Threshold = Field(
        0.1, description="less motion rejects a shot, in % of the picture's diagonal per 0.25 s"
    )
    motion_max: Threshold = Field(6.0, description="more motion rejects a shot, in the same unit")
    freeze_max: Threshold = Field(0.5, description="a larger share of repeated frames rejects a shot")
    luma_min: Threshold = Field(16.0, description="a lower mean luma rejects a shot, of 0 to 255")
    luma_max: Threshold = Field(235.0, description="a higher mean luma rejects a shot, of 0 to 255")
    blur_min: Threshold = Field(8.0, description="a lower sharpness rejects a shot (variance of the Laplacian)")


class DuplicateConfig(Strict):
    """Near-duplicate search over PDQ hashes of 256 bits."""

    distance: int = Field(
        31,
        ge=0,
        le=31,
        description="frames whose hashes differ in at most so many bits are near-duplicates; above 31 the search could "
        "miss pairs, and no unrelated pair differed in fewer than 102",
    )
    quality_min: int = Field(50, ge=0, le=100, description="flatter frames (PDQ quality) are not compared")


class CurationConfig(Strict):
    """How shots are found, filtered and compared."""

    shots: ShotConfig = Field(ShotConfig(), description="the first pass: shot detection and scores")
    filters: FilterConfig = Field(FilterConfig(), description="thresholds on the scores of a shot")
    duplicates: DuplicateConfig = Field(DuplicateConfig(), description="near-duplicate search")
