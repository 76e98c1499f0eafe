"""The model card of an exported encoder: README.md with a YAML header, as the Hub shows it.

It says on which data sets, under which licences, the encoder was trained, what it scored, and what it is not good for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import yaml

from nextvid.plain_text import in_markdown

CARD = "README.md"
PAPER = "https://arxiv.org/abs/2512.21004"


@dataclass(frozen=True)
class TrainedOn:
    """What one data set gave to the trainset."""

    name: str
    licence: str
    weight: float | None  # share of the draws
    files: int
    clips: int


@dataclass(frozen=True)
class Scored:
    """An encoder on one benchmark, as shares of its test clips: frozen under an attentive probe, or fine-tuned."""

    benchmark: str
    accuracy: float
    standard_error: float
    random: float  # of the run's own random initialisation
    clips: int
    tuned: bool = False
    limit: int | None = None  # shots of each split, where not all were taken


def card(config: Mapping[str, Any], data: Sequence[TrainedOn] | None = None, scores: Sequence[Scored] = ()) -> str:
    """The text of the card, from an export's config.json; without `data` it says that it does not know them."""
    recipe, width = config["recipe"], config["model"]["encoder"]
    clip = config.get("clip") or {}
    rate = f"{clip['fps']:g} a second" if clip.get("fps") else f"every {clip.get('stride')} source frames"
    shown = f"clips of {clip['frames']} frames, {rate}, " if clip else ""
    started = f"training started from {config['init']}; " if config.get("init") else ""
    header = yaml.safe_dump(_header(config, data, scores), sort_keys=False, allow_unicode=True)
    return f"""---
{header}---

# NExT-Vid encoder `{recipe}`

A frame-causal video encoder pretrained by masked next-frame prediction ([paper]({PAPER})), of {width["depth"]} blocks
and width {width["width"]}: its features of a frame depend on that frame and the earlier ones. It reads
{width["input"]} of {shown}{config["encoding"]["resolution"]} pixels a side. Run `{config["run"]}`, trainset
`{config["trainset"]}`; {started}weights are safetensors.

```python
from nextvid import NExTVidEncoder

encoder = NExTVidEncoder.from_pretrained("this folder or repository")
features = encoder(encoder.clips("video.mp4"))  # clips, tokens in the order t, h, w, width
```

## Data and licences

{_data(data)}

## Scores

{_scores(scores)}

## Limits

Features are of clips as in training; other lengths, rates and sizes were not measured. Nothing was measured of bias, of
people or of safety-critical uses. What the data sets lack, the encoder has not seen. The licences above bind whoever
distributes the weights.
"""


def _header(config: Mapping[str, Any], data: Sequence[TrainedOn] | None, scores: Sequence[Scored]) -> dict[str, Any]:
    """What the Hub reads of a card."""
    header: dict[str, Any] = {
        "library_name": "nextvid",
        "pipeline_tag": "feature-extraction",
        "tags": ["video", "nextvid", "self-supervised"],
        "license": "other",
        "license_name": "see-data-sets",
        "license_link": CARD,
        "nextvid": {
            "recipe": config["recipe"],
            "run": config["run"],
            "trainset": config["trainset"],
            "data": None if data is None else [asdict(one) for one in data],
        },
    }
    if scores:
        results = [
            {
                "task": {
                    "type": "video-classification",
                    "name": "fine-tuned" if one.tuned else "frozen attentive probe",
                },
                "dataset": {"name": one.benchmark, "type": one.benchmark},
                "metrics": [{"type": "accuracy", "value": round(one.accuracy, 4)}],
            }
            for one in scores
        ]
        header["model-index"] = [{"name": config["recipe"], "results": results}]
    return header


def _data(data: Sequence[TrainedOn] | None) -> str:
    if data is None:
        return "Not recorded in this folder: `nextvid export` on the machine that has the trainset writes them."
    lines = ["| data set | licence | share of draws | files | clips |", "|---|---|---|---|---|"]
    for one in data:
        share = "" if one.weight is None else f"{one.weight:.3g}"
        lines.append(
            f"| {in_markdown(one.name)} | {in_markdown(one.licence)} | {share} | {one.files:,} | {one.clips:,} |"
        )
    return "\n".join(lines)


def _scores(scores: Sequence[Scored]) -> str:
    if not scores:
        return "None was recorded."
    lines = [
        "Frozen under an attentive probe unless fine-tuned; on test clips, beside the same model with random weights.",
        "",
        "| benchmark | accuracy | random weights | test clips |",
        "|---|---|---|---|",
    ]
    for one in scores:
        accuracy = f"{one.accuracy:.3f} ± {one.standard_error:.3f}"
        how = f"{', fine-tuned' * one.tuned}{f', at most {one.limit:,} shots of each split' if one.limit else ''}"
        lines.append(f"| {in_markdown(one.benchmark)}{how} | {accuracy} | {one.random:.3f} | {one.clips:,} |")
    return "\n".join(lines)
