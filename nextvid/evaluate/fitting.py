"""Training and scoring of attentive probes on features as they come, all seeds and settings side by side; and k-NN.

The schedule is docs/method.md 9, with the warm-up of the demo's study (docs/demo.md). Every probe learns as if alone:
its own gradient clipping and optimiser moments, and where `settings.own_orders` says so its seed's own batches. Ranks
share each batch and add up gradients, so that every one has the same probes.

k-nearest-neighbour votes tell what features hold without any training. They are reported beside the attentive probe and
never as the headline: on the demo they stay near chance in every arm (docs/demo.md).

Axes: G seeds, R pairs of rate and weight decay, K = R G probes, O orders of clips (G, or 1 for all seeds), N clips, n
of a group, B clips of a batch, b of a rank's part of it, L tokens of a clip, D width, Y classes; M clips to label, P
numbers of a vector.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

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
    batch = min(settings.batch, len(lesson.samples))
    if batch < ranks.count:
        raise RefusedError(f"a batch of {batch} clips cannot be shared by {ranks.count} ranks: ask for fewer ranks")
    probes = Probes(lesson.width, lesson.classes, settings, seeds).to(ranks.device)
    optimiser, views = _optimiser(probes, settings)
    labels = torch.from_numpy(lesson.labels.astype(np.int64)).to(ranks.device)
    own = seeds if settings.own_orders else seeds[:1]
    steps = len(lesson.samples) // batch
    first = _load(resume, probes, optimiser, views) if resume is not None else 0
    at_once = max(1, HEADS_BYTES // (len(own) * lesson.tokens * lesson.width * 4))
    for epoch, orders in enumerate(_orders(lesson.samples, batch, settings.epochs, own)):
        if epoch < first:
            continue
        pieces = [
            (step, chosen, last)
            for step in range(steps)
            for chosen, last in _pieces(np.array_split(orders[:, step], ranks.count, axis=1)[ranks.rank], at_once)
        ]
        found = lesson.features.of((chosen.ravel() for _, chosen, _ in pieces), epoch)
        total = torch.zeros((), device=ranks.device)
        for (step, chosen, last), tokens in zip(pieces, found, strict=True):
            seen = rearrange(normalise(tokens), "(o b) l d -> o b l d", o=len(own))
            losses = _losses(probes, seen, labels[torch.from_numpy(chosen).to(ranks.device)]).sum() / batch
            losses.backward()
            total += losses.detach()
            if last:
                for group in optimiser.param_groups:
                    group["lr"] = rate_at(epoch * steps + step, steps, group["pair"], settings)
                _step(probes, optimiser, views, settings.clip, ranks)
        if resume is not None:
            if ranks.first:
                _save(resume, epoch + 1, probes, optimiser, views)
            ranks.wait()
        on_epoch(epoch, float(ranks.sum(total)) / max(1, steps) / (len(seeds) * len(settings.pairs)))
    return probes


def _pieces(chosen: Int[np.ndarray, "O b"], at_once: int) -> Iterator[tuple[Int[np.ndarray, "O c"], bool]]:
    """A rank's share of a batch in pieces, and whether each is the last."""
    for first in range(0, chosen.shape[1], at_once):
        yield chosen[:, first : first + at_once], first + at_once >= chosen.shape[1]


def _losses(probes: Probes, seen: Float[Tensor, "O b L D"], labels: Int[Tensor, "O b"]) -> Float[Tensor, " K*b"]:
    """Cross-entropy of every probe on every clip."""
    logits = probes(seen)  # [G, R, b, Y]
    targets = repeat(labels, "o b -> (o s r b)", s=probes.seeds // len(labels), r=probes.pairs)
    return functional.cross_entropy(rearrange(logits, "g r b y -> (g r b) y"), targets, reduction="none")


def _step(
    probes: Probes,
    optimiser: torch.optim.AdamW,
    views: Sequence[tuple[Tensor, nn.Parameter, int]],
    clip: float,
    ranks: Ranks,
) -> None:
    """One step of every probe by the gradients that all ranks added up; they are zero afterwards."""
    for parameter in probes.parameters():
        assert parameter.grad is not None
        ranks.sum(parameter.grad)
    _clip_each(probes, clip)
    for view, parameter, pair in views:
        assert parameter.grad is not None
        view.grad = parameter.grad.unflatten(0, (-1, probes.seeds))[pair]
    optimiser.step()
    probes.zero_grad()


@torch.no_grad()
def answers_of(
    probes: Probes, tokens: Float[Tensor, "n L D"], groups: Int[np.ndarray, " n"]
) -> Int[Tensor, "G R clips"]:
    """The class that each probe gives each clip.

    Samples with the same `groups` value, which follow one another, are views of one clip: their softmaxes are averaged,
    as one (docs/method.md 9).
    """
    shares = probes(normalise(tokens)[None]).softmax(-1)  # [G, R, n, Y]
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
    found = answers_of(probes, tokens, groups)
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


def _orders(
    samples: Int[np.ndarray, " n"], batch: int, epochs: int, seeds: Sequence[int]
) -> Iterator[Int[np.ndarray, "O steps B"]]:
    """Samples of every step by epoch: a new permutation for each seed, whole batches only."""
    generators = [np.random.default_rng([seed, 1]) for seed in seeds]  # 1: another stream than the start's
    whole = len(samples) // batch * batch
    for _ in range(epochs):
        yield np.stack([samples[g.permutation(len(samples))[:whole]].reshape(-1, batch) for g in generators])


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


def _save(
    path: Path,
    epochs: int,
    probes: Probes,
    optimiser: torch.optim.AdamW,
    views: Sequence[tuple[Tensor, nn.Parameter, int]],
) -> None:
    """Publish parameters and moments after so many epochs."""
    tensors = {f"parts/{name}": value.detach().cpu() for name, value in probes.parts.items()}
    for number, (view, _, _) in enumerate(views):
        tensors |= {f"{moment}/{number}": optimiser.state[view][moment].cpu() for moment in MOMENTS}
    with atomic.staged_file(str(path)) as temporary:
        save_file(tensors, temporary, {"epochs": str(epochs)})


def _load(
    path: Path, probes: Probes, optimiser: torch.optim.AdamW, views: Sequence[tuple[Tensor, nn.Parameter, int]]
) -> int:
    """Read what `_save` wrote, if anything: how many epochs it has seen."""
    if not path.is_file():
        return 0
    device = views[0][0].device
    with safe_open(path, framework="pt") as file, torch.no_grad():
        for name, value in probes.parts.items():
            value.copy_(file.get_tensor(f"parts/{name}"))
        for number, (view, _, _) in enumerate(views):
            optimiser.state[view] = {m: file.get_tensor(f"{m}/{number}").to(device) for m in MOMENTS}
        return int(file.metadata()["epochs"])


@torch.no_grad()
def _clip_each(probes: Probes, limit: float) -> None:
    """Clip the gradient norm of each probe on its own, so that one rate does not slow another."""
    gradients = [p.grad for p in probes.parameters() if p.grad is not None]
    norms = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0).sqrt()  # [K]
    scale = (limit / (norms + 1e-6)).clamp(max=1.0)  # 1e-6 as in torch.nn.utils.clip_grad_norm_
    for gradient in gradients:
        gradient.mul_(scale.reshape(-1, *[1] * (gradient.dim() - 1)))
