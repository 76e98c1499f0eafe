"""Features of every place of a clip as colours over its frames: their first three principal components.

Axes: N tokens, D width, T tubelets, h and w cells, F frames, R pixels a side.
"""

import numpy as np
from jaxtyping import Float, UInt8

FITTED = 4096  # our choice: tokens that components are computed from; 27 MB at the width of nextvid_g
ENDS = (2.0, 98.0)  # our choice: percentiles of a component that become 0 and 255
SHARE = 0.65  # our choice: of the colours over the grey frame


class PrincipalColours:
    """Red, green and blue are the three directions in which an encoder's features differ most.

    They are computed once, of at most FITTED tokens spread evenly over those given, and used for all pictures of that
    encoder that are compared: there one colour means one feature. Of two encoders each has directions of its own, so
    only the structure of their pictures can be compared, not the colours. The number of a direction that is largest by
    amount is positive (scikit-learn's rule), so that the same features always have the same colours.
    """

    def __init__(self, tokens: Float[np.ndarray, "N D"]) -> None:
        from sklearn import decomposition

        chosen = tokens[np.linspace(0, len(tokens) - 1, min(FITTED, len(tokens))).astype(int)].astype(np.float32)
        self._pca = decomposition.PCA(min(3, *chosen.shape), svd_solver="full").fit(chosen)
        self._low, self._high = np.percentile(self._pca.transform(chosen), ENDS, axis=0)

    def of(self, tokens: Float[np.ndarray, "*N D"]) -> UInt8[np.ndarray, "*N 3"]:
        """Colours of tokens."""
        parts = self._pca.transform(tokens.reshape(-1, tokens.shape[-1]).astype(np.float32))
        shares = ((parts - self._low) / np.maximum(self._high - self._low, 1e-12)).clip(0, 1)
        colours = np.zeros((len(parts), 3), np.uint8)
        colours[:, : shares.shape[1]] = np.round(255 * shares)
        return colours.reshape(*tokens.shape[:-1], 3)


def over_frames(
    frames: UInt8[np.ndarray, "F R R 3"], colours: UInt8[np.ndarray, "T h w 3"]
) -> UInt8[np.ndarray, "T R R 3"]:
    """Colours of cells over the first frame of each tubelet in grey; an image, one frame, has those of tubelet 0."""
    colours = colours[: len(frames)]
    grey = frames[:: len(frames) // len(colours)].mean(axis=-1, keepdims=True)
    rows, columns = (np.arange(frames.shape[1]) * size // frames.shape[1] for size in colours.shape[1:3])
    large = colours[:, rows[:, None], columns[None, :]]
    return (SHARE * large + (1 - SHARE) * grey).astype(np.uint8)
