"""Features and predictions one tubelet after the other, with cached keys and values (docs/method.md 11).

The encoder is frame-causal and the context never reads a query, so what a layer computed for earlier tubelets never
changes. Caching it is exact, and a tubelet costs its own tokens instead of all tokens before it.

Axes: B clips, h heads, n visible tokens of a tubelet, Q queries, A = n + Q, e head dimension, i numbers in a token,
D width; b is B or 1.
"""

from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from nextvid.model.attention import Attend, masked_attention
from nextvid.model.decoder import Positions
from nextvid.model.encoder import Encoder, all_ids
from nextvid.model.nextvid import Conditioned, NExTVid


class KeyValueCache:
    """Keys and values of one layer's context so far. Its methods replace the layer's attention."""

    def __init__(self) -> None:
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def attend(
        self, q: Float[Tensor, "B h Q e"], k: Float[Tensor, "B h n e"], v: Float[Tensor, "B h n e"]
    ) -> Float[Tensor, "B h Q e"]:
        """Append `k` and `v` to the cache; every query attends all of it."""
        return scaled_dot_product_attention(q, *self._append(k, v))

    def attend_joint(
        self, q: Float[Tensor, "B h A e"], k: Float[Tensor, "B h A e"], v: Float[Tensor, "B h A e"], context: int
    ) -> Float[Tensor, "B h A e"]:
        """For the `joint` predictor: tokens after the first `context` attend the cache and themselves, uncached."""
        keys, values = self._append(k[:, :, :context], v[:, :, :context])
        seen = scaled_dot_product_attention(q[:, :, :context], keys, values)
        queries = q.shape[2] - context
        itself = torch.eye(queries, dtype=torch.bool, device=q.device)
        allow = torch.cat((itself.new_ones(queries, keys.shape[2]), itself), dim=1)[None]
        keys, values = torch.cat((keys, k[:, :, context:]), dim=2), torch.cat((values, v[:, :, context:]), dim=2)
        return torch.cat((seen, masked_attention(q[:, :, context:], keys, values, allow)), dim=2)

    def _append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self._keys = k if self._keys is None else torch.cat((self._keys, k), dim=2)
        self._values = v if self._values is None else torch.cat((self._values, v), dim=2)
        return self._keys, self._values


class IncrementalEncoder:
    """Takes the tubelets of a clip one by one, from 0, and gives the features that the whole clip would have."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._attends: list[Attend] = [KeyValueCache().attend for _ in encoder.blocks]
        self.tubelets = 0  # taken so far

    @torch.no_grad()
    def encode(
        self, tokens: Float[Tensor, "B n i"], cells: Int[Tensor, "b n"] | None = None
    ) -> tuple[Float[Tensor, "B n D"], Int[Tensor, "b n"]]:
        """Features and ids of the next tubelet's tokens: those at `cells`, or all."""
        total = self._encoder.model.cells
        ids = (all_ids(1, total, tokens.device) if cells is None else cells) + total * self.tubelets
        self.tubelets += 1
        return self._encoder.extend(tokens, ids, self._attends), ids


class IncrementalPredictor:
    """Takes the tubelets of a clip one by one, from 0, and predicts the next one after each."""

    def __init__(self, model: NExTVid) -> None:
        self._model = model
        self._encoder = IncrementalEncoder(model.encoder)
        self._predictor: list[Attend] = []
        self._seen: list[tuple[Tensor, Tensor]] = []  # features and ids, for decoders that read the encoder directly

    @torch.no_grad()
    def predict(self, tokens: Float[Tensor, "B n i"], cells: Int[Tensor, "b n"]) -> Conditioned:
        """The decoder's condition for the next tubelet. `tokens` are this tubelet's visible ones, at `cells`."""
        model, total = self._model, self._model.recipe.model.cells
        features, ids = self._encoder.encode(tokens, cells)
        queries = all_ids(1, total, tokens.device) + total * self._encoder.tubelets
        if model.predictor is None:
            self._seen.append((features, ids))
            condition, context_ids = (torch.cat(parts, dim=1) for parts in zip(*self._seen, strict=True))
            return Conditioned(None, condition, Positions(queries, context_ids, frames=1), frames=1)
        if not self._predictor:
            caches = [KeyValueCache() for _ in model.predictor.blocks]
            joint = model.recipe.model.predictor.kind == "joint"
            self._predictor = [partial(c.attend_joint, context=cells.shape[1]) if joint else c.attend for c in caches]
        predicted = model.predictor.extend(features, ids, queries, self._predictor)
        return model.conditioned(predicted, Positions(queries, ids, frames=1), frames=1)
