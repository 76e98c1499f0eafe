"""Training and scoring of attentive probes on frozen features, all seeds and learning rates side by side; and k-NN.

The schedule is docs/method.md 9, with the warm-up of the demo's study (docs/demo.md). Every probe learns as if alone:
its own batches, gradient clipping and optimiser moments.

k-nearest-neighbour votes on mean-pooled tokens tell what features hold without any training. They are reported beside
the attentive probe and never as the headline: on the demo they stay near chance in every arm (docs/demo.md).

Axes: G seeds, R rates, K = R G probes, N clips, B clips of a batch, L tokens of a clip, D width, Y classes; M clips to
label.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from nextvid.evaluate.attentive import LN_EPS, Probes, ProbeSettings

NEIGHBOURS = 20  # as in DINO and in the demo's study
QUERIES_AT_ONCE = 1024  # clips; bounds the memory of the similarity matrix


def normalise(tokens: np.ndarray, device: str = "cpu") -> Float[Tensor, "N L D"]:
    """LayerNorm without affine of every token, once for all steps: a float32 copy on the device."""
    out = torch.empty(tokens.shape, device=device)
    for first in range(0, len(tokens), 64):  # a piece that stays in cache
        piece = torch.from_numpy(np.ascontiguousarray(tokens[first : first + 64], dtype=np.float32)).to(device)
        out[first : first + 64] = functional.layer_norm(piece, piece.shape[-1:], eps=LN_EPS)
    return out


def fit(
    tokens: Float[Tensor, "N L D"] | Callable[[int], Float[Tensor, "N L D"]],
    labels: Int[np.ndarray, "N"],
    classes: int,
    settings: ProbeSettings,
    seeds: Sequence[int],
) -> Probes:
    """Train one probe per seed and rate; each seed has its own start and clip order.

    `tokens` come from `normalise`; where clips are varied they are a function of the epoch, called once for each.
    """
    now = tokens(0) if callable(tokens) else tokens
    device, clips = now.device, len(now)
    probes = Probes(now.shape[-1], classes, settings, seeds).to(device)
    answers = torch.from_numpy(labels.astype(np.int64)).to(device)
    batch = min(settings.batch, clips)
    steps_per_epoch = clips // batch
    steps = settings.epochs * steps_per_epoch
    orders = torch.stack([_order(clips, batch, settings.epochs, seed) for seed in seeds]).to(device)
    optimiser, views = _optimiser(probes, settings)
    seen = torch.empty(len(seeds) * batch, *now.shape[1:], device=device)  # reused: no new pages a step
    for step in range(steps):
        if callable(tokens) and step and step % steps_per_epoch == 0:
            now = tokens(step // steps_per_epoch)
        chosen = orders[:, step]  # [G, B]
        torch.index_select(now, 0, chosen.flatten(), out=seen)
        logits = probes(rearrange(seen, "(g b) l d -> g b l d", b=batch))
        targets = repeat(answers[chosen], "g b -> (g r b)", r=len(settings.rates))
        losses = functional.cross_entropy(rearrange(logits, "g r b y -> (g r b) y"), targets, reduction="none")
        probes.zero_grad()
        (losses.sum() / batch).backward()
        _clip_each(probes, settings.clip)
        for view, parameter, rate in views:
            assert parameter.grad is not None
            view.grad = parameter.grad.unflatten(0, (-1, len(seeds)))[rate]
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * _share_of_peak(step, steps, settings.warm_up_steps)
        optimiser.step()
    return probes


@torch.no_grad()
def accuracies(
    probes: Probes,
    tokens: Float[Tensor, "N L D"],
    labels: Int[np.ndarray, "N"],
    groups: Int[np.ndarray, "N"] | None = None,
) -> Float[np.ndarray, "G R"]:
    """Share of clips classified rightly, by seed and rate.

    Rows with the same `groups` value are views of one clip: their softmaxes are averaged, as one (docs/method.md 9).
    """
    logits = [probes(piece.expand(probes.seeds, -1, -1, -1)) for piece in tokens.split(256)]
    shares = torch.cat(logits, dim=2).softmax(-1).cpu().numpy()  # [G, R, N, Y]
    if groups is not None:
        _, first, group = np.unique(groups, return_index=True, return_inverse=True)
        summed = np.zeros((*shares.shape[:2], len(first), shares.shape[-1]), np.float32)
        for row, where in enumerate(group):
            summed[:, :, where] += shares[:, :, row]
        shares, labels = summed, labels[first]
    right: np.ndarray = (shares.argmax(-1) == labels).mean(-1)
    return right


def nearest_labels(
    known: Float[np.ndarray, "N D"],
    labels: Int[np.ndarray, "N"],
    queries: Float[np.ndarray, "M D"],
    neighbours: int = NEIGHBOURS,
) -> Int[np.ndarray, "M"]:
    """Majority label of each clip's nearest known clips by cosine similarity; a tie goes to the smallest label."""
    neighbours = min(neighbours, len(known))
    classes = int(labels.max()) + 1
    known = _unit(known)
    answers = []
    for first in range(0, len(queries), QUERIES_AT_ONCE):
        similarity = _unit(queries[first : first + QUERIES_AT_ONCE]) @ known.T
        nearest = np.argpartition(-similarity, neighbours - 1, axis=1)[:, :neighbours]
        votes = np.zeros((len(nearest), classes), np.int64)
        np.add.at(votes, (np.arange(len(nearest))[:, None], labels[nearest]), 1)
        answers.append(votes.argmax(axis=1))
    return np.concatenate(answers) if answers else np.empty(0, np.int64)


def _unit(features: np.ndarray) -> np.ndarray:
    """Rows of length one."""
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    unit: np.ndarray = features / np.maximum(lengths, np.finfo(np.float32).tiny)
    return unit


def _order(clips: int, batch: int, epochs: int, seed: int) -> Int[Tensor, "steps batch"]:
    """Clip numbers of every step: a new permutation in each epoch, whole batches only."""
    generator = np.random.default_rng([seed, 1])  # 1: another stream than the start's
    whole = clips // batch * batch
    permutations = [generator.permutation(clips)[:whole].reshape(-1, batch) for _ in range(epochs)]
    return torch.from_numpy(np.concatenate(permutations)) if permutations else torch.empty(0, batch, dtype=torch.int64)


def _share_of_peak(step: int, steps: int, warm_up: int) -> float:
    """Linear warm-up, then a cosine to zero (docs/method.md 9)."""
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def _optimiser(
    probes: Probes, settings: ProbeSettings
) -> tuple[torch.optim.AdamW, list[tuple[Tensor, nn.Parameter, int]]]:
    """One AdamW over views into the stacked parameters, one group for each rate and decay.

    Also returned: the views as (view, parameter, rate), for their gradients. Matrices have weight decay, vectors have
    none (V-JEPA 2's probe).
    """
    views: list[tuple[Tensor, nn.Parameter, int]] = []
    groups: list[dict[str, object]] = []
    for rate, peak in enumerate(settings.rates):
        matrices, vectors = list[Tensor](), list[Tensor]()
        for parameter in probes.parameters():
            view = parameter.detach().unflatten(0, (-1, probes.seeds))[rate].requires_grad_()
            views.append((view, parameter, rate))
            (matrices if parameter.dim() == 3 else vectors).append(view)
        groups.append({"params": matrices, "peak": peak, "weight_decay": settings.weight_decay})
        groups.append({"params": vectors, "peak": peak, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, fused=True), views


@torch.no_grad()
def _clip_each(probes: Probes, limit: float) -> None:
    """Clip the gradient norm of each probe on its own, so that one rate does not slow another."""
    gradients = [p.grad for p in probes.parameters() if p.grad is not None]
    norms = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0).sqrt()  # [K]
    scale = (limit / (norms + 1e-6)).clamp(max=1.0)  # 1e-6 as in torch.nn.utils.clip_grad_norm_
    for gradient in gradients:
        gradient.mul_(scale.reshape(-1, *[1] * (gradient.dim() - 1)))
