"""The report's section on scores: accuracies with standard errors beside the run's own random twin, and t-SNE.

Numbers are those of score.json, rounded; only differences and their errors are computed here. t-SNE shows mean-pooled
test features, coloured by class. Distances between far clusters mean nothing in such a picture; the report says so and
gives k-NN accuracy beside it.

Axes: N clips, D width.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure

from nextvid.lineage.trace import score_record
from nextvid.pictures import INK, plot_text, png, quiet
from nextvid.report.curves import Scored, over_clips_png
from nextvid.report.page import Block, Picture, Section, Table, Text
from storage.tables import read_arrays

LEARNT = {  # what heads learn from; it matters to the score where features are read once (docs/method.md 9)
    "none": "learn from stored views, whose features are read once",
    "video": "learn from clips that are varied in each epoch (RandAugment, crops, erasing; no flips)",
    "image": "learn from images that are varied in each epoch (AutoAugment, crops, flips, erasing)",
}
NAMES = {"ema": "EMA encoder", "online": "online encoder", "random": "random initialisation"}
TSNE_CLIPS = 600  # our choice: more take longer and show no more; test clips are ordered by the hashes of their shots
PCA_PARTS = 50  # before t-SNE: docs/method.md 11
PERPLEXITY = 30.0  # docs/method.md 11
TSNE_SEED = 0


@dataclass(frozen=True)
class Score:
    """A score.json, its path, and the pooled features beside it."""

    record: Mapping[str, Any]
    path: str  # as the report names it
    features: Mapping[str, np.ndarray]

    @property
    def benchmark(self) -> str:
        """The benchmark's name."""
        return str(self.record["benchmark"])

    @property
    def tuned(self) -> bool:
        """Whether the encoders were trained on the benchmark. Older records do not say it."""
        return self.record.get("finetune") is not None


def read_score(path: str) -> Score:
    """A score.json and the arrays of the features.npz beside it. DamagedError where one is not what was written."""
    folder, _, _ = path.rpartition("/")
    arrays = read_arrays(f"{folder}/features.npz", f"remove the folder {folder} and make 'probes' again")
    return Score(score_record(Path(path)), path, arrays)


def section(
    scores: Sequence[Score], history: Mapping[str, Sequence[Scored]], others: Mapping[str, Sequence[Score]]
) -> Section:
    """Headline, table and t-SNE of every benchmark, and curves of those that several checkpoints were scored on.

    `others` are scores, by benchmark, of encoders that corpus.yaml names.
    """
    blocks: list[Block] = [Text(headline(score), "lead", (score.path,)) for score in scores]
    tuned = [score for score in scores if score.tuned]
    for score in scores:
        beside = [
            other
            for other in ([] if score.tuned else tuned)
            if _same_clips(other.record, score.record)
            and other.record["clips"]["test"] == score.record["clips"]["test"]  # shares of the same answers
        ]
        blocks.append(table(score, [*others.get(score.benchmark, ()), *beside]))
    blocks.append(
        Text(
            "Accuracy is the mean over probe seeds, ± its binomial standard error over test clips. The random "
            "initialisation is this run's own: same recipe, input and seed, probed on the same clips. Its difference "
            "to itself is left empty. k-NN (cosine, "
            f"k = {scores[0].record['neighbours']}) is no headline: it reads the mean of all tokens, which knows no "
            "order of frames; by time, the mean of each tubelet's or frame's tokens, one after the other; and the "
            "changes of these means from one to the next, without what stays the same in a clip.",
        )
    )
    if history:
        paths = tuple(score.path for score in scores if score.benchmark in history)
        caption = "Accuracy of the run's checkpoints that were scored, on the same clips; bars are standard errors."
        blocks.append(Picture("scores_over_clips", over_clips_png(history, NAMES), caption, paths, plain=True))
    blocks += [scatter(score) for score in scores]
    return Section("Scores", tuple(blocks))


def headline(score: Score) -> str:
    """One sentence a benchmark, decided by its numbers: a gain is claimed only beyond two standard errors."""
    ema, random = (score.record["encoders"][name] for name in ("ema", "random"))
    gain, error = difference(score.record, ema)
    numbers = f"{_share(ema['accuracy'])} against {_share(random['accuracy'])} of its own random initialisation"
    if abs(gain) <= 2 * error:
        verdict = f"a difference of {points(gain)} points, within two standard errors ({2 * 100 * error:.1f})"
    else:
        verdict = f"{points(gain)} points, {abs(gain) / error:.1f} standard errors"
    how, limit = "fine-tuned" if score.tuned else "frozen", limited(score.record)
    return f"{score.benchmark}: {f'on {limit}, ' if limit else ''}the {how} EMA encoder reaches {numbers}: {verdict}."


def limited(record: Mapping[str, Any]) -> str:
    """What of the benchmark was scored where that is not all of it, in words; else nothing."""
    return f"at most {record['limit']:,} shots of each split (`limit`)" if record.get("limit") else ""


def difference(record: Mapping[str, Any], found: Mapping[str, Any]) -> tuple[float, float]:
    """Accuracy of an encoder minus that of the run's random one, and its standard error as if samples were independent.

    Both encoders see the same clips, so this error is rather too large and the claim cautious.
    """
    random = record["encoders"]["random"]
    error = math.hypot(found["standard_error"], random["standard_error"])
    return found["accuracy"] - random["accuracy"], max(error, 1e-9)


def table(score: Score, others: Sequence[Score] = ()) -> Table:
    """One row for each encoder: the run's, then others; those that were judged on other clips have no difference."""
    record, rows = score.record, []
    every = [(NAMES[name], record["encoders"][name], record) for name in record["encoders"]]
    every += [
        (_words(other, name, record), found, other.record)
        for other in others
        for name, found in other.record["encoders"].items()
    ]
    for words, found, own in every:
        gain, error = difference(record, found)
        low, high = min(found["by_seed"]), max(found["by_seed"])
        comparable = found is not record["encoders"]["random"] and _same_clips(own, record)
        rows.append(
            (
                words,
                f"{_share(found['accuracy'])} ± {_share(found['standard_error'])}",
                f"{points(gain)} ± {100 * error:.1f}" if comparable else "",
                f"{_share(low)} to {_share(high)}",
                *(_nearest(found, key) for key in ("knn", "knn_by_time", "knn_by_change")),
                " and ".join(f"{found[key]:g}" for key in ("rate", "weight_decay") if key in found),
            )
        )
    clips, augment, classes = record["clips"], record["settings"].get("augment", "none"), len(record["classes"])
    learnt = f"Heads {LEARNT[augment]}"
    if score.tuned:
        learnt = f"The encoder and its head {LEARNT[augment].removesuffix(', whose features are read once')}"
    limit = f"{limited(record)}, " if record.get("limit") else ""
    return Table(
        head=(
            "",
            "fine-tuned" if score.tuned else "attentive probe",
            "points over random",
            f"{len(record['seeds'])} seeds",
            "k-NN, mean of all tokens",
            "k-NN, by time",
            "k-NN, changes",
            "chosen rate and weight decay",
        ),
        rows=tuple(rows),
        align="lrrrrrrr",
        caption=(
            f"{score.benchmark} (target {record['target']}, {classes} classes): {limit}{clips['test']} test clips, "
            f"{clips['train']} probe-train clips of which {clips['held_out']} choose the head; always "
            f"answering the commonest class gives {_share(record['chance'])}. {_protocol(record)}"
            f"{learnt}."
        ),
        sources=(score.path, *(other.path for other in others)),
        strong=frozenset({0}),
    )


def _protocol(record: Mapping[str, Any]) -> str:
    """What was asked beyond one answer a shot from the last block. Older records do not say it."""
    words = [f"protocol {record['protocol']}"] if record.get("protocol") else []
    words += [f"{record['levels']} levels of the encoder"] if record.get("levels", 1) > 1 else []
    words += ["segments of whole files"] if record.get("cut_from") == "file" else []
    words += ["one answer a file"] if record.get("judged") == "file" else []
    words += ["heads learn from one view of a clip"] if record.get("train_views") == "one" else []
    return f"{', '.join(words).capitalize()}. " if words else ""


def _same_clips(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two scores were judged on the same clips and labels. Older records do not say it of others."""
    return one is other or one.get("tested", "") == other.get("tested")


def _words(other: Score, name: str, record: Mapping[str, Any]) -> str:
    """What the table calls an encoder that others trained, or the run's own where it was fine-tuned."""
    if "family" not in other.record:
        return f"{NAMES[name]}, fine-tuned ({other.benchmark})"
    clips = "" if _same_clips(other.record, record) else f", on {other.record['clips']['test']} other test clips"
    return f"{other.record['recipe']} ({other.record['family']}){clips}"


def _nearest(found: Mapping[str, Any], key: str) -> str:
    """A k-NN accuracy; older records have none by time."""
    return f"{_share(found[key])} ± {_share(found[f'{key}_standard_error'])}" if key in found else ""


def scatter(score: Score) -> Picture:
    """t-SNE of the EMA encoder's features beside the random one's."""
    shown = {NAMES[name]: score.features[name] for name in ("ema", "random")}
    return Picture(
        f"tsne_{score.benchmark}",
        scatter_png(shown, score.features["labels"], score.record["classes"]),
        f"t-SNE of mean-pooled test features after PCA to {PCA_PARTS} parts, coloured by {score.record['target']}; far "
        "distances mean nothing.",
        (score.path.replace("score.json", "features.npz"),),
        plain=True,
    )


def points(difference: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    return f"{100 * difference:+.1f}".replace("-", "−")


def _share(value: float) -> str:
    return f"{value:.3f}".removeprefix("0")


def scatter_png(
    features: Mapping[str, Float[np.ndarray, "N D"]], labels: Int[np.ndarray, "N"], classes: Sequence[str]
) -> bytes:
    """t-SNE as PNG: a panel for each encoder under its title, with the same clips in each."""
    figure = Figure(figsize=(9.4, 4.4), layout="constrained")
    panels = figure.subplots(1, len(features), squeeze=False)[0]
    shown = labels[:TSNE_CLIPS]
    for axes, (title, found) in zip(panels, features.items(), strict=True):
        places = tsne(found[:TSNE_CLIPS])
        for number, name in enumerate(classes):
            own = places[shown == number]
            axes.scatter(
                own[:, 0], own[:, 1], s=11, color=colour(number, len(classes)), linewidths=0, label=plot_text(name)
            )
        quiet(axes, title)
        axes.spines[:].set_visible(False)
        axes.set(xticks=[], yticks=[], aspect="equal", adjustable="datalim")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside lower center", ncols=min(12, max(1, len(names))), fontsize=8, frameon=False,
        labelcolor=INK, markerscale=1.6, handletextpad=0.1, columnspacing=1.0,
    )  # fmt: skip
    return png(figure)


def tsne(features: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N 2"]:
    """Features in two dimensions, after PCA. All zeros for fewer than 3 clips, which t-SNE cannot arrange."""
    from sklearn import decomposition
    from sklearn.manifold import TSNE

    if len(features) < 3:
        return np.zeros((len(features), 2))
    parts = min(PCA_PARTS, len(features), features.shape[1])
    reduced = decomposition.PCA(parts, svd_solver="full").fit_transform(features.astype(np.float64))
    perplexity = min(PERPLEXITY, (len(features) - 1) / 3)
    places: np.ndarray = TSNE(2, perplexity=perplexity, init="pca", random_state=TSNE_SEED).fit_transform(reduced)
    return places


def colour(number: int, classes: int) -> tuple[float, float, float]:
    """RGB of a class: evenly spaced hues, of a lightness that is readable on white and on black."""
    red, green, blue = hsv_to_rgb((number / max(1, classes), 0.68 if number % 2 else 0.5, 0.72 if number % 2 else 0.86))
    return float(red), float(green), float(blue)
