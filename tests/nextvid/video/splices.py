"""Films joined from scenes by cuts, dissolves and fades that are known, and how well a first pass finds them."""

import itertools
from dataclasses import dataclass

import cv2
import numpy as np

from nextvid.video.shots import ShotFacts

FPS = 25
BLEND = 12  # frames of a dissolve
SLACK = 4  # frames by which a transition may be missed and still count as found
Join = tuple[
    str, int, int
]  # kind, first and last frame of the transition (a hard cut: the new shot's first frame twice)


def scene(seed: int, count: int, width: int = 128, height: int = 96) -> list[np.ndarray]:
    """A pan over a texture of its own colours, with a blob that moves by itself."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (6, 8, 3)).astype(np.uint8)
    texture = cv2.resize(coarse, (width + count, height + count), interpolation=cv2.INTER_CUBIC)
    texture = np.clip(texture * 0.6 + rng.uniform(0, 100, 3), 0, 255).astype(np.uint8)
    images = []
    for n in range(count):
        image = texture[n // 3 : n // 3 + height, n // 2 : n // 2 + width].copy()
        centre = (int(width / 2 + 30 * np.sin(n / 6 + seed)), int(height / 2 + 20 * np.cos(n / 5)))
        cv2.circle(image, centre, 10, (250, 250, 250), -1)
        images.append(image)
    return images


def spliced(scenes: list[list[np.ndarray]], kinds: list[str]) -> tuple[list[np.ndarray], list[Join]]:
    """Scenes joined by the given kinds of transition, and where these stand."""
    images, joins = list(scenes[0]), []
    for following, kind in zip(scenes[1:], kinds, strict=True):
        if kind == "hard":
            joins.append((kind, len(images), len(images)))
            images += following
        elif kind == "dissolve":
            first = len(images) - BLEND
            for n in range(BLEND):
                share = (n + 1) / (BLEND + 1)
                images[first + n] = cv2.addWeighted(images[first + n], 1 - share, following[n], share, 0)
            images += following[BLEND:]
            joins.append((kind, first, first + BLEND - 1))
        else:
            first = len(images) - BLEND
            for n in range(BLEND):
                images[first + n] = (images[first + n] * (1 - (n + 1) / BLEND)).astype(np.uint8)
            images += [np.zeros_like(images[0])] * 5
            images += [(image * (n / BLEND)).astype(np.uint8) for n, image in enumerate(following[:BLEND])]
            joins.append((kind, first, len(images) - 1))
            images += following[BLEND:]
    return images, joins


def found(shots: list[ShotFacts], start_us: int) -> list[tuple[str, int, int]]:
    """Transitions between consecutive shots, in frames."""

    def frame(time_us: int) -> int:
        return round((time_us - start_us) * FPS / 1e6)

    return [(a.cut_out, frame(a.end_us), frame(b.start_us)) for a, b in itertools.pairwise(shots)]


def recall(joins: list[Join], seen: list[tuple[str, int, int]], kind: str, slack: int = SLACK) -> float:
    """Share of the joins of a kind that some transition overlaps, within `slack` frames."""
    wanted = [join for join in joins if join[0] == kind]
    hits = [any(a <= last + slack and first - slack <= b for _, a, b in seen) for _, first, last in wanted]
    return sum(hits) / len(wanted)


def covered(join: Join, seen: list[tuple[str, int, int]], trim: int = 6) -> bool:
    """Whether, after a trim of a quarter second, no frame of the transition is left in a shot."""
    return any(a - trim <= join[1] and join[2] < b + trim for _, a, b in seen)


@dataclass(frozen=True)
class Found:
    """Of the joins of each kind, how many were found; and the transitions that stand where no join is."""

    hits: dict[str, int]
    joins: dict[str, int]
    false: list[tuple[str, int, int]]
    transitions: int

    def recall(self, kind: str) -> float:
        """Share of the joins of a kind that were found."""
        return self.hits[kind] / self.joins[kind]

    @property
    def precision(self) -> float:
        """Share of the transitions found that stand at a join."""
        return 1 - len(self.false) / max(1, self.transitions)


def compared(joins: list[Join], seen: list[tuple[str, int, int]]) -> Found:
    """What was found of what is there, within SLACK frames; of whatever kind, as a clip is lost either way."""

    def meets(join: Join, transition: tuple[str, int, int]) -> bool:
        return transition[1] <= join[2] + SLACK and join[1] - SLACK <= transition[2]

    kinds = sorted({join[0] for join in joins})
    hits = {kind: sum(any(meets(j, t) for t in seen) for j in joins if j[0] == kind) for kind in kinds}
    return Found(
        hits,
        {kind: sum(join[0] == kind for join in joins) for kind in kinds},
        [t for t in seen if not any(meets(join, t) for join in joins)],
        len(seen),
    )
