"""Scores of a run while it trains: k-NN and a linear probe on a few train clips of each benchmark, by the EMA encoder.

They tell whether features begin to answer a benchmark, and are not the scores of `probes`. Each clip is answered
by the clips of other files (cross-validation by file). No test clip is read: whoever chooses a checkpoint or a rate by
these curves has not chosen it by the test set. Of many classes a few are taken, so that each has several clips.

Axes: N clips, n of a group, m others, T times, D width, P numbers of a vector.
"""

import base64
import io
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import polars as pl
import torch
from einops import rearrange, reduce
from jaxtyping import Float, Int

from nextvid.config.project import Project
from nextvid.evaluate.benchmark_rows import BenchmarkRows
from nextvid.evaluate.features import FrozenEncoder, frozen
from nextvid.evaluate.fitting import nearest_labels
from nextvid.evaluate.probes import plan_task
from nextvid.evaluate.scoring import KNN
from nextvid.evaluate.stream import CLIPS_AT_ONCE, Clips, Streamed, open_clips
from nextvid.model.encoder import Encoder
from nextvid.train.diagnose import Scorer, Scores
from nextvid.train.distributed import Ranks
from nextvid.train.run import Run
from nextvid.trainset.pixels import open_pixels
from nextvid.trainset.trainset import Trainset
from storage.digest import digest
from storage.errors import NExTVidError

CLASSES = 10  # our choice: of Kinetics' 400 classes, 400 clips would leave one for each
FOLDS = 4  # our choice: a clip is answered by three quarters of the clips
RIDGES = np.logspace(-4, 2, 13)  # our choice, as multiples of the kernel's mean eigenvalue
Groups = Mapping[int, tuple[pl.DataFrame, Clips]]  # rows to score and clips to encode, by the frames of a clip


@contextmanager
def open_scorer(project: Project, run: Run, reference: Encoder, ranks: Ranks) -> Iterator[Scorer]:
    """The scorer of a run, with the store's files open. Every rank calls this; rank 0 reads tables for all of them."""
    sample, left_out = _sample(project, run) if ranks.first else (pl.DataFrame(), {})
    buffer = io.BytesIO()
    sample.write_ipc(buffer)
    sent = ranks.from_first(base64.b64encode(buffer.getvalue()).decode())
    assert sent is not None, "rank 0 sends its rows"
    sample = pl.read_ipc(io.BytesIO(base64.b64decode(sent)))
    trainset = Trainset.open(project.root, run.trainset)
    pixels = None if run.pixels is None else open_pixels(project.root, trainset, run.pixels).spec
    with ExitStack() as stack:
        groups: dict[int, tuple[pl.DataFrame, Clips]] = {}
        for frames in sample["given"].unique().sort().to_list() if sample.height else ():
            rows = sample.filter(given=frames)
            one = BenchmarkRows("", "", (), 1, rows.unique("row_id", keep="first", maintain_order=True), {})
            encoder = frozen("ema", reference, run.recipe, trainset, frames)
            opened = open_clips(project.root, trainset, pixels, one, encoder, ranks.device, run.how.threads)
            groups[frames] = rows, stack.enter_context(opened)

        def encode(now: Encoder) -> Scores:
            began, found = time.perf_counter(), {}
            for frames, (_, clips) in groups.items():
                encoder = frozen("ema", now, run.recipe, trainset, frames)
                found[frames] = means_by_time(encoder, clips, ranks).cpu().numpy()
            seconds = time.perf_counter() - began
            return lambda: {**_judged(groups, found), "seconds": round(seconds, 3)}

        yield Scorer(encode, left_out)


def _sample(project: Project, run: Run) -> tuple[pl.DataFrame, dict[str, str]]:
    """Rows to score, with `benchmark`, `label`, `fold` and the frames to encode; and why benchmarks have none."""
    found, left_out = list[pl.DataFrame](), dict[str, str]()
    for name, config in sorted(project.corpus.benchmarks.items()):
        try:
            rows = sampled(plan_task(project, name, run).rows, run.how.score_clips)
        except NExTVidError as error:
            left_out[name] = str(error)
            continue
        if rows["fold"].n_unique() < 2:
            left_out[name] = "its train clips are all of one file"
            continue
        given = config.policy.frames if config.policy.frames > 1 else run.recipe.clip_lengths[0]
        found.append(rows.with_columns(benchmark=pl.lit(name), given=pl.lit(given)))
    return pl.concat(found) if found else pl.DataFrame(), left_out


def sampled(rows: BenchmarkRows, clips: int) -> pl.DataFrame:
    """At most so many train clips of a benchmark: one a shot, as many of each class as of another.

    Of more than CLASSES classes, those that have as many clips as others are taken first, drawn by a hash.
    """
    first = rows.part("train").filter(segment=rows.segments // 2).unique(["shot_id", "label"], keep="first")
    share = max(1, clips // min(CLASSES, len(rows.classes)))
    ordered = first.sort("sample").with_columns(nth=pl.int_range(pl.len()).over("label"))
    counts = ordered.group_by("label").agg(has=pl.min_horizontal(pl.len(), pl.lit(share)))
    drawn = pl.Series([digest(["class", rows.classes[label]]) for label in counts["label"]], dtype=pl.String)
    taken = counts.with_columns(drawn=drawn).sort("has", "drawn", descending=[True, False]).head(CLASSES)
    chosen = ordered.filter(pl.col("nth") < share).join(taken.select("label"), on="label", how="semi")
    file = pl.coalesce("group", pl.col("media_id").bin.encode("hex"))
    return chosen.with_columns(fold=(file.rank("dense") - 1) % FOLDS).drop("nth").sort("sample")


def means_by_time(encoder: FrozenEncoder, clips: Clips, ranks: Ranks) -> Float[torch.Tensor, "N T D"]:
    """Mean tokens of each time of every clip, the same on each rank, which encodes its share. Every rank calls this."""
    count = clips.frame.height
    found = torch.zeros(count, encoder.times, encoder.width, device=ranks.device)
    own = range(count * ranks.rank // ranks.count, count * (ranks.rank + 1) // ranks.count)
    pieces = [np.arange(own.stop)[first : first + CLIPS_AT_ONCE] for first in own[::CLIPS_AT_ONCE]]
    for piece, features in zip(pieces, Streamed(encoder, clips, "train").of(pieces), strict=True):
        found[piece] = reduce(features.float(), "n (t s) d -> n t d", "mean", t=encoder.times)
    return ranks.sum(found)


def _judged(groups: Groups, found: Mapping[int, Float[np.ndarray, "N T D"]]) -> dict[str, Any]:
    """`accuracy` by `<benchmark>/<what>` (`answered`), `chance` by benchmark (its most frequent class), and `clips`."""
    scores: dict[str, dict[str, Any]] = {"accuracy": {}, "chance": {}, "clips": {}}
    for frames, (rows, clips) in groups.items():
        places = {row: place for place, row in enumerate(clips.frame["row_id"])}
        for (name,), own in rows.group_by("benchmark", maintain_order=True):
            vectors, labels = found[frames][[places[row] for row in own["row_id"]]], own["label"].to_numpy()
            shares = answered(vectors, labels, own["fold"].to_numpy())
            scores["accuracy"] |= {f"{name}/{what}": share for what, share in shares.items()}
            scores["chance"][str(name)] = float(np.bincount(labels).max() / len(labels))
            scores["clips"][str(name)] = len(labels)
    return scores


def answered(
    vectors: Float[np.ndarray, "N T D"], labels: Int[np.ndarray, " N"], folds: Int[np.ndarray, " N"]
) -> dict[str, float]:
    """Shares of clips that are answered rightly: by k-NN of means and of changes, and by a linear probe.

    NaN if a vector is not finite.
    """
    known = {"mean": vectors.mean(1), "by_time": rearrange(vectors, "n t d -> n (t d)")}
    if vectors.shape[1] > 1:
        known["change"] = rearrange(np.diff(vectors, axis=1), "n t d -> n (t d)")
    right = dict.fromkeys([*(KNN[name] for name in known if name != "by_time"), "linear"], 0)
    if not np.isfinite(vectors).all():
        return dict.fromkeys(right, math.nan)
    for fold in np.unique(folds):
        asked, others = folds == fold, folds != fold
        for name, each in known.items():
            key = "linear" if name == "by_time" else KNN[name]
            answer = linear_labels if name == "by_time" else nearest_labels
            right[key] += int((answer(each[others], labels[others], each[asked]) == labels[asked]).sum())
    return {name: count / len(labels) for name, count in right.items()}


def linear_labels(
    known: Float[np.ndarray, "m P"], labels: Int[np.ndarray, " m"], queries: Float[np.ndarray, "n P"]
) -> Int[np.ndarray, " n"]:
    """Labels by least squares on one-hot labels, with the ridge of RIDGES whose leave-one-out error is the least.

    Vectors are centred and scaled as the known are. Solved by the kernel, m x m, since P may be thousands. How frequent
    a class is among the known is left out of the answer: of equally many clips of each class those of the asked ones
    are rarest among the known, so that vectors which say nothing would be answered worse than by chance.
    """
    classes, targets = np.unique(labels, return_inverse=True)
    mean, std = known.mean(0, dtype=np.float64), known.std(0, dtype=np.float64)
    seen, asked = ((each - mean) / np.where(std > 0, std, 1) for each in (known, queries))
    values, basis = np.linalg.eigh(seen @ seen.T)
    values = values.clip(min=0)
    wanted = np.eye(len(classes))[targets]
    turned = basis.T @ (wanted - wanted.mean(0))
    best, weights = np.inf, np.zeros_like(turned)
    for ridge in RIDGES * (values.mean() or 1.0):  # 1.0: all vectors are equal
        scaled = basis / (values + ridge)  # columns of `basis` by the inverse eigenvalues
        own = np.einsum("ij,ij->i", scaled, basis) - 1 / (ridge * len(known))  # the mean takes a degree of freedom
        left = scaled @ turned
        error = float(np.square(left / own[:, None]).sum())
        if error < best:
            best, weights = error, left
    return classes[(asked @ (seen.T @ weights)).argmax(1)]
