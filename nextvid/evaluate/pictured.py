"""What the report's pictures show of some test clips: dense features as colours, and where a probe looks.

Axes: n clips, s samples of a group, g segments, v levels, l tokens of a segment and level, L all tokens of a sample,
D width.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange, reduce
from jaxtyping import Float, Int
from torch import Tensor

from nextvid.evaluate.attentive import Probes
from nextvid.evaluate.features import FrozenEncoder
from nextvid.evaluate.fitting import answers_of, normalise
from nextvid.evaluate.stream import Samples
from nextvid.features.dense import PrincipalColours
from nextvid.train.distributed import Ranks

DENSE = 3  # our choice: test clips of which every token is shown
ATTENDED = 256  # our choice: test clips among which right and wrong answers are searched for pictures of attention
EACH = 3  # our choice: right answers, and wrong ones, that are shown


@dataclass
class Pictured:
    """What pictures show of the first segment of some test clips, the first by the hashes of their shots.

    Of DENSE clips every token of the last level; of ATTENDED the answer of the first seed's chosen probe, and how its
    query shares its attention among those tokens.

    Axes: n clips, N tokens of a segment and level (l of one clip), D width.
    """

    probes: Probes
    pair: int
    axes: Mapping[str, int]  # segments and levels of a sample's tokens
    firsts: Int[np.ndarray, " n"]  # the first sample of each clip
    dense: Float[Tensor, "n N D"]
    attention: Float[Tensor, "n N"]
    answers: Int[Tensor, " n"]

    @classmethod
    def of(
        cls, probes: Probes, pair: int, tokens: int, segments: int, encoder: FrozenEncoder, groups: np.ndarray,
        ranks: Ranks,
    ) -> "Pictured":  # fmt: skip
        """Of the test samples with these groups, of so many tokens each, and the pair that was chosen."""
        axes = {"g": segments, "v": encoder.levels}
        firsts = np.unique(groups, return_index=True)[1][:ATTENDED]
        tokens //= axes["g"] * axes["v"]
        dense = torch.zeros(len(firsts[:DENSE]), tokens, encoder.width, device=ranks.device)
        attention = torch.zeros(len(firsts), tokens, device=ranks.device)
        answers = torch.zeros(len(firsts), dtype=torch.int64, device=ranks.device)
        return cls(probes, pair, axes, firsts, dense, attention, answers)

    @torch.no_grad()
    def add(self, samples: Samples, features: Float[Tensor, "s L D"], groups: Int[np.ndarray, " s"]) -> None:
        """Keep those of the samples, which follow one another, that are shown."""
        own = np.flatnonzero(np.isin(self.firsts, samples))
        if not len(own):
            return
        at = self.firsts[own] - samples[0]
        tokens = features[torch.from_numpy(at).to(features.device)]
        levels = rearrange(tokens, "n (g v l) d -> n g v l d", **self.axes)
        shown = own[own < len(self.dense)]
        self.dense[shown] = levels[: len(shown), 0, -1].float()
        weights = self.probes.attention(normalise(tokens)[None])[0, self.pair]
        self.attention[own] = reduce(weights, "n (g v l) -> g n l", "sum", **self.axes)[0]
        found = answers_of(self.probes, features, groups)[0, self.pair]
        self.answers[own] = found[torch.from_numpy(np.searchsorted(np.unique(groups), groups[at])).to(found.device)]

    def kept(self, labels: Int[np.ndarray, " N"], ranks: Ranks) -> dict[str, np.ndarray]:
        """Colours of dense features; attention and answers of the first clips answered rightly, then of wrong ones."""
        dense, attention, answers = (ranks.sum(x).cpu().numpy() for x in (self.dense, self.attention, self.answers))
        right = answers == labels[self.firsts]
        chosen = np.concatenate([np.flatnonzero(right)[:EACH], np.flatnonzero(~right)[:EACH]])
        return {
            "dense_samples": self.firsts[:DENSE],
            "dense": PrincipalColours(rearrange(dense, "n l d -> (n l) d")).of(dense),
            "attention_samples": self.firsts[chosen],
            "attention": attention[chosen].astype(np.float16),
            "answers": answers[chosen],
        }
