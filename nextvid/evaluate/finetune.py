"""Fine-tuning: an encoder is trained, with a linear head on the mean of its tokens, on the labels of a benchmark.

The recipe is VideoMAE's public code (modules run_class_finetuning, optim_factory, modeling_finetune), which follows
BEiT's: AdamW with rates that fall from the head to the input, warm-up and cosine, label smoothing, stochastic depth.
Left out are its mixup and cutmix. An epoch shows one segment of every sample, drawn again; a test answer is the mean
softmax over the segments and views. Steps, ranks and epochs are those of the probes (`learn` in fitting.py), clips are
read as theirs are, and checkpoints are those of training. What is drawn is a function of seed, epoch and sample, so
neither ranks nor a resume change it.

Axes: n clips, N samples of a split, G segments, l blocks, L tokens of a clip, D width, Y classes.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from nextvid.config.benchmarks import FinetuneConfig
from nextvid.evaluate.attentive import LN_EPS, ProbeSettings
from nextvid.evaluate.benchmark_rows import BenchmarkRows, per_sample
from nextvid.evaluate.features import FrozenEncoder, Input, Parts
from nextvid.evaluate.fitting import answered_rightly, batch_of, rate_at, voted, whole_groups
from nextvid.evaluate.stream import CLIPS_AT_ONCE, Clips, OneView, Samples, Streamed, shared
from nextvid.train import checkpoint
from nextvid.train.checkpoint import Identity, Progress
from nextvid.train.distributed import Ranks

HEAD_STD = 0.02 * 0.001  # VideoMAE: trunc_normal of std .02, times init_scale: answers start nearly equal
BETAS = (0.9, 0.999)  # VideoMAE's scripts
SEGMENTS, BLOCKS = 2, 3  # streams of random numbers, beside those of orders (fitting.py)


class Tuned(nn.Module):
    """An encoder and its head. `seed` decides the head's start."""

    def __init__(self, encoder: FrozenEncoder, classes: int, seed: int) -> None:
        super().__init__()
        assert encoder.parts is not None, "a floor has nothing to train, and was refused"
        self.encoder = encoder.parts.module.requires_grad_()
        self.norm = nn.LayerNorm(encoder.width, eps=LN_EPS)
        self.head = nn.Linear(encoder.width, classes)
        nn.init.trunc_normal_(self.head.weight, std=HEAD_STD, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(self.head.bias)
        self._encode = encoder.encode

    def pooled(self, given: Input) -> Float[Tensor, "n D"]:
        """The mean of all tokens, normalised."""
        return self.norm(self._encode(given).mean(1))

    def forward(self, given: Input) -> Float[Tensor, "n Y"]:
        """Logits of clips."""
        return self.head(self.pooled(given))


class Tuning:
    """A `Learner` (fitting.py) that trains an encoder; it keeps the newest checkpoint in `folder`."""

    def __init__(
        self, tuned: Tuned, encoder: FrozenEncoder, config: FinetuneConfig, settings: ProbeSettings,
        labels: Int[np.ndarray, " N"], samples: Samples, folder: Path, identity: Identity, device: torch.device,
    ) -> None:  # fmt: skip
        parts = encoder.parts
        assert parts is not None, "a floor has nothing to train, and was refused"
        self._tuned, self._config, self._settings = tuned.to(device), config, settings
        self._labels = torch.from_numpy(labels.astype(np.int64)).to(device)
        self._batch = batch_of(samples, settings)
        self._steps = len(samples) // self._batch  # of an epoch
        self._folder, self._identity = folder, identity
        self._optimiser = optimiser_of(tuned, parts, config, settings.pairs[0].weight_decay)
        blocks = list(parts.module.get_submodule(parts.blocks).children())
        # linear in depth from 0, as timm's and VideoMAE's; they draw for attention and MLP apart, here for the block
        self._dropped = np.linspace(0, config.drop_path, len(blocks))
        self._kept: Float[Tensor, "n l"] | None = None
        for number, block in enumerate(blocks):
            block.register_forward_hook(partial(self._skip, number), prepend=True)

    def losses(self, given: Input, chosen: Int[np.ndarray, "1 n"], epoch: int) -> Float[Tensor, ""]:
        """Cross-entropy with smoothed labels, summed over clips."""
        self._kept = self._draw(chosen[0], epoch).to(self._labels.device)
        logits = self._tuned(given).float()
        self._kept = None
        labels = self._labels[torch.from_numpy(chosen[0]).to(logits.device)]
        return functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=self._config.smoothing)

    def step(self, step: int, ranks: Ranks) -> None:
        """One step of AdamW; parameters that the features do not depend on have no gradient and stay."""
        for parameter in self._tuned.parameters():
            if parameter.grad is not None:
                ranks.sum(parameter.grad)
        rate = rate_at(step, self._steps, self._settings.pairs[0], self._settings)
        for group in self._optimiser.param_groups:
            group["lr"] = rate * group["scale"]
        self._optimiser.step()
        self._optimiser.zero_grad()

    def save(self, epochs: int) -> None:
        """Write a checkpoint, then remove the one before."""
        steps = epochs * self._steps
        progress = Progress(steps, steps * self._batch)
        checkpoint.save(self._folder, self._identity, progress, self._tuned, nn.Module(), self._optimiser)
        checkpoint.prune(self._folder, 1, ())

    def load(self) -> int:
        """Load the checkpoint, if there is one."""
        found = checkpoint.complete(self._folder)
        if not found:
            return 0
        progress = checkpoint.load(found[-1], self._identity, self._tuned, nn.Module(), self._optimiser)
        return progress.step // self._steps

    def _draw(self, samples: Samples, epoch: int) -> Float[Tensor, "n l"]:
        """What each block's change of each clip is multiplied by: 0, or so much that the mean is 1."""
        draws = [np.random.default_rng([BLOCKS, epoch, int(n)]).random(len(self._dropped)) for n in samples]
        return torch.from_numpy((np.stack(draws) >= self._dropped) / (1 - self._dropped)).float()

    def _skip(
        self, number: int, _block: nn.Module, given: tuple[Tensor, ...], out: Tensor | tuple[Tensor, ...]
    ) -> Tensor | tuple[Tensor, ...] | None:
        if self._kept is None:
            return None
        changed, *rest = out if isinstance(out, tuple) else (out,)
        share = self._kept[:, number].to(changed.dtype)
        share = share.repeat_interleave(len(changed) // len(share))  # an encoder may cut clips into frames or windows
        left = given[0] + (changed - given[0]) * share[:, None, None]
        return (left, *rest) if isinstance(out, tuple) else left


class OneSegment:
    """Clips that fine-tuning is given: of each sample one segment, and perhaps one view, drawn again in each epoch."""

    def __init__(self, streamed: Streamed, samples: int, segments: int, views: OneView | None = None) -> None:
        self._streamed, self._samples, self._segments, self._views = streamed, samples, segments, views

    def of(self, asked: Iterable[Samples], epoch: int | None = None) -> Iterator[Input]:
        """What the encoder reads of each group of samples."""
        assert epoch is not None, "fine-tuning reads epoch by epoch"
        drawn = np.random.default_rng([SEGMENTS, epoch]).integers(self._segments, size=self._samples)

        def clips(samples: Samples) -> Samples:
            seen = samples if self._views is None else self._views.drawn(samples, epoch)
            return seen * self._segments + drawn[samples]

        return self._streamed.read(map(clips, asked), epoch)


def layer_of(name: str, parts: Parts, depth: int) -> int:
    """The layer of an encoder's parameter: 0 before the blocks, which are 1 to `depth`, and the last norm's is next."""
    if name.startswith(f"{parts.blocks}."):
        return int(name.removeprefix(f"{parts.blocks}.").split(".", 1)[0]) + 1
    return depth + 1 if name.startswith(f"{parts.norm}.") else 0


def optimiser_of(tuned: Tuned, parts: Parts, config: FinetuneConfig, weight_decay: float) -> torch.optim.AdamW:
    """AdamW by layer and decay; the rate of a group is `scale` times the head's.

    Weight decay is for matrices alone: not for biases and norms, nor for tokens and positions that are learnt (BEiT).
    """
    depth = len(list(parts.module.get_submodule(parts.blocks).children()))
    groups: dict[tuple[int, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in tuned.named_parameters():
        layer = depth + 1
        if name.startswith("encoder."):
            layer = layer_of(name.removeprefix("encoder."), parts, depth)
        decays = parameter.ndim > 1 and name.endswith(".weight")
        groups.setdefault((layer, decays), []).append((name, parameter))
    return torch.optim.AdamW(
        [
            {
                "params": [parameter for _, parameter in members],
                "parameter_names": [name for name, _ in members],
                "scale": config.layer_decay ** (depth + 1 - layer),
                "weight_decay": weight_decay if decays else 0.0,
            }
            for (layer, decays), members in sorted(groups.items())
        ],
        betas=BETAS,
        fused=True,
    )


def judge(
    tuned: Tuned, encoder: FrozenEncoder, clips: Clips, rows: BenchmarkRows, pictured: int, ranks: Ranks
) -> tuple[int, Float[Tensor, "m D"]]:
    """How many test answers of all ranks are right, and the mean features of the first `pictured` test samples."""
    test = rows.part("test")
    labels, groups = (np.repeat(per_sample(test, column), rows.segments) for column in ("label", "clip_group"))
    pooling = replace(encoder, encode=lambda given: tuned.pooled(given)[:, None])
    streamed = Streamed(pooling, replace(clips, segments=1), "test")
    right = torch.zeros(1, 1, dtype=torch.int64, device=ranks.device)
    pooled = torch.zeros(min(pictured, len(labels) // rows.segments), encoder.width, device=ranks.device)
    for numbers, features in shared(streamed, whole_groups(groups, CLIPS_AT_ONCE), ranks):
        means = features[:, 0].float()
        with torch.no_grad():
            shares = tuned.head(means).softmax(-1)
        right += answered_rightly(voted(shares[None, None], groups[numbers]), labels[numbers], groups[numbers])
        samples = torch.from_numpy(numbers // rows.segments).to(ranks.device)
        shown = samples < len(pooled)
        pooled.index_add_(0, samples[shown], means[shown] / rows.segments)
    return int(ranks.sum(right)), ranks.sum(pooled)
