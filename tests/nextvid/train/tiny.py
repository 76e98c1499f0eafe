"""A recipe small enough for milliseconds a step, and parts of a run that need no files."""

from typing import Literal

import torch

from nextvid.config.recipe import (
    DecoderConfig,
    EncoderConfig,
    ExecutionConfig,
    MaskConfig,
    MaskStrategy,
    ModelConfig,
    OptimConfig,
    PredictorConfig,
    RecipeConfig,
    StageConfig,
)
from nextvid.train.distributed import Ranks
from nextvid.train.loader import Batch
from nextvid.train.step import Trained
from nextvid.trainset.order import in_every_tubelet

Keep = Literal["fixed", "bucket", "flat", "all"]
CHANNELS = 4
GRID = 4

HOW = ExecutionConfig(device="cpu", log_every_steps=1, diagnose_every_steps=5, checkpoint_every_steps=100)
ALONE = Ranks(0, 1, torch.device("cpu"))


def latents_of(batch: Batch) -> torch.Tensor:
    """The latents of a batch that has them."""
    assert batch.latents is not None
    return batch.latents


def tiny_recipe(name: str = "tiny", steps: tuple[int, ...] = (3, 3, 3, 3), keep: Keep = "fixed") -> RecipeConfig:
    """Four stages as Tab. 8's: rising, falling, separate decoder rate, longer clips at half the batch."""
    shapes = ((4, 4, 2, None), (4, 4, 2, None), (4, 4, 1, 1.6e-3), (8, 2, 1, 6e-4))
    edges = (2e-4, 1e-3, 9e-4, 2e-4, 2e-6)
    return RecipeConfig(
        name=name,
        model=ModelConfig(
            grid_height=GRID,
            grid_width=GRID,
            patch=8,
            frame_channels=CHANNELS,
            encoder=EncoderConfig(input="latents", depth=2, width=24, heads=2, mlp_hidden=48),
            predictor=PredictorConfig(depth=1, width=24, heads=2),
            decoder=DecoderConfig(depth=1, width=24, heads=2),
        ),
        masks=MaskConfig(
            keep=keep,
            strategies=(
                MaskStrategy(name="short", blocks=2, scale=0.15, budget=10),
                MaskStrategy(name="long", blocks=1, scale=0.45, budget=6),
            ),
            entries=256,
        ),
        optim=OptimConfig(ema=0.9),
        stages=tuple(
            StageConfig(
                name=stage,
                steps=count,
                frames=frames,
                batch=batch,
                tau_copies=copies,
                lr_start=edges[index],
                lr_end=edges[index + 1],
                decoder_lr=decoder,
            )
            for index, (stage, count, (frames, batch, copies, decoder)) in enumerate(
                zip(("warmup", "stable1", "stable2", "cooldown"), steps, shapes, strict=True)
            )
        ),
        precision="fp32",
    )


def random_batch(step: int = 0, clips: int = 4, frames: int = 4) -> Batch:
    """Random latents and tubes, drawn from the step's number."""
    generator = torch.Generator().manual_seed(step)
    latents = torch.randn(clips, frames, CHANNELS, GRID, GRID, generator=generator)
    visible = []
    for budget in (10, 6):
        cells = torch.stack([torch.randperm(16, generator=generator)[:budget].sort().values for _ in range(clips)])
        visible.append(torch.from_numpy(in_every_tubelet(cells.numpy(), frames // 2, 16)))
    return Batch(step, tuple(range(clips * step, clips * (step + 1))), latents, visible)


def gradients_of(trained: Trained) -> dict[str, torch.Tensor]:
    """Gradients by parameter name, copied."""
    return {name: p.grad.clone() for name, p in trained.model.named_parameters() if p.grad is not None}
