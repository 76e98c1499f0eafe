"""One encoder on one benchmark: heads learn from train, the held-out part chooses, test is judged once.

Where the benchmark fine-tunes, the encoder learns with its one head (finetune.py).

Everything is read, encoded and consumed in passes, and only counts are added up: memory does not grow with the number
of clips. What is finished is kept beside the score, so that a score that was killed goes on from the last epoch.

Axes: N samples of a split, n of a group, G seeds, R pairs of rate and weight decay, P numbers of a vector.
"""

import json
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from nextvid.config.benchmarks import BenchmarkConfig, FinetuneConfig
from nextvid.evaluate.attentive import Probes, ProbeSettings
from nextvid.evaluate.benchmark_rows import BenchmarkRows, per_sample
from nextvid.evaluate.features import FrozenEncoder
from nextvid.evaluate.finetune import OneSegment, Tuned, Tuning, judge
from nextvid.evaluate.fitting import (
    NEIGHBOURS,
    QUERIES_AT_ONCE,
    Lesson,
    fit,
    learn,
    nearest_labels,
    right_answers,
    whole_groups,
)
from nextvid.evaluate.kept import Kept, keep, scratch, vectors_of
from nextvid.evaluate.pictured import Pictured
from nextvid.evaluate.stream import (
    CLIPS_AT_ONCE,
    Clips,
    Features,
    OneView,
    Stored,
    Streamed,
    Variation,
    open_clips,
    shared,
)
from nextvid.train.checkpoint import Identity
from nextvid.train.distributed import Ranks
from nextvid.trainset.trainset import Trainset
from storage import atomic
from storage.digest import digest_bytes, digest_config
from storage.root import DataRoot
from storage.spec import EncodingSpec, PixelSpec

PICTURED = 1000  # our choice: test samples whose mean features are kept for pictures (the report draws 600)
KNN = {"mean": "knn", "by_time": "knn_by_time", "change": "knn_by_change"}  # fields of score.json by vectors
UNFINISHED = "unfinished"  # folder beside a score.json that is not there yet
OnEpoch = Callable[[str, int, float], None]  # name of the encoder, number of the epoch, mean loss


@dataclass(frozen=True)
class Task:
    """Everything that a score depends on but the encoder, before anything is computed."""

    spec: EncodingSpec  # of the latents beside which the rows are
    config: BenchmarkConfig
    settings: ProbeSettings
    rows: BenchmarkRows
    pixels: PixelSpec | None = None  # what the encoder reads; None where it reads latents
    opened: Trainset | None = None  # None where an encoder of others reads pixels, which needs none

    @property
    def trainset(self) -> Trainset:
        """The trainset of the run, or whose statistics normalise the latents that are read."""
        assert self.opened is not None, "an encoder of others that reads pixels has no trainset"
        return self.opened

    @property
    def seeds(self) -> list[int]:
        """Seeds of the probe heads."""
        return list(range(self.config.seeds))

    def digest(self) -> str:
        """Id of rows, labels, settings and seeds."""
        return digest_config(
            {
                "rows": self.rows.digest(),
                "benchmark": self.config.values(),
                "settings": self.settings.model_dump(mode="json"),
                "neighbours": NEIGHBOURS,
            }
        )


def seen_clips(task: Task, split: str) -> str:
    """Id of a split's clips as an encoder sees them: benchmarks that have it in common need one pass of features."""
    rows = task.rows.part(split).select("row_id", "crc32c")
    return digest_config(
        {
            "rows": digest_bytes(b"".join(rows["row_id"].to_list()) + rows["crc32c"].to_numpy().tobytes()),
            "segments": task.rows.segments,
            "frames": task.config.policy.frames,
            "levels": task.config.levels,
            "trainset": None if task.opened is None else task.opened.digest,
            "pixels": None if task.pixels is None else task.pixels.digest(),
        }
    )


@dataclass(frozen=True)
class Scored:
    """The numbers of one encoder; for pictures, mean features of the first test samples, and what `Pictured` keeps."""

    numbers: dict[str, Any]
    pooled: Float[np.ndarray, "n D"]
    places: Mapping[str, np.ndarray]


def score_encoder(
    root: DataRoot,
    task: Task,
    encoder: FrozenEncoder,
    folder: str,
    ranks: Ranks,
    threads: int = 1,
    on_epoch: OnEpoch = lambda name, epoch, loss: None,
    kept_in: Mapping[str, str] = {},
) -> Scored:
    """Attentive-probe and k-NN accuracy of an encoder, or its accuracy fine-tuned. Every rank calls this.

    `folder` is the score's. Heads learn from the part of probe-train that is not held out; the held-out part chooses
    one pair of rate and weight decay for all seeds, by their mean accuracy. Test clips are scored once, with that pair.
    Without held-out clips the first pair is taken. Fine-tuning changes the encoder that it is given. `kept_in`: by
    split, the scratch folder whose features other benchmarks read too; the caller removes it.
    """
    done = Path(folder, UNFINISHED, f"{encoder.name}.npz")
    if not done.is_file():
        with ExitStack() as stack:
            clips = stack.enter_context(
                open_clips(
                    root, task.opened, task.pixels, task.rows, encoder, ranks.device, threads, task.config.test_crop
                )
            )
            if task.config.finetune is not None:
                place = done.with_suffix("")
                scored = _finetuned(task, task.config.finetune, encoder, clips, place, ranks, on_epoch)
            else:
                own = digest_config({"score": folder, "encoder": encoder.name})
                place = stack.enter_context(scratch(root, kept_in.get("train", own), ranks))
                tested = stack.enter_context(scratch(root, kept_in["test"], ranks)) if "test" in kept_in else None
                resume = done.with_suffix(".safetensors")
                learnt = _learn(root, task, encoder, clips, place, resume, ranks, on_epoch)
                scored = _judge(root, task, encoder, clips, learnt, tested, ranks)
            if ranks.first:
                with atomic.staged_file(str(done)) as temporary, temporary.open("wb") as file:
                    numbers = np.array(json.dumps(scored.numbers))
                    np.savez(file, numbers=numbers, pooled=scored.pooled, **scored.places)  # type: ignore[arg-type]
                if "train" not in kept_in:
                    atomic.remove_tree(str(place))
        ranks.wait()
    with np.load(done, allow_pickle=False) as arrays:
        places = {name: arrays[name] for name in arrays.files if name not in ("numbers", "pooled")}
        return Scored(json.loads(str(arrays["numbers"])), arrays["pooled"], places)


def _finetuned(
    task: Task, config: FinetuneConfig, encoder: FrozenEncoder, clips: Clips, place: Path, ranks: Ranks,
    on_epoch: OnEpoch,
) -> Scored:  # fmt: skip
    """Train the encoder with a head, with checkpoints in `place`, then one pass over test."""
    settings, rows = task.settings, task.rows
    labels, held = (per_sample(rows.part("train"), column) for column in ("label", "held_out"))
    samples = np.flatnonzero(~held)
    varied = None if settings.augment == "none" else Variation(settings.augment, task.seeds[0])
    streamed = Streamed(encoder, clips, "train", varied)
    views = None if rows.other_views.is_empty() else OneView(streamed, rows, task.seeds[0])
    given = OneSegment(streamed, len(labels), rows.segments, views)
    identity = Identity(encoder.name, task.digest(), task.opened.digest if task.opened else "", mask_plan="")
    tuned = Tuned(encoder, len(rows.classes), task.seeds[0])
    tuning = Tuning(tuned, encoder, config, settings, labels, samples, place, identity, ranks.device)
    learn(
        tuning, given, samples, settings, task.seeds, CLIPS_AT_ONCE, ranks,
        lambda epoch, loss: on_epoch(encoder.name, epoch, loss),
    )  # fmt: skip
    right, pooled = judge(tuned, encoder, clips, rows, PICTURED, ranks)
    tested = rows.part("test")["clip_group"].n_unique()
    pair, accuracy = settings.pairs[0], right / tested
    numbers = {
        "accuracy": accuracy,
        "standard_error": standard_error(accuracy, tested),
        "by_seed": [accuracy],
        "rate": pair.rate,
        "weight_decay": pair.weight_decay,
    }
    return Scored(numbers, pooled.half().cpu().numpy(), places={})


@dataclass(frozen=True)
class _Learnt:
    """Probes after their last epoch, the pair that held-out clips chose, and what k-NN knows."""

    probes: Probes
    pair: int
    by_pair: list[float]  # held-out accuracy
    kept: Kept
    labels: Int[np.ndarray, " N"]  # of train


def _learn(
    root: DataRoot, task: Task, encoder: FrozenEncoder, clips: Clips, place: Path, resume: Path, ranks: Ranks,
    on_epoch: OnEpoch,
) -> _Learnt:  # fmt: skip
    settings, rows = task.settings, task.rows
    labels, held = (per_sample(rows.part("train"), column) for column in ("label", "held_out"))
    streamed = Streamed(encoder, clips, "train")
    plain: Features = streamed
    varied = settings.augment != "none"
    bound_bytes = 0 if varied else root.cache_bytes
    kept = keep(streamed, len(labels), rows.segments, encoder, place, bound_bytes, ranks)
    if kept.features is not None:
        plain = Stored(kept.features, ranks.device, clips.threads)
    learnt: Features = plain
    if varied:
        learnt = Streamed(encoder, clips, "train", Variation(settings.augment, task.seeds[0]))
        if not rows.other_views.is_empty():
            learnt = OneView(learnt, rows, task.seeds[0])
    probes = fit(
        Lesson(learnt, labels, np.flatnonzero(~held), len(rows.classes), kept.tokens, encoder.width),
        settings,
        task.seeds,
        ranks,
        resume,
        lambda epoch, loss: on_epoch(encoder.name, epoch, loss),
    )
    right = torch.zeros(len(task.seeds), len(settings.pairs), dtype=torch.int64, device=ranks.device)
    judged, at_once = np.flatnonzero(held), _at_once(rows)
    pieces = (judged[first : first + at_once] for first in range(0, len(judged), at_once))
    for samples, features in shared(plain, pieces, ranks):
        right += right_answers(probes, features, labels[samples], samples)
    by_pair = ranks.sum(right).sum(0).cpu().numpy()  # whole numbers: of equals the first is taken
    shares = by_pair / (len(task.seeds) * max(1, int(held.sum())))
    return _Learnt(probes, int(by_pair.argmax()), shares.tolist(), kept, labels)


def _judge(
    root: DataRoot, task: Task, encoder: FrozenEncoder, clips: Clips, learnt: _Learnt, place: Path | None, ranks: Ranks
) -> Scored:
    """One pass over test; its features are kept in `place`, if named, or read from there."""
    rows, pairs = task.rows, task.settings.pairs
    answers, groups = (per_sample(rows.part("test"), column) for column in ("label", "clip_group"))
    right = torch.zeros(len(task.seeds), len(pairs), dtype=torch.int64, device=ranks.device)
    nearest = {name: _Nearest(vectors, learnt.labels, ranks.device) for name, vectors in learnt.kept.vectors.items()}
    pooled = torch.zeros(min(PICTURED, len(answers)), encoder.width, device=ranks.device)
    places = Pictured.of(learnt.probes, learnt.pair, learnt.kept.tokens, rows.segments, encoder, groups, ranks)
    streamed = Streamed(encoder, clips, "test")
    source: Features = streamed
    if place is not None:
        kept = keep(streamed, len(answers), rows.segments, encoder, place, root.cache_bytes, ranks)
        if kept.features is not None:
            source = Stored(kept.features, ranks.device, clips.threads)
    for samples, features in shared(source, whole_groups(groups, _at_once(rows)), ranks):
        right += right_answers(learnt.probes, features, answers[samples], groups[samples])
        vectors = vectors_of(features, encoder, rows.segments)
        for name, votes in nearest.items():
            votes.add(vectors[name].cpu().numpy(), answers[samples])
        pictured = samples[samples < len(pooled)]
        pooled[pictured] = vectors["mean"][: len(pictured)].float()
        places.add(samples, features, groups[samples])
    tested = len(np.unique(groups))
    by_seed = (ranks.sum(right).double() / tested)[:, learnt.pair].tolist()
    accuracy, chosen = sum(by_seed) / len(by_seed), pairs[learnt.pair]
    numbers = {
        "accuracy": accuracy,
        "standard_error": standard_error(accuracy, tested),
        "by_seed": by_seed,
        "rate": chosen.rate,
        "weight_decay": chosen.weight_decay,
        "held_out_by_pair": learnt.by_pair,
        "features": "streamed" if learnt.kept.features is None else "kept",
    }
    for name, votes in nearest.items():
        key, share = KNN[name], votes.share(len(answers), ranks)
        numbers |= {key: share, f"{key}_standard_error": standard_error(share, len(answers))}
    return Scored(numbers, ranks.sum(pooled).half().cpu().numpy(), places.kept(answers, ranks))


@dataclass
class _Nearest:
    """How many test samples k-NN answers rightly, counted QUERIES_AT_ONCE at a time."""

    known: Float[np.ndarray, "N P"]
    labels: Int[np.ndarray, " N"]
    device: torch.device
    right: int = 0
    queries: list[np.ndarray] = field(default_factory=list)
    answers: list[np.ndarray] = field(default_factory=list)

    def add(self, queries: Float[np.ndarray, "n P"], answers: Int[np.ndarray, " n"]) -> None:
        self.queries.append(queries)
        self.answers.append(answers)
        if sum(map(len, self.queries)) >= QUERIES_AT_ONCE:
            self._count()

    def share(self, samples: int, ranks: Ranks) -> float:
        """Of all samples of all ranks."""
        self._count()
        return int(ranks.sum(torch.tensor(self.right, device=self.device))) / samples

    def _count(self) -> None:
        if self.queries:
            found = nearest_labels(self.known, self.labels, np.concatenate(self.queries), device=self.device)
            self.right += int((found == np.concatenate(self.answers)).sum())
            self.queries.clear()
            self.answers.clear()


def standard_error(accuracy: float, clips: int) -> float:
    """Binomial standard error of an accuracy on so many test clips; seeds of heads share the clips and do not count."""
    return math.sqrt(accuracy * (1 - accuracy) / clips)


def _at_once(rows: BenchmarkRows) -> int:
    """Samples whose segments are encoded together."""
    return max(1, CLIPS_AT_ONCE // rows.segments)
