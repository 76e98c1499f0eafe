"""The report's section on places: dense features and the probe's attention over source frames.

What is shown was kept with each score (nextvid/evaluate/pictured.py); frames are decoded here.

Axes: F frames, R pixels a side, T tubelets, h and w cells, N = T h w tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from einops import rearrange
from jaxtyping import UInt8
from matplotlib import colormaps

from nextvid.config.project import Project
from nextvid.encode.frames import Decoding
from nextvid.evaluate.samples import Strip, filmstrips
from nextvid.features.dense import over_frames
from nextvid.report.page import Block, Picture, Section
from nextvid.report.scores import NAMES, Score
from storage.schemas import Clips, ProbeRows
from storage.tables import read_table

GREY = 128  # under the colours where a file cannot be read any more
HEAT = colormaps["inferno"]
NAME_LENGTH = 18  # characters of a class in the column of labels


@dataclass(frozen=True)
class _Clip:
    """A test clip: its frames, grey where they cannot be read, and the number of its class."""

    frames: UInt8[np.ndarray, "F R R 3"]
    reason: str | None
    label: int

    def source(self, tubelets: int, label: str) -> Strip:
        """The first frame of each tubelet; empty, with the reason, where the file cannot be read."""
        if self.reason is not None:
            return Strip(f"{label}\n{self.reason}", None)
        return Strip(label, self.frames[:: max(1, len(self.frames) // tubelets)])

    def over(self, colours: UInt8[np.ndarray, "N 3"], grid: tuple[int, int]) -> UInt8[np.ndarray, "T R R 3"]:
        """Colours of tokens over the frames."""
        return over_frames(self.frames, rearrange(colours, "(T h w) c -> T h w c", h=grid[0], w=grid[1]))


def places_section(project: Project, scores: Sequence[Score], resolution: int, grid: tuple[int, int]) -> Section | None:
    """Two pictures a benchmark, of frames at a resolution and tokens on a grid.

    None where no score has something for them: scores of earlier versions have not.
    """
    blocks: list[Block] = []
    for score in scores:
        if "ema/dense" not in score.features:
            continue
        clips = _clips(project, score, resolution)
        sources = tuple(score.path.replace("score.json", name) for name in ("features.npz", "rows.parquet"))
        captions = {
            "dense": "features of each tubelet's cells over its first frame. Red, green and blue are the three "
            "directions in which an encoder's features of these clips differ most: one colour means the same in all "
            "clips of an encoder, and something else for the other encoder. The clips are the first by the hashes of "
            "their shots, not chosen by eye.",
            "attention": "where the query of the EMA encoder's probe attends, from black, not at all, to yellow, the "
            "most of a clip: the mean over heads of the first seed's. The clips are the first that it answers rightly, "
            "then the first that it answers wrongly.",
        }
        strips = {"dense": _dense(score, clips, grid), "attention": _attention(score, clips, grid)}
        for kind, found in strips.items():
            if shown := list(found):
                name, caption = f"{kind}_{score.benchmark}", f"{score.benchmark}: {captions[kind]}"
                blocks.append(Picture(name, filmstrips(shown), caption, sources))
    return Section("Features and attention by place", tuple(blocks)) if blocks else None


def _dense(score: Score, clips: Mapping[int, _Clip], grid: tuple[int, int]) -> Iterator[list[Strip]]:
    for number, sample in enumerate(score.features["ema/dense_samples"].tolist()):
        if (clip := clips.get(sample)) is not None:
            tokens = {name: score.features[f"{name}/dense"][number] for name in ("ema", "random")}
            overs = [Strip(NAMES[name].replace(" ", "\n"), clip.over(found, grid)) for name, found in tokens.items()]
            yield [clip.source(len(tokens["ema"]) // (grid[0] * grid[1]), "source"), *overs]


def _attention(score: Score, clips: Mapping[int, _Clip], grid: tuple[int, int]) -> Iterator[list[Strip]]:
    kept = (score.features[f"ema/{name}"] for name in ("attention_samples", "attention", "answers"))
    for sample, weights, answer in zip(*kept, strict=True):
        if (clip := clips.get(int(sample))) is not None:
            truth, given = (score.record["classes"][number] for number in (clip.label, answer))
            verdict = "right" if answer == clip.label else "wrong"
            shares = weights.astype(np.float32) / max(float(weights.max()), 1e-12)  # the brightest of its clip
            heat = np.round(255 * HEAT(shares)[:, :3]).astype(np.uint8)
            yield [
                clip.source(len(weights) // (grid[0] * grid[1]), f"class\n{truth[:NAME_LENGTH]}"),
                Strip(f"{verdict} answer\n{given[:NAME_LENGTH]}", clip.over(heat, grid)),
            ]


def _clips(project: Project, score: Score, resolution: int) -> dict[int, _Clip]:
    """The first segments of the shown test samples, by their number; without those that are no clips any more."""
    rows = read_table(score.path.replace("score.json", "rows.parquet"), ProbeRows).sort("sample")
    test = rows.filter((pl.col("split") == "test") & (pl.col("segment") == 0)).with_row_index("number")
    shown = np.concatenate([score.features["ema/dense_samples"], score.features["ema/attention_samples"]])
    test = test.filter(pl.col("number").is_in(np.unique(shown).tolist()))
    batches = test["batch"].unique().sort()
    clips = pl.concat([read_table(project.root.table("clips", batch), Clips) for batch in batches])
    found = test.select("number", "label", "row_id", "batch").join(
        clips.filter(pl.col("status") == "ok"), on=["row_id", "batch"]
    )
    with Decoding(1) as decoding:
        distinct = found.select(Clips.column_names()).unique("row_id", keep="first")
        decoded = decoding.start(distinct, resolution).collect()
    shown_clips = {}
    for row in found.iter_rows(named=True):
        one = decoded[row["row_id"]]
        grey = np.full((row["frames"], resolution, resolution, 3), GREY, np.uint8)
        shown_clips[row["number"]] = _Clip(grey if one.frames is None else one.frames, one.reason, row["label"])
    return shown_clips
