"""A project for each data set of the study: its clips, its corpus.yaml, and everything up to the trainset.

Drawn clips are written first; photographed media are read where they are (NEXTVID_REALDATA, else ../shared/data beside
the checkout).
"""

import csv
import os
from pathlib import Path
from typing import Any

import yaml

from examples.study.drawing import write_clips
from examples.study.tables import DATA, FRAMES, Size
from nextvid.config.project import Project, open_project
from nextvid.make import Request, make
from storage import atomic

REPOSITORY = Path(__file__).resolve().parents[2]
BESIDE = 0.1  # clothing10: share of draws from weizmann4, since a recipe does not train on images alone
PERSONS = 3  # weizmann4: every third of the nine is tested on in a fold
ALL_OFF = dict.fromkeys(("motion_min", "motion_max", "freeze_max", "luma_min", "luma_max", "blur_min"))


def real_media() -> Path:
    """The folder of photographed videos and images."""
    return Path(os.environ.get("NEXTVID_REALDATA", REPOSITORY / "../shared/data")).resolve()


def available(data: str) -> bool:
    """Whether this machine has the media of a data set."""
    return _drawn(data) or (real_media() / f"{_source(data)}.csv").is_file()


def make_project(root: Path, data: str, size: Size) -> Project:
    """The project of a data set, with its trainset made; what is there is not made again."""
    folder = root / data
    folder.mkdir(parents=True, exist_ok=True)
    if _drawn(data):
        write_clips(folder / "clips", DATA[data], size.train, size.test)
    else:
        _write_labels(folder / "labels.csv", data)
    atomic.publish_bytes(str(folder / "corpus.yaml"), yaml.safe_dump(_corpus(folder, data, size)).encode())
    project = open_project(folder / "corpus.yaml")
    for _ in make(project, Request("trainset")):
        pass
    return open_project(folder / "corpus.yaml")


def _drawn(data: str) -> bool:
    return data in ("stills", "drift", "moving")


def _source(data: str) -> str:
    return "clothing10" if data == "clothing10" else "weizmann4_mp4"


def _corpus(folder: Path, data: str, size: Size) -> dict[str, Any]:
    """The content of corpus.yaml. Paths of the drawn data are relative to it."""
    clip: dict[str, Any] = {"frames": FRAMES, "fps": 4, "crop": "whole", "flip": False, "pad": "skip"}
    probe: dict[str, Any] = {"epochs": size.probe_epochs, "batch": size.probe_batch, "seeds": size.probe_seeds}
    labels = {"layout": "csv", "file": "labels.csv", "split_column": "split"}
    uri, train, test = "clips/videos", clip, clip
    if _drawn(data):
        labels["file"] = "clips/labels.csv"
    elif data == "clothing10":
        uri = str(real_media() / "images" / data)
        train = test = {"frames": 1, "crop": "whole", "flip": False}
        probe |= {"epochs": 2 * size.probe_epochs, "batch": 16}
    else:
        uri = str(real_media() / "videos" / _source(data))
        train, test = clip | {"clips_per_shot": 16, "starts": "random"}, clip | {"clips_per_shot": 2}
        probe |= {"epochs": 4 * size.probe_epochs, "batch": 8}
    targets = DATA[data].targets
    datasets: dict[str, Any] = {
        data: {
            "uri": uri, "weight": 1.0, "clips": [train], "labels": labels | {"targets": {t: t for t in targets}},
            "max_batch_videos": 2000,
        }
    }  # fmt: skip
    if data == "clothing10":
        videos = {"uri": str(real_media() / "videos" / "weizmann4_mp4"), "weight": BESIDE}
        datasets["weizmann4"] = videos | {"clips": [clip | {"clips_per_shot": 16, "starts": "random"}]}
        datasets[data]["weight"] -= BESIDE
    return {
        "root": "root",
        "reencode": "auto",
        "encoding": {
            "autoencoder": str(REPOSITORY / "examples/demo/autoencoder"), "resolution": 64, "posterior": "mean",
            "pixels": {"quality": 90},
        },
        # nothing is left out but what cannot be read: every clip was drawn or chosen on purpose
        "curation": {"filters": ALL_OFF, "duplicates": {"distance": 0, "quality_min": 100}},
        "datasets": datasets,
        "benchmarks": {target: {"datasets": [data], "target": target, "policy": test, **probe} for target in targets},
        "encoders": {"latents": {"family": "latents"}, "pixels": {"family": "pixels"}},
    }  # fmt: skip


def _write_labels(file: Path, data: str) -> None:
    """labels.csv of photographed media: paths below the dataset's folder, the label, the split."""
    rows, source, target = [], _source(data), DATA[data].targets[0]
    with (real_media() / f"{source}.csv").open(encoding="utf-8", newline="") as given:
        for row in csv.DictReader(given):
            path, fold = row["path"].split(f"/{source}/", 1)[1], DATA[data].fold
            tested = row["split"] == "test" if fold is None else int(row["group"].removeprefix("p")) % PERSONS == fold
            rows.append((path, row["label"], "test" if tested else "train"))  # nothing is chosen on validation
    with file.open("w", encoding="utf-8", newline="") as written:
        writer = csv.writer(written, lineterminator="\n")
        writer.writerow(("path", target, "split"))
        writer.writerows(rows)
