"""Recipes: everything that a training run is configured by, as frozen, strict models.

A recipe is what is trained, and is digested; ExecutionConfig is how a run is carried out, and is not. Defaults are the
paper's (Tab. 7 and 8; docs/method.md 2, 4, 6, 7) unless the line names another source.
"""

from collections.abc import Iterator
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from nextvid.config.strict import Count, Positive, Share, Strict, Weight
from storage.errors import ConfigError as ConfigError  # re-exported: nextvid.model imports no storage


class EncoderConfig(Strict):
    """The frame-causal ViT; the default is ViT-L."""

    input: Literal["pixels", "latents"] = Field(
        "pixels", description="what the encoder reads: frames or stored latents"
    )
    depth: Count = Field(24, description="transformer blocks")
    width: Count = Field(1024, description="dimensions of a token, D")
    heads: Count = Field(16, description="attention heads")
    mlp_hidden: Count = Field(
        4096, description="hidden dimensions of the MLP; ViT-G's 6144 is no multiple of its width"
    )


class PredictorConfig(Strict):
    """The predictor of the next tubelet from the encoded context."""

    kind: Literal["cross", "joint", "none"] = Field(
        "cross",
        description="cross: queries attend to the context; joint: the ablation without context isolation; none: the "
        "S-model",
    )
    depth: Count = Field(12, description="transformer blocks")
    width: Count = Field(384, description="dimensions of a token")
    heads: Count = Field(12, description="attention heads")
    support: Literal["all", "masked"] = Field(
        "all",
        description="cells that are predicted; masked is the other reading of the paper (docs/method.md 2.5, 14 row 1)",
    )


class DecoderConfig(Strict):
    """The flow decoder."""

    kind: Literal["dit_iso", "xattn", "xattn_self", "none"] = Field(
        "dit_iso",
        description="dit_iso: frame-isolated DiT; xattn, xattn_self: the S-model's cross-attention; none: no flow loss",
    )
    depth: Count = Field(12, description="transformer blocks")
    width: Count = Field(384, description="dimensions of a token")
    heads: Count = Field(12, description="attention heads")
    condition: Literal["proj", "hidden"] = Field(
        "proj",
        description="the decoder reads z_t of the encoder's width, or the predictor's hidden state, the other reading "
        "of the paper (docs/method.md 4.3, 14 row 6)",
    )


class ModelConfig(Strict):
    """The parts of the model and the grid of its tokens."""

    grid_height: Count = Field(16, description="cells of a tubelet, vertically")
    grid_width: Count = Field(16, description="cells of a tubelet, horizontally")
    tubelet: Count = Field(2, description="frames of a tubelet")
    patch: Count = Field(16, description="pixels of a cell's side, for input `pixels`; a latent cell is one patch")
    frame_channels: Count = Field(32, description="target channels of one frame and cell, after space-to-depth")
    encoder: EncoderConfig = Field(EncoderConfig(), description="the frame-causal ViT")
    predictor: PredictorConfig = Field(PredictorConfig(), description="the predictor")
    decoder: DecoderConfig = Field(DecoderConfig(), description="the flow decoder")
    attention: Literal["loop", "dense", "flash", "block"] = Field(
        "loop", description="how frame-causal attention is computed; the results agree"
    )

    @property
    def cells(self) -> int:
        """Cells per tubelet, S."""
        return self.grid_height * self.grid_width

    @property
    def target_channels(self) -> int:
        """Channels of one target token, C."""
        return self.tubelet * self.frame_channels


class MaskStrategy(Strict):
    """One of the mask strategies that a step applies side by side (Tab. 8)."""

    name: str = Field(description="name of the strategy")
    blocks: Count = Field(description="blocks drawn for each clip, constant over time")
    scale: Share = Field(description="area of a block as a share of the grid")
    aspect_min: Weight = Field(0.75, description="smallest aspect ratio of a block")
    aspect_max: Weight = Field(1.5, description="largest aspect ratio of a block")
    budget: int = Field(description="visible cells of a tubelet that `keep: fixed` keeps (docs/method.md 2.4)")


class MaskConfig(Strict):
    """Mask strategies and how the visible cells are thinned."""

    keep: Literal["fixed", "bucket", "flat", "all"] = Field(
        "fixed",
        description="how visible cells are thinned to equal counts (docs/method.md 2.4): fixed: to the budget; bucket: "
        "to one drawn count a step; flat: as V-JEPA 2's code, for fidelity studies; all: nothing is masked",
    )
    strategies: tuple[MaskStrategy, ...] = Field(
        (
            MaskStrategy(name="short", blocks=8, scale=0.15, budget=60),
            MaskStrategy(name="long", blocks=2, scale=0.70, budget=15),
        ),
        description="the mask strategies",
    )
    entries: Count = Field(1 << 16, description="masks drawn in advance for each strategy")
    seed: int = Field(0, description="seed of the drawn masks")


class LossConfig(Strict):
    """The losses of docs/method.md 4."""

    align: Weight = Field(1.0, description="weight of the alignment loss")
    flow: Weight = Field(0.5, description="weight of the flow loss")
    timesteps: Count = Field(1000, description="grid of the flow's time (docs/method.md 4.2)")
    tau_share: Literal["tubelet", "clip"] = Field(
        "tubelet", description="the flow's time is drawn for each tubelet or once a clip (docs/method.md 14 row 10)"
    )
    target: Literal["latents", "pixels", "siglip2", "cosmos"] = Field(
        "latents",
        description="what the decoder generates: latents of an image VAE, pixels, or another network's features",
    )
    target_norm: bool = Field(
        True, description="LayerNorm without affine on the reference features (docs/method.md 4.1)"
    )


class SpikeConfig(Strict):
    """Steps whose loss leaps are skipped, as V-JEPA 2.1 does; the values are our choice."""

    deviations: Positive = Field(
        5.0, description="a step is skipped if its loss exceeds the running mean by so many standard deviations"
    )
    window: Count = Field(100, description="steps of the running mean; before as many were taken none is skipped")
    stop_after: Count = Field(10, description="skipped steps in a row that end the run")

    @model_validator(mode="after")
    def _admits_steps(self) -> Self:
        if self.deviations <= 1:  # of what is left below the bound, the next bound is lower: so on, down to no step
            raise ValueError(
                f"deviations {self.deviations:g} would skip every step in the end: each skipped loss lowers mean and "
                "deviation of the rest, and up to 1 nothing stops that; 5 is usual"
            )
        if self.window == 1:
            raise ValueError(
                "a window of 1 step has no deviation, and every loss above it would be skipped; 100 is usual"
            )
        return self


class OptimConfig(Strict):
    """AdamW, gradient clipping and the average of the weights (Tab. 8, docs/method.md 7)."""

    YOUNGER = frozenset({"spikes"})
    beta1: Share = Field(0.9, description="AdamW's first beta")
    beta2: Share = Field(0.95, description="AdamW's second beta")
    eps: Weight = Field(1e-8, description="AdamW's epsilon")
    weight_decay: Weight = Field(0.04, description="weight decay of matrices; biases and 1-D tensors have none")
    clip: Weight = Field(1.0, description="largest norm of the gradients")
    clip_scope: Literal["module", "global"] = Field(
        "module",
        description="norm of encoder, predictor and decoder each, or of all together, the other reading of the paper "
        "(docs/method.md 14 row 17)",
    )
    shape: Literal["linear", "cosine"] = Field(
        "linear",
        description="learning rate inside the stages between warm-up and cool-down; cosine is the other reading of the "
        "paper (docs/method.md 7.2, 14 row 16)",
    )
    ema: Share = Field(0.99925, description="momentum of the average of the weights, the reference encoder")
    spikes: SpikeConfig | None = Field(None, description="skip steps whose loss leaps; null, as in the paper: none")


class InitConfig(Strict):
    """What a run's weights start from, instead of random numbers: one of run, checkpoint and encoder.

    Steps, rates, draws and AdamW's moments start at zero.
    """

    run: str | None = Field(None, pattern="^[0-9a-f]{12}$", description="a run of this project, by its id")
    step: Count | None = Field(None, description="the run's checkpoint after so many steps; null is its last step")
    checkpoint: str | None = Field(None, description="folder of a checkpoint, of a run anywhere")
    encoder: str | None = Field(None, description="folder of an exported encoder; the other parts start at random")
    parts: tuple[Literal["encoder", "predictor", "decoder"], ...] = Field(
        ("encoder", "predictor", "decoder"), min_length=1, description="parts of the model that are taken"
    )
    reference: Literal["copy", "average"] = Field(
        "copy", description="the reference encoder starts as a copy of the encoder, or as the source's average"
    )

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if sum(each is not None for each in (self.run, self.checkpoint, self.encoder)) != 1:
            raise ValueError("name one of run, checkpoint and encoder")
        if self.step is not None and self.run is None:
            raise ValueError("step is of a run: name the run, or the checkpoint's folder")
        if self.reference == "average" and (self.encoder is not None or "encoder" not in self.parts):
            raise ValueError("reference 'average' needs a run or checkpoint, and 'encoder' among the parts")
        return self

    @property
    def taken(self) -> tuple[str, ...]:
        """Parts of the model that are taken: of an exported encoder there is one."""
        return self.parts if self.encoder is None else ("encoder",)


class StageConfig(Strict):
    """One training stage, a row of Tab. 8."""

    name: str = Field(description="name of the stage")
    steps: Count = Field(description="optimiser steps")
    frames: Count = Field(description="frames of a clip")
    batch: Count = Field(description="clips of a step, over all ranks")
    tau_copies: Count = Field(description="noise levels of the decoder for each clip")
    lr_start: Weight = Field(description="learning rate at the first step")
    lr_end: Weight = Field(description="learning rate at the end")
    decoder_lr: Weight | None = Field(
        None, description="the decoder's constant rate; without it, it follows the others"
    )


class RecipeConfig(Strict):
    """A complete training configuration. Every field is part of its digest, `init` where it is given."""

    YOUNGER = frozenset({"init"})
    name: str = Field(description="name of the recipe")
    model: ModelConfig = Field(ModelConfig(), description="the model")
    masks: MaskConfig = Field(MaskConfig(), description="the masks")
    losses: LossConfig = Field(LossConfig(), description="the losses")
    optim: OptimConfig = Field(OptimConfig(), description="the optimiser")
    stages: tuple[StageConfig, ...] = Field(description="the stages, in order")
    precision: Literal["fp32", "bf16"] = Field("bf16", description="arithmetic of training")
    seed: int = Field(0, description="seed of weights, draws and noise")
    init: InitConfig | None = Field(None, description="what the weights start from; null: random numbers")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not self.stages:
            raise ValueError("a recipe has at least one stage")
        for stage in self.stages:
            if stage.frames % self.model.tubelet:
                raise ValueError(
                    f"stage {stage.name}: {stage.frames} frames are not whole tubelets of {self.model.tubelet}"
                )
        cells = self.model.cells
        if not self.masks.strategies:
            raise ValueError("masks.strategies is empty; for training without masks set masks.keep = 'all'")
        for strategy in self.masks.strategies:
            if not 0 < strategy.budget <= cells:
                raise ValueError(
                    f"mask strategy {strategy.name}: budget {strategy.budget} is not within 1..{cells} cells"
                )
        return self

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if problems := list(_disagreements(self)):
            raise ValueError("; ".join(problems))
        return self

    @property
    def steps(self) -> int:
        """Optimiser steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    @property
    def reads_pixels(self) -> bool:
        """Whether encoder or decoder are given frames."""
        return self.model.encoder.input == "pixels" or (self.losses.target == "pixels" and self.losses.flow > 0)

    @property
    def reads_latents(self) -> bool:
        """Whether encoder or decoder are given what an autoencoder, or another target's network, made of the frames."""
        return self.model.encoder.input == "latents" or (self.losses.target != "pixels" and self.losses.flow > 0)

    @property
    def clip_lengths(self) -> tuple[int, ...]:
        """Frames per clip that the stages ask of a trainset, ascending."""
        return tuple(sorted({stage.frames for stage in self.stages}))


SinkName = Literal["tensorboard", "wandb", "trackio"]
On = Literal["here", "ray", "slurm"]  # where a training runs: on this machine, or as a job of a cluster


class ExecutionConfig(Strict):
    """How a run is carried out. It is in no digest: any of it may change between attempts at one run."""

    ranks: Count = Field(1, description="processes that train together, on all nodes")
    nodes: Count = Field(1, description="machines, with as many ranks each")
    rendezvous: str | None = Field(
        None,
        pattern=r"^[^\s:]+:[0-9]+$",
        description="where nodes that are started by hand meet: host:port, the host one of them",
    )
    timeout_s: Count = Field(
        600, description="seconds after which a node that does not join, or does not answer, ends the others"
    )
    micro_batch: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        "auto",
        description="clips of one backward on a rank: auto is as many as the device holds, for each stage "
        "(nextvid/model/memory.py); 0 is the rank's whole share",
    )
    threads: Count = Field(1, description="threads of the loader")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto is a GPU where there is one")
    compile: bool | None = Field(
        None, description="compile each block by torch.compile; null: on GPUs of machines with a C compiler"
    )
    recompute_blocks: bool = Field(
        False, description="activation checkpointing: the memory of one block, for one forward more"
    )
    fold_copies: bool = Field(
        False, description="noise levels of the decoder one after the other: the memory of one, for no work more"
    )
    shard: bool = Field(
        False, description="cut weights, gradients, moments and average over the ranks (FSDP2) instead of copying (DDP)"
    )
    log_every_steps: Count = Field(20, description="steps between two lines of events")
    diagnose_every_steps: Count = Field(250, description="steps between two diagnoses")
    score_clips: Annotated[int, Field(ge=0)] = Field(
        400,  # our measurement: of 120 a linear probe of the demo's features says nothing (docs/demo.md)
        description="train clips of each benchmark that every diagnosis scores, by k-NN and a linear probe "
        "(nextvid/evaluate/training_scores.py); 0: none",
    )
    checkpoint_every_steps: Count = Field(500, description="steps between two checkpoints")
    alarm: Literal["stop", "warn", "off"] = Field(
        "warn", description="what a collapse of the features does: ends the run, writes an event, or nothing"
    )
    keep_last: Count = Field(2, description="checkpoints that are kept, beside those at the ends of stages")
    sinks: Annotated[
        tuple[SinkName, ...], BeforeValidator(lambda s: s.strip("[]").split(",") if isinstance(s, str) else s)
    ] = Field(
        ("tensorboard",),
        description="where curves go beside events.jsonl: tensorboard, wandb or trackio, with commas between; the "
        "latter two are extras, and keep to this machine unless WANDB_MODE or TRACKIO_SPACE_ID say otherwise",
    )

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.ranks % self.nodes or (self.nodes == 1 and self.rendezvous is not None):
            raise ValueError("nodes must divide the number of ranks, and only several of them have a rendezvous")
        if self.shard and self.fold_copies:
            raise ValueError(
                "shard gathers weights block by block, and fold_copies needs the decoder's whole: choose one"
            )
        return self


def _disagreements(recipe: RecipeConfig) -> Iterator[str]:
    """One message for each contradiction between fields."""
    model, losses = recipe.model, recipe.losses
    predictor, decoder = model.predictor.kind, model.decoder.kind
    crossed = decoder in ("xattn", "xattn_self")
    used = {"encoder": True, "predictor": predictor != "none", "decoder": decoder != "none"}
    for name, part in (("encoder", model.encoder), ("predictor", model.predictor), ("decoder", model.decoder)):
        if used[name] and part.width % (2 * part.heads):
            yield f"{name}: width {part.width} is not {part.heads} heads of an even number of dimensions"
    if (decoder == "none") != (losses.flow == 0):
        yield "losses.flow > 0 needs a decoder, and losses.flow = 0 needs decoder.kind 'none'"
    if predictor == "none" and losses.align > 0:
        yield "losses.align > 0 needs a predictor (predictor.kind is 'none')"
    if (predictor == "none") != crossed:
        yield "predictor.kind 'none' goes with decoder.kind 'xattn' or 'xattn_self', and these with no predictor"
    if decoder == "xattn_self" and losses.tau_share != "clip":
        yield "decoder.kind 'xattn_self' mixes tubelets and needs losses.tau_share = 'clip'"
    if model.predictor.support == "masked" and recipe.masks.keep not in ("fixed", "bucket"):
        yield "predictor.support 'masked' needs masked tubes: masks.keep 'fixed' or 'bucket'"
    if model.encoder.input == "latents" and losses.target != "latents":
        yield "encoder.input 'latents' needs losses.target = 'latents'"
    spikes = recipe.optim.spikes
    if spikes is not None and 0 < recipe.steps - spikes.window < spikes.stop_after:
        yield (
            f"optim.spikes.stop_after = {spikes.stop_after} never ends these {recipe.steps} steps, of which all after "
            f"the first {spikes.window} could be skipped: choose at most {recipe.steps - spikes.window}"
        )
    for taken in () if recipe.init is None else recipe.init.taken:
        if not used[taken]:
            yield f"init.parts names the {taken}, which this recipe does not have"
    if losses.target == "pixels" and model.frame_channels != 3 * model.patch**2:
        yield f"losses.target 'pixels' needs model.frame_channels = 3 * patch^2 = {3 * model.patch**2}"
