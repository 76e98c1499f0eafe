"""t-SNE of mean-pooled test features, coloured by class: what the eye sees of them.

Holds the projection (scikit-learn, PCA to 50 first, perplexity 30: method.md 11) and the drawing. Distances between far
clusters mean nothing in such a picture; the report says so and gives k-NN accuracy beside it.

Axes: N clips, D width.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure

from nextvid.pictures import INK, png, quiet

CLIPS = 600  # our choice: more take longer and show no more; test clips stand in the order of their shots' hashes
PCA = 50  # method.md 11
PERPLEXITY = 30.0  # method.md 11
SEED = 0


def scatter_png(
    features: Mapping[str, Float[np.ndarray, "N D"]], labels: Int[np.ndarray, "N"], classes: Sequence[str]
) -> bytes:
    """One panel an encoder, by its title; the same clips in each."""
    figure = Figure(figsize=(9.4, 4.4), layout="constrained")
    panels = figure.subplots(1, len(features), squeeze=False)[0]
    shown = labels[:CLIPS]
    for axes, (title, found) in zip(panels, features.items(), strict=True):
        places = project(found[:CLIPS])
        for number, name in enumerate(classes):
            own = places[shown == number]
            axes.scatter(own[:, 0], own[:, 1], s=11, color=colour(number, len(classes)), linewidths=0, label=name)
        quiet(axes, title)
        axes.spines[:].set_visible(False)
        axes.set(xticks=[], yticks=[], aspect="equal", adjustable="datalim")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside lower center", ncols=min(12, max(1, len(names))), fontsize=8, frameon=False,
        labelcolor=INK, markerscale=1.6, handletextpad=0.1, columnspacing=1.0,
    )  # fmt: skip
    return png(figure)


def project(features: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N 2"]:
    """Two dimensions. Fewer than 3 clips stay where they are: there is nothing to arrange."""
    from sklearn import decomposition
    from sklearn.manifold import TSNE

    if len(features) < 3:
        return np.zeros((len(features), 2))
    parts = min(PCA, len(features), features.shape[1])
    reduced = decomposition.PCA(parts, svd_solver="full").fit_transform(features.astype(np.float64))
    perplexity = min(PERPLEXITY, (len(features) - 1) / 3)
    places: np.ndarray = TSNE(2, perplexity=perplexity, init="pca", random_state=SEED).fit_transform(reduced)
    return places


def colour(number: int, classes: int) -> tuple[float, float, float]:
    """Evenly spaced hues, of a lightness that reads on white and on black."""
    from matplotlib.colors import hsv_to_rgb

    red, green, blue = hsv_to_rgb((number / max(1, classes), 0.68 if number % 2 else 0.5, 0.72 if number % 2 else 0.86))
    return float(red), float(green), float(blue)
