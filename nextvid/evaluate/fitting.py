"""Training and scoring of attentive probes on features as they come, all seeds and settings side by side; and k-NN.

The schedule is docs/method.md 9, with the warm-up of the demo's study (docs/demo.md). Every probe learns as if alone:
its own gradient clipping and optimiser moments, and where `settings.own_orders` says so its seed's own batches. Ranks
share each batch and add up gradients, so that every one has the same probes. Fine-tuning (finetune.py) is another
learner in the same loop.

k-nearest-neighbour votes tell what features hold without any training. They are reported beside the attentive probe and
never as the headline: on the demo they stay near chance in every arm (docs/demo.md).

Axes: G seeds, R pairs of rate and weight decay, K = R G probes, O orders of clips (G, or 1 for all seeds), N clips, n
of a group, B clips of a batch, b of a rank's part of it, L tokens of a clip, D width, Y classes; M clips to label, P
numbers of a vector.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from nextvid.evaluate.attentive import LN_EPS, Pair, Probes, ProbeSettings
from nextvid.evaluate.stream import Features, Samples
from nextvid.train.distributed import Ranks
from storage import atomic
from storage.errors import RefusedError

NEIGHBOURS = 20  # as in DINO and in the demo's study
KNOWN_AT_ONCE = 2048  # clips; with QUERIES_AT_ONCE it bounds the matrix of similarities to 2 MB, of labels to 4
QUERIES_AT_ONCE = 256
HEADS_BYTES = 1 << 30  # our choice: normalised features that the heads learn from at once; more are added up
ALONE = Ranks(0, 1, torch.device("cpu"))
MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # what AdamW keeps of each part


def normalise(tokens: Float[Tensor, "n L D"]) -> Float[Tensor, "n L D"]:
    """LayerNorm without affine of every token."""
    return functional.layer_norm(tokens.float(), tokens.shape[-1:], eps=LN_EPS)


@dataclass(frozen=True)
class Lesson:
    """What probes learn from: features of a split's samples, their labels, and which samples to take."""

    features: Features
    labels: Int[np.ndarray, " N"]
    samples: Int[np.ndarray, " n"]
    classes: int
    tokens: int  # of a sample
    width: int


class Learner(Protocol):
    """What learns from passes over clips, and goes on from the last that it kept."""

    def losses(self, given: Tensor, chosen: Int[np.ndarray, "O b"], epoch: int) -> Float[Tensor, ""]:
        """Sum of the losses on these samples, of which `given` was read, with gradients."""
        ...

    def step(self, step: int, ranks: Ranks) -> None:
        """Take one of all steps by the gradients that all ranks added up; they are zero afterwards."""
        ...

    def save(self, epochs: int) -> None:
        """Keep what is learnt after so many epochs."""
        ...

    def load(self) -> int:
        """What was kept, if anything: how many epochs it has seen. Every rank calls this."""
        ...


class Given(Protocol):
    """What a learner reads of samples, group by group, in order, in an epoch."""

    def of(self, asked: Iterable[Samples], epoch: int | None = None) -> Iterator[Tensor]: ...


def fit(
    lesson: Lesson,
    settings: ProbeSettings,
    seeds: Sequence[int],
    ranks: Ranks = ALONE,
    resume: Path | None = None,
    on_epoch: Callable[[int, float], None] = lambda epoch, loss: None,
) -> Probes:
    """Train a probe for each seed and pair; each seed has its own start.

    After each epoch `resume`, if named, has all that is learnt so far: where it is, training goes on from it, and ends
    with the same bits. `on_epoch` is told the number of the epoch and the mean loss of all probes.
    Raises RefusedError for a batch smaller than the ranks.
    """
    heads = _Heads(lesson, settings, seeds, ranks, resume)
    own = seeds if settings.own_orders else seeds[:1]
    at_once = max(1, HEADS_BYTES // (len(own) * lesson.tokens * lesson.width * 4))
    count = len(seeds) * len(settings.pairs)
    learn(
        heads, lesson.features, lesson.samples, settings, own, at_once, ranks, lambda e, loss: on_epoch(e, loss / count)
    )
    return heads.probes


def learn(
    learner: Learner, given: Given, samples: Samples, settings: ProbeSettings, seeds: Sequence[int], at_once: int,
    ranks: Ranks, on_epoch: Callable[[int, float], None],
) -> None:  # fmt: skip
    """Epochs of a learner over samples, in an order for each seed, from the last epoch that it kept.

    A step has `settings.batch` samples of each order, of which every rank reads its share, `at_once` at a time.
    `on_epoch` is told the number of the epoch and the mean loss of a sample. Raises RefusedError for a batch smaller
    than the ranks.
    """
    batch = batch_of(samples, settings)
    if batch < ranks.count:
        raise RefusedError(f"a batch of {batch} clips cannot be shared by {ranks.count} ranks: ask for fewer ranks")
    steps = len(samples) // batch
    first = learner.load()
    generators = [np.random.default_rng([seed, 1]) for seed in seeds]  # 1: another stream than the start's
    for epoch in range(settings.epochs):
        orders = np.stack([samples[g.permutation(len(samples))[: steps * batch]] for g in generators])
        if epoch < first:
            continue
        pieces = list[tuple[int, Int[np.ndarray, "O c"], bool]]()
        for step in range(steps):  # this rank's share, and whether a piece is the last of it
            whole = orders[:, step * batch : (step + 1) * batch]
            share = np.array_split(whole, ranks.count, axis=1)[ranks.rank]
            starts = range(0, share.shape[1], at_once)
            pieces += [(step, share[:, at : at + at_once], at == starts[-1]) for at in starts]
        found = given.of((chosen.ravel() for _, chosen, _ in pieces), epoch)
        total = torch.zeros((), device=ranks.device)
        for (step, chosen, last), piece in zip(pieces, found, strict=True):
            loss = learner.losses(piece, chosen, epoch) / batch
            loss.backward()
            total += loss.detach()
            if last:
                learner.step(epoch * steps + step, ranks)
        if ranks.first:
            learner.save(epoch + 1)
        ranks.wait()
        on_epoch(epoch, float(ranks.sum(total)) / max(1, steps))


def batch_of(samples: Samples, settings: ProbeSettings) -> int:
    """Samples of a step."""
    return min(settings.batch, len(samples))


class _Heads:
    """Probes side by side on frozen features, with one optimiser; kept in the file `resume`, if it is named."""

    def __init__(
        self, lesson: Lesson, settings: ProbeSettings, seeds: Sequence[int], ranks: Ranks, resume: Path | None
    ) -> None:
        self.probes = Probes(lesson.width, lesson.classes, settings, seeds).to(ranks.device)
        self._settings, self._resume = settings, resume
        self._optimiser, self._views = _optimiser(self.probes, settings)
        self._labels = torch.from_numpy(lesson.labels.astype(np.int64)).to(ranks.device)
        self._steps = len(lesson.samples) // batch_of(lesson.samples, settings)  # of an epoch

    def losses(self, given: Float[Tensor, "n L D"], chosen: Int[np.ndarray, "O b"], epoch: int) -> Float[Tensor, ""]:
        """Cross-entropy, summed over probes and clips."""
        seen = rearrange(normalise(given), "(o b) l d -> o b l d", o=len(chosen))
        logits = self.probes(seen)  # [G, R, b, Y]
        labels = self._labels[torch.from_numpy(chosen).to(given.device)]
        targets = repeat(labels, "o b -> (o s r b)", s=self.probes.seeds // len(labels), r=self.probes.pairs)
        flat = rearrange(logits, "g r b y -> (g r b) y")
        return functional.cross_entropy(flat, targets, reduction="none").sum()

    def step(self, step: int, ranks: Ranks) -> None:
        """One step of every probe."""
        for group in self._optimiser.param_groups:
            group["lr"] = rate_at(step, self._steps, group["pair"], self._settings)
        for parameter in self.probes.parameters():
            assert parameter.grad is not None
            ranks.sum(parameter.grad)
        _clip_each(self.probes, self._settings.clip)
        for view, parameter, pair in self._views:
            assert parameter.grad is not None
            view.grad = parameter.grad.unflatten(0, (-1, self.probes.seeds))[pair]
        self._optimiser.step()
        self.probes.zero_grad()

    def save(self, epochs: int) -> None:
        """Publish parameters and moments."""
        if self._resume is None:
            return
        tensors = {f"parts/{name}": value.detach().cpu() for name, value in self.probes.parts.items()}
        for number, (view, _, _) in enumerate(self._views):
            tensors |= {f"{moment}/{number}": self._optimiser.state[view][moment].cpu() for moment in MOMENTS}
        with atomic.staged_file(str(self._resume)) as temporary:
            save_file(tensors, temporary, {"epochs": str(epochs)})

    def load(self) -> int:
        """What `save` wrote."""
        if self._resume is None or not self._resume.is_file():
            return 0
        device = self._labels.device
        with safe_open(self._resume, framework="pt") as file, torch.no_grad():
            for name, value in self.probes.parts.items():
                value.copy_(file.get_tensor(f"parts/{name}"))
            for number, (view, _, _) in enumerate(self._views):
                self._optimiser.state[view] = {m: file.get_tensor(f"{m}/{number}").to(device) for m in MOMENTS}
            return int(file.metadata()["epochs"])


@torch.no_grad()
def answers_of(
    probes: Probes, tokens: Float[Tensor, "n L D"], groups: Int[np.ndarray, " n"]
) -> Int[Tensor, "G R clips"]:
    """The class that each probe gives each clip.

    Samples with the same `groups` value, which follow one another, are views of one clip: their softmaxes are averaged,
    as one (docs/method.md 9).
    """
    return voted(probes(normalise(tokens)[None]).softmax(-1), groups)


def voted(shares: Float[Tensor, "G R n Y"], groups: Int[np.ndarray, " n"]) -> Int[Tensor, "G R clips"]:
    """The class with the largest mean share of each group of samples."""
    clips, group = np.unique(groups, return_inverse=True)
    summed = torch.zeros(*shares.shape[:2], len(clips), shares.shape[-1], device=shares.device)
    summed.index_add_(2, torch.from_numpy(group).to(shares.device), shares)
    return summed.argmax(-1)


def right_answers(
    probes: Probes,
    tokens: Float[Tensor, "n L D"],
    labels: Int[np.ndarray, " n"],
    groups: Int[np.ndarray, " n"],
) -> Int[Tensor, "G R"]:
    """How many clips each probe classifies rightly; `groups` as in `answers_of`."""
    return answered_rightly(answers_of(probes, tokens, groups), labels, groups)


def answered_rightly(
    found: Int[Tensor, "G R clips"], labels: Int[np.ndarray, " n"], groups: Int[np.ndarray, " n"]
) -> Int[Tensor, "G R"]:
    """How many answers are the labels of their samples."""
    truth = torch.from_numpy(labels[np.unique(groups, return_index=True)[1]].astype(np.int64)).to(found.device)
    return (found == truth).sum(-1)


def whole_groups(groups: Int[np.ndarray, " N"], at_once: int) -> Iterator[Samples]:
    """Numbers of samples in pieces of about `at_once` that no group crosses; equal groups follow one another."""
    starts = np.r_[0, np.flatnonzero(np.diff(groups)) + 1, len(groups)]
    first = 0
    while first < len(starts) - 1:
        last = max(first + 1, int(np.searchsorted(starts, starts[first] + at_once, "right")) - 1)
        yield np.arange(starts[first], starts[last])
        first = last


@torch.no_grad()
def nearest_labels(
    known: Float[np.ndarray, "N P"],
    labels: Int[np.ndarray, " N"],
    queries: Float[np.ndarray, "M P"],
    neighbours: int = NEIGHBOURS,
    device: torch.device | str = "cpu",
) -> Int[np.ndarray, " M"]:
    """Majority label of each clip's nearest known clips by cosine similarity; a tie goes to the smallest label."""
    neighbours, classes = min(neighbours, len(known)), int(labels.max()) + 1
    answers = [np.empty(0, np.int64)]
    for first in range(0, len(queries), QUERIES_AT_ONCE):
        asked = _unit(queries[first : first + QUERIES_AT_ONCE], device)
        best = torch.full((len(asked), neighbours), -math.inf, device=device)
        found = torch.zeros((len(asked), neighbours), dtype=torch.int64, device=device)
        for start in range(0, len(known), KNOWN_AT_ONCE):
            similarity = asked @ _unit(known[start : start + KNOWN_AT_ONCE], device).T
            own = torch.from_numpy(labels[start : start + KNOWN_AT_ONCE].astype(np.int64)).to(device)
            both = torch.cat([found, own.expand(len(asked), -1)], 1)
            best, places = torch.cat([best, similarity], 1).topk(neighbours, 1)
            found = both.gather(1, places)
        votes = torch.zeros((len(asked), classes), dtype=torch.int64, device=device)
        votes.scatter_add_(1, found, torch.ones_like(found))
        smallest = votes * classes - torch.arange(classes, device=device)  # of labels with equal votes
        answers.append(smallest.argmax(1).cpu().numpy())
    return np.concatenate(answers)


def _unit(vectors: np.ndarray, device: torch.device | str) -> Float[Tensor, "n P"]:
    """Vectors of length one."""
    return functional.normalize(torch.from_numpy(np.array(vectors, np.float32)).to(device), dim=1)


def rate_at(step: int, steps_per_epoch: int, pair: Pair, settings: ProbeSettings) -> float:
    """Linear warm-up, then a cosine to zero (docs/method.md 9)."""
    warm_up = settings.warm_up_steps + round(pair.warm_up_epochs * steps_per_epoch)
    if step < warm_up:
        return pair.warm_up_from + (pair.rate - pair.warm_up_from) * (step + 1) / warm_up
    after = max(1, settings.epochs * steps_per_epoch - warm_up)
    return pair.rate * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / after))


def _optimiser(
    probes: Probes, settings: ProbeSettings
) -> tuple[torch.optim.AdamW, list[tuple[Tensor, nn.Parameter, int]]]:
    """One AdamW over views into the stacked parameters, two groups for each pair of rate and decay.

    Also returned: the views as (view, parameter, pair), for their gradients. Matrices have weight decay, vectors have
    none (V-JEPA 2's probe).
    """
    views: list[tuple[Tensor, nn.Parameter, int]] = []
    groups: list[dict[str, object]] = []
    for number, pair in enumerate(settings.pairs):
        matrices, vectors = list[Tensor](), list[Tensor]()
        for parameter in probes.parameters():
            view = parameter.detach().unflatten(0, (-1, probes.seeds))[number].requires_grad_()
            views.append((view, parameter, number))
            (matrices if parameter.dim() == 3 else vectors).append(view)
        groups.append({"params": matrices, "pair": pair, "weight_decay": pair.weight_decay})
        groups.append({"params": vectors, "pair": pair, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, fused=True), views


@torch.no_grad()
def _clip_each(probes: Probes, limit: float) -> None:
    """Clip the gradient norm of each probe on its own, so that one rate does not slow another."""
    gradients = [p.grad for p in probes.parameters() if p.grad is not None]
    norms = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0).sqrt()  # [K]
    scale = (limit / (norms + 1e-6)).clamp(max=1.0)  # 1e-6 as in torch.nn.utils.clip_grad_norm_
    for gradient in gradients:
        gradient.mul_(scale.reshape(-1, *[1] * (gradient.dim() - 1)))
