"""Frozen, strict models of everything that a training run is configured by.

Holds shapes, losses, masks, optimiser and stages ("what": digested) and how a run is carried out ("how": never
digested). Holds no corpus (nextvid/config/corpus.py) and no named values (recipes.py). Defaults are the paper's
(Tab. 7, 8; method.md 2, 4, 6, 7) unless the line says otherwise.
"""

from collections.abc import Iterator
from typing import Literal, Self

from pydantic import Field, model_validator

from nextvid.config.strict import Count, Share, Strict, Weight
from storage.errors import ConfigError as ConfigError  # re-exported: nextvid.model imports no storage


class EncoderConfig(Strict):
    """Frame-causal ViT; the default is ViT-L. `mlp_hidden` is given, since ViT-G's 6144 is no multiple of its width."""

    input: Literal["pixels", "latents"] = "pixels"
    depth: Count = 24
    width: Count = 1024
    heads: Count = 16
    mlp_hidden: Count = 4096


class PredictorConfig(Strict):
    """Cross-attention predictor (`cross`), its ablation without context isolation (`joint`), or none (S-model)."""

    kind: Literal["cross", "joint", "none"] = "cross"
    depth: Count = 12
    width: Count = 384
    heads: Count = 12
    support: Literal["all", "masked"] = "all"  # method.md 2.5


class DecoderConfig(Strict):
    """Frame-isolated DiT (`dit_iso`) or the S-model's cross-attention decoders; `none` when gen = 0."""

    kind: Literal["dit_iso", "xattn", "xattn_self", "none"] = "dit_iso"
    depth: Count = 12
    width: Count = 384
    heads: Count = 12
    condition: Literal["proj", "hidden"] = "proj"  # method.md 4.3: z_t of width D, or the predictor's hidden state


class ModelConfig(Strict):
    """The five parts. A tubelet is `tubelet` stored frames; the grid is cells per tubelet."""

    grid_height: Count = 16
    grid_width: Count = 16
    tubelet: Count = 2
    patch: Count = 16  # pixels per cell side, for input `pixels`; for `latents` one latent cell is one patch
    frame_channels: Count = (
        32  # target channels of one frame and cell after space-to-depth; C = tubelet * frame_channels
    )
    encoder: EncoderConfig = EncoderConfig()
    predictor: PredictorConfig = PredictorConfig()
    decoder: DecoderConfig = DecoderConfig()
    attention: Literal["loop", "dense", "flash"] = "loop"

    @property
    def cells(self) -> int:
        """Cells per tubelet, S."""
        return self.grid_height * self.grid_width

    @property
    def target_channels(self) -> int:
        """Channels of one target token, C."""
        return self.tubelet * self.frame_channels


class MaskStrategy(Strict):
    """One of the parallel strategies of Tab. 8: `blocks` blocks of area `scale`, constant over time."""

    name: str
    blocks: Count
    scale: Share
    aspect_min: Weight = 0.75
    aspect_max: Weight = 1.5
    budget: int  # visible cells per tubelet that `fixed` keeps (method.md 2.4)


class MaskConfig(Strict):
    """Mask strategies and how the visible set is thinned (method.md 2.4). `all` is the ablation without masking."""

    keep: Literal["fixed", "bucket", "flat", "all"] = "fixed"
    strategies: tuple[MaskStrategy, ...] = (
        MaskStrategy(name="short", blocks=8, scale=0.15, budget=60),
        MaskStrategy(name="long", blocks=2, scale=0.70, budget=15),
    )
    entries: Count = 1 << 16  # drawn entries a strategy (design 2)
    seed: int = 0


class LossConfig(Strict):
    """Weights of Tab. 8 and the flow's time grid (method.md 4.2)."""

    align: Weight = 1.0
    flow: Weight = 0.5
    timesteps: Count = 1000
    tau_share: Literal["tubelet", "clip"] = "tubelet"
    target: Literal["latents", "pixels", "siglip2", "cosmos"] = "latents"
    target_norm: bool = True  # LN without affine on the reference features (method.md 4.1)


class OptimConfig(Strict):
    """AdamW of Tab. 8; clipping is by module (method.md 7.4)."""

    beta1: Share = 0.9
    beta2: Share = 0.95
    eps: Weight = 1e-8
    weight_decay: Weight = 0.04
    clip: Weight = 1.0
    clip_scope: Literal["module", "global"] = "module"
    shape: Literal["linear", "cosine"] = "linear"
    ema: Share = 0.99925


class StageConfig(Strict):
    """One row of Tab. 8. `decoder_lr` is None where the decoder follows the main rate."""

    name: str
    steps: Count
    frames: Count
    batch: Count
    tau_copies: Count
    lr_start: Weight
    lr_end: Weight
    decoder_lr: Weight | None = None


class RecipeConfig(Strict):
    """A complete training configuration: the *what* of a run. Everything here is digested."""

    name: str
    model: ModelConfig = ModelConfig()
    masks: MaskConfig = MaskConfig()
    losses: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    stages: tuple[StageConfig, ...]
    precision: Literal["fp32", "bf16"] = "bf16"
    seed: int = 0

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
            raise ValueError("masks.strategies is empty; without masks, say masks.keep = 'all'")
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


class ExecutionConfig(Strict):
    """How a run is carried out; never digested, so any of it may change between attempts at one run."""

    ranks: Count = 1
    micro_batch: int = Field(default=0, ge=0)  # clips per rank and backward; 0 = the whole rank's share
    threads: Count = 1  # loader threads
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: bool = False  # every block on its own, by torch.compile: pays on GPUs (research: training 3)
    recompute_blocks: bool = False  # activation checkpointing: memory of one block for a forward more
    fold_copies: bool = False  # noise levels of the decoder one after the other: memory of one for no work more
    shard: bool = False  # weights, gradients, moments and average cut over ranks (FSDP2), not copied to each (DDP)
    log_every_steps: Count = 20
    diagnose_every_steps: Count = 250
    checkpoint_every_steps: Count = 500
    keep_last: Count = 2

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.shard and self.fold_copies:
            raise ValueError(
                "shard gathers weights block by block, and fold_copies needs the decoder's whole: choose one"
            )
        return self


def _disagreements(recipe: RecipeConfig) -> Iterator[str]:
    """What in a recipe contradicts itself, in words."""
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
    if losses.target == "pixels" and model.frame_channels != 3 * model.patch**2:
        yield f"losses.target 'pixels' needs model.frame_channels = 3 * patch^2 = {3 * model.patch**2}"
