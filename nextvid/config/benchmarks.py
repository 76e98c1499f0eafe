"""The blocks `benchmarks` and `encoders` of corpus.yaml: probe tasks, and encoders of others that are probed too.

Benchmarks may name one of the paper's four protocols (Tab. 9 and 10), or `finetune`, which trains the encoder too. A
protocol is values of a benchmark's own fields; what is written beside its name takes their place.
"""

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, field_validator, model_validator

from nextvid.config.datasets import ClipPolicy
from nextvid.config.strict import AtLeastZero, Count, Positive, Share, Strict

Augmentation = Literal["none", "video", "image"]
DropShare = Annotated[float, Field(ge=0, lt=1)]


class SweepConfig(Strict):
    """A grid of probe heads: one for each rate and weight decay."""

    rates: tuple[Positive, ...] = Field(min_length=1, description="peak learning rates")
    weight_decays: tuple[AtLeastZero, ...] = Field(min_length=1, description="weight decays")
    warm_up_epochs: AtLeastZero = Field(0.0, description="epochs in which the rate rises to its peak")
    warm_up_from: AtLeastZero = Field(0.0, description="rate at which that begins")


class FinetuneConfig(Strict):
    """How an encoder and a linear head on the mean of its tokens are trained together.

    The rate and weight decay are the benchmark's `sweep`, of one pair. Defaults are VideoMAE's public recipe for
    Kinetics-400 (run_class_finetuning), which follows BEiT's.
    """

    layer_decay: Positive = Field(
        0.75, description="the rate of each block over that of the block after it; of the last block over the head's"
    )
    drop_path: DropShare = Field(
        0.1,
        description="how often the last block is skipped in training, clip by clip; earlier ones less, the first never",
    )
    smoothing: Share = Field(0.1, description="share of each label that is spread over all classes")


# Data of Tab. 10, whose "FPS" is a stride in frames; what it leaves open is V-JEPA 2's public probe (docs/method.md 9).
_EVERY: dict[str, Any] = {
    "target": "class", "epochs": 20, "seeds": 1, "attention_heads": 16, "train_views": "one", "judged": "file",
    "held_out": 0.05,  # our choice: 750 clips of Diving48, the smallest; the paper does not say how it chose heads
}  # fmt: skip
_VIDEO = _EVERY | {
    "augment": "video",
    "sweep": ({"rates": (5e-3, 3e-3, 1e-3, 3e-4, 1e-4), "weight_decays": (0.01, 0.1, 0.4, 0.8)},),
}
_CLIPS: dict[str, Any] = {"frames": 16, "stride": 4, "views": 3, "crop": "centre", "cut_from": "file"}
PROTOCOLS: Mapping[str, dict[str, Any]] = {
    "k400": _VIDEO | {"policy": _CLIPS | {"clips_per_shot": 8}, "batch": 192},
    "ssv2": _VIDEO | {"policy": _CLIPS | {"clips_per_shot": 2}, "batch": 96},
    "diving48": _VIDEO
    | {
        "policy": _CLIPS | {"frames": 32, "stride": 2, "clips_per_shot": 4},
        "batch": 48,
        "epochs": 100,
        "levels": 4,
        "sweep": ({"rates": (1e-3, 3e-4, 1e-4), "weight_decays": (0.8,)},),
    },
    "in1k": _EVERY
    | {
        "policy": {"frames": 1, "crop": "centre"},  # repeated to the length of the encoder's clips
        "batch": 384,
        "augment": "image",
        "test_crop": 256 / 292,  # evaluation resizes the short side to 292 and takes the middle 256 (docs/method.md 9)
        "sweep": (
            {"rates": (1e-3,), "weight_decays": (1e-3,)},
            {
                "rates": (5e-4, 1e-3, 1.5e-3, 2e-3),
                "weight_decays": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
                "warm_up_epochs": 5.0,
                "warm_up_from": 2e-4,
            },
        ),
    },
    # VideoMAE's scripts/kinetics/.../finetune.sh of ViT-B: rate 1e-3 for 256 clips, 512 clips a step, 5 x 3 test clips
    "finetune": _EVERY
    | {
        "policy": _CLIPS | {"clips_per_shot": 5},
        "batch": 512,
        "epochs": 100,
        "held_out": 0.0,  # there is one head: nothing is chosen
        "sweep": ({"rates": (2e-3,), "weight_decays": (0.05,), "warm_up_epochs": 5.0, "warm_up_from": 2e-6},),
        "finetune": {},
    },
}


class BenchmarkConfig(Strict):
    """A probe task: which datasets, which target, which clips, how its heads learn.

    `protocol` fills the other fields with those of the paper's Tab. 10; each may be written beside it, the fields of
    `policy` one by one.
    """

    model_config = ConfigDict(json_schema_extra={"required": ["datasets"]})  # a protocol has a target and a policy
    YOUNGER = frozenset(
        {"sweep", "attention_heads", "held_out", "augment", "test_crop", "levels", "train_views", "judged", "limit"}
        | {"finetune"}
    )

    datasets: tuple[str, ...] = Field(min_length=1, description="names of the datasets whose clips are probed")
    protocol: Literal["k400", "in1k", "ssv2", "diving48", "finetune"] | None = Field(
        None,
        description="the paper's Kinetics-400, ImageNet-1K, Something-Something-v2 or Diving48, or training of the "
        "whole encoder",
    )
    target: str = Field(description="the label to predict; `class` by a protocol")
    policy: ClipPolicy = Field(description="how clips are cut: `clips_per_shot` segments of `views` views each")
    limit: Count | None = Field(
        None, description="at most so many shots of each split, which scores and reports then say; without it all"
    )
    # Tab. 10
    epochs: Count = Field(20, description="epochs that the probe's heads train")
    batch: Count = Field(32, description="clips of a batch of that training")
    seeds: Count = Field(3, description="heads with different seeds, whose mean is the score; 1 by a protocol")
    sweep: tuple[SweepConfig, ...] = Field(
        (),
        description="grids of heads that learn side by side, of which held-out clips choose one; by default the rates "
        "that suit the encoder's width",
    )
    attention_heads: Count | None = Field(
        None, description="heads of the probe's attention; by default 4, and 16 from an encoder width of 512 on"
    )
    held_out: Share | None = Field(
        None,
        description="share of the train files that choose a head and teach none; by default 0.2, by a protocol 0.05",
    )
    augment: Augmentation | None = Field(
        None,
        description="how clips that heads learn from are varied in each epoch; by default as their kind is. Only where "
        "the encoder reads pixels: latents are never varied",
    )
    test_crop: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0,
        description="share of a stored picture's side that is seen, in its middle, where clips are not varied; 0.877 "
        "by `in1k`. Only where the encoder reads pixels",
    )
    levels: Count = Field(1, description="blocks of the encoder whose outputs the probe reads; 4 by `diving48`")
    train_views: Literal["all", "one"] = Field(
        "all",
        description="views that heads learn from: every one, or one: drawn again in each epoch where clips are varied, "
        "else once, from the id of the shot or file",
    )

    judged: Literal["shot", "file"] = Field(
        "shot",
        description="what an answer is given for: each shot, by the mean softmax of its views, or each file, by that "
        "of the views of all its shots",
    )
    finetune: FinetuneConfig | None = Field(
        None, description="the encoder is trained with a linear head; by default it is frozen, and heads are attentive"
    )

    @model_validator(mode="before")
    @classmethod
    def _filled(cls, values: Any) -> Any:  # noqa: ANN401 - whatever the file holds
        name = values.get("protocol") if isinstance(values, dict) else None
        if not isinstance(name, str):
            return values
        if name not in PROTOCOLS:
            near = difflib.get_close_matches(name.lower(), PROTOCOLS, n=1, cutoff=0.4)
            remedy = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(PROTOCOLS)}"
            raise ValueError(f"there is no protocol '{name}'; {remedy}")
        given, protocol = values.get("policy", {}), PROTOCOLS[name]
        if isinstance(given, dict):
            own = {key: value for key, value in protocol["policy"].items() if key != "stride" or "fps" not in given}
            given = own | given
        return {**protocol, **values, "policy": given}

    @field_validator("policy")
    @classmethod
    def _centred(cls, policy: ClipPolicy) -> ClipPolicy:
        if policy.flip:
            raise ValueError("clips of a benchmark are never flipped: leave 'flip' out")
        return policy if "crop" in policy.model_fields_set else policy.model_copy(update={"crop": "centre"})

    @model_validator(mode="after")
    def _answers_of_files(self) -> Self:
        if self.policy.cut_from == "file" and self.judged == "shot":
            raise ValueError("segments of whole files have one answer a file: write 'judged: file' too")
        return self

    @model_validator(mode="after")
    def _one_training(self) -> Self:
        if self.finetune is not None:
            pairs = sum(len(grid.rates) * len(grid.weight_decays) for grid in self.sweep)
            for name, found in (("sweep", pairs), ("seeds", self.seeds), ("levels", self.levels)):
                if found != 1:
                    raise ValueError(
                        f"fine-tuning has one pair of rate and weight decay, one seed and one level: '{name}' has "
                        f"{found}; 'protocol: finetune' has one of each"
                    )
        return self

    def values(self) -> dict[str, Any]:
        """What a score depends on, as plain values, by whatever name or protocol it was written."""
        return self.digested(exclude={"protocol"})


Family = Literal["vjepa2", "dinov2", "dinov3", "videomae", "vit_mae", "pixels", "latents"]
FLOORS = ("pixels", "latents")


class ProbedEncoderConfig(Strict):
    """An encoder that was trained elsewhere, a partition of `probes` beside the recipes.

    It reads the stored pixels (`encoding.pixels`), resized to its own grid and normalised by its own statistics, those
    of `preprocessor_config.json` where its folder has one, else ImageNet's. Floors need no folder: `pixels` is the mean
    colour of 16 fields of each frame, `latents` what is stored of the autoencoder.
    """

    family: Family = Field(description="what the folder holds; dinov2, dinov3 and vit_mae see each frame alone")
    folder: str | None = Field(
        None, description="as transformers saves it: config.json and safetensors; relative to corpus.yaml"
    )

    @model_validator(mode="after")
    def _has_a_folder(self) -> Self:
        if (self.folder is None) != (self.family in FLOORS):
            needed = "has no folder: leave it out" if self.folder else "needs a 'folder'"
            raise ValueError(f"family '{self.family}' {needed}")
        return self
