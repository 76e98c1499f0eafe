"""An encoder whose features are what it reads, and features of a task's samples by any encoder."""

from collections.abc import Iterable

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from nextvid.config.project import Project
from nextvid.evaluate.features import FrozenEncoder
from nextvid.evaluate.scoring import Task
from nextvid.evaluate.stream import Streamed, Variation, open_clips
from nextvid.train.loader import RowKind

CPU = torch.device("cpu")


def plain_encoder(reads: RowKind, frames: int) -> FrozenEncoder:
    """Features are the input: a token for each cell of latents, or for each pixel."""
    order = "n f c h w -> n (f h w) c" if reads == "latents" else "n f h w c -> n (f h w) c"
    width = 16 if reads == "latents" else 3
    return FrozenEncoder("plain", reads, frames, width, frames, lambda given: rearrange(given, order).float())


def features_of(
    project: Project, task: Task, encoder: FrozenEncoder, split: str, asked: Iterable[np.ndarray],
    varied: Variation | None = None, epoch: int | None = None, threads: int = 1,
) -> list[Tensor]:  # fmt: skip
    """Features of groups of samples of one split."""
    with open_clips(project.root, task.opened, task.pixels, task.rows, encoder, CPU, threads) as clips:
        return list(Streamed(encoder, clips, split, varied).of(asked, epoch))
