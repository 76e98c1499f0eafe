"""The report's section on scores: accuracies with standard errors beside the run's own random initialisation.

Holds wording and rounding of what score.json says; computes nothing but differences and their errors.
"""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nextvid.report.blocks import Block, Picture, Section, Table, Text
from nextvid.report.scatter import scatter_png

LEARNT = {  # what heads learn from: method.md 9 wants it stated where features are read once
    "none": "Heads learn from stored views, whose features are read once.",
    "video": "Heads learn from clips that are varied anew in each epoch (RandAugment, crops, erasing; no flips).",
    "image": "Heads learn from images that are varied anew in each epoch (AutoAugment, crops, flips, erasing).",
}
NAMES = {"ema": "EMA encoder", "online": "online encoder", "random": "random initialisation"}


@dataclass(frozen=True)
class Score:
    """A score.json, where it stands, and the pooled features beside it."""

    said: Mapping[str, Any]
    path: str  # as the report names it
    features: Mapping[str, np.ndarray]

    @property
    def benchmark(self) -> str:
        return str(self.said["benchmark"])


def read_features(data: bytes) -> dict[str, np.ndarray]:
    """Arrays of features.npz."""
    with np.load(io.BytesIO(data), allow_pickle=False) as kept:
        return {name: kept[name] for name in kept.files}


def section(scores: Sequence[Score]) -> Section:
    """Headline, table and t-SNE of every benchmark."""
    blocks: list[Block] = [Text(headline(score), "lead", (score.path,)) for score in scores]
    blocks += [table(score) for score in scores]
    blocks.append(
        Text(
            "Accuracy is the mean over probe seeds, ± its binomial standard error over test clips. The random "
            "initialisation is this run's own: same recipe, input and seed, probed on the same clips. Its difference "
            "to itself is left empty. k-NN reads mean-pooled tokens (cosine, "
            f"k = {scores[0].said['neighbours']}) and is no headline.",
        )
    )
    blocks += [scatter(score) for score in scores]
    return Section("Scores", tuple(blocks))


def headline(score: Score) -> str:
    """One sentence a benchmark, decided by numbers: a gain is claimed beyond two standard errors only."""
    ema, random = (score.said["encoders"][name] for name in ("ema", "random"))
    gain, error = difference(score.said, "ema")
    numbers = f"{_share(ema['accuracy'])} against {_share(random['accuracy'])} of its own random initialisation"
    if abs(gain) <= 2 * error:
        verdict = f"a difference of {points(gain)} points that two standard errors ({2 * 100 * error:.1f}) cover"
    else:
        verdict = f"{points(gain)} points, {abs(gain) / error:.1f} standard errors"
    return f"{score.benchmark}: the frozen EMA encoder answers {numbers}: {verdict}."


def difference(said: Mapping[str, Any], name: str) -> tuple[float, float]:
    """Accuracy of an encoder minus the random one's, and its standard error as of independent samples.

    Both answer the same clips, so that error is rather too large, and the claim careful.
    """
    found, random = said["encoders"][name], said["encoders"]["random"]
    error = math.hypot(found["standard_error"], random["standard_error"])
    return found["accuracy"] - random["accuracy"], max(error, 1e-9)


def table(score: Score) -> Table:
    """One row an encoder."""
    rows = []
    for name, found in score.said["encoders"].items():
        gain, error = difference(score.said, name)
        low, high = min(found["by_seed"]), max(found["by_seed"])
        rows.append(
            (
                NAMES[name],
                f"{_share(found['accuracy'])} ± {_share(found['standard_error'])}",
                "" if name == "random" else f"{points(gain)} ± {100 * error:.1f}",
                f"{_share(low)} to {_share(high)}",
                f"{_share(found['knn'])} ± {_share(found['knn_standard_error'])}",
                f"{found['rate']:g}",
            )
        )
    clips, augment = score.said["clips"], score.said["settings"].get("augment", "none")
    return Table(
        head=("", "attentive probe", "points over random", f"{len(score.said['seeds'])} seeds", "k-NN", "chosen rate"),
        rows=tuple(rows),
        align="lrrrrr",
        caption=(
            f"{score.benchmark} (target {score.said['target']}, {len(score.said['classes'])} classes): {clips['test']} "
            f"test clips, {clips['train']} probe-train clips of which {clips['held_out']} choose the rate; always "
            f"answering the commonest class gives {_share(score.said['chance'])}. {LEARNT[augment]}"
        ),
        sources=(score.path,),
        strong=frozenset({0}),
    )


def scatter(score: Score) -> Picture:
    """t-SNE of the EMA encoder's features beside the random one's."""
    shown = {NAMES[name]: score.features[name] for name in ("ema", "random")}
    return Picture(
        f"tsne_{score.benchmark}",
        scatter_png(shown, score.features["labels"], score.said["classes"]),
        f"t-SNE of mean-pooled test features, coloured by {score.said['target']}; far distances mean nothing.",
        (score.path.replace("score.json", "features.npz"),),
        plain=True,
    )


def points(difference: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    return f"{100 * difference:+.1f}".replace("-", "−")


def _share(value: float) -> str:
    return f"{value:.3f}".removeprefix("0")
