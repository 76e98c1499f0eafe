"""The paper's four protocols, from small copies of the public data sets and their label files, to a score."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from nextvid.config.project import Project, open_project
from nextvid.make import Request, make
from storage.schemas import ProbeRows
from storage.tables import read_table
from tests.nextvid.video.film import X264_FAST, write_film

SIDE, WIDTH, FPS, LENGTH = 48, 64, 8, 12
TRAIN, TEST = 3, 1  # files of each class
PAPER = Path(__file__).parents[3] / "examples" / "paper" / "corpus.yaml"
SMALL: dict[str, dict[str, Any]] = {  # what is smaller here than in Tab. 10
    "k400": {"policy": {"frames": 4, "stride": 1}},
    "ssv2": {"policy": {"frames": 4, "stride": 1}},
    "diving48": {"policy": {"frames": 4, "stride": 1}},
    "in1k": {},
}
SEEN = {"k400": (8, 3, 1), "ssv2": (2, 3, 1), "diving48": (4, 3, 4), "in1k": (1, 1, 1)}  # segments, views, levels


def frames_of(kind: int, seed: int, frames: int) -> np.ndarray:
    """Noise over the colour of a class; no two alike."""
    rng = np.random.default_rng(seed)
    colour = np.array([(200, 70, 70), (70, 70, 200)][kind])
    return (colour + rng.normal(0, 25, (frames, SIDE, WIDTH, 3))).clip(0, 255).astype(np.uint8)


def video(path: Path, kind: int, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fast = {".mp4": ("libx264", X264_FAST), ".webm": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"})}
    codec, options = fast[path.suffix]
    write_film(path, frames_of(kind, seed, LENGTH), codec, FPS, options, crf="30")


def numbered(first: int) -> list[tuple[str, int, int]]:
    """(split, class, seed) of every file of a data set."""
    counts = {"train": TRAIN, "test": TEST}
    found = [(split, kind) for split, count in counts.items() for kind in (0, 1) for _ in range(count)]
    return [(split, kind, first + number) for number, (split, kind) in enumerate(found)]


def write_imagenet(folder: Path) -> None:
    wnids, lines = ("n01440764", "n01443537"), ["ImageId,PredictionString"]
    for split, kind, seed in numbered(100):
        if split == "train":
            path = folder / f"ILSVRC/Data/CLS-LOC/train/{wnids[kind]}/{wnids[kind]}_{seed}.JPEG"
        else:
            path = folder / f"ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_{seed:08d}.JPEG"
            lines.append(f"{path.stem},{wnids[kind]} 85 1 499 272 ")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(frames_of(kind, seed, 1)[0]).save(path, "JPEG")
    (folder / "LOC_val_solution.csv").write_text("\n".join(lines) + "\n")


def write_kinetics(folder: Path) -> None:
    lists: dict[str, list[str]] = {"train": [], "test": []}
    for split, kind, seed in numbered(200):
        name, published = f"-{seed}QUuC4vJ", {"train": "train", "test": "validate"}[split]
        video(folder / f"{published}/{name}_000084_000094.mp4", kind, seed)
        lists[split].append(f"{('abseiling', 'zumba')[kind]},{name},84,94,{published},0")
    for split, file in (("train", "train.csv"), ("test", "val.csv")):
        (folder / "annotations").mkdir(exist_ok=True)
        head = "label,youtube_id,time_start,time_end,split,is_cc"
        (folder / "annotations" / file).write_text("\n".join([head, *lists[split]]) + "\n")


def write_something(folder: Path) -> None:
    templates = ("Pushing [something] from left to right", "Pushing [something] from right to left")
    lists: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for split, kind, seed in numbered(300):
        video(folder / f"20bn-something-something-v2/{seed}.webm", kind, seed)
        label = templates[kind].replace("[something]", "a cup")
        lists[split].append({"id": str(seed), "label": label, "template": templates[kind], "placeholders": ["a cup"]})
    (folder / "labels").mkdir()
    for split, file in (("train", "train.json"), ("test", "validation.json")):
        (folder / "labels" / file).write_text(json.dumps(lists[split]))
    plain = [template.replace("[", "").replace("]", "") for template in templates]
    (folder / "labels" / "labels.json").write_text(json.dumps({name: str(n) for n, name in enumerate(plain)}))


def write_diving(folder: Path) -> None:
    lists: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for split, kind, seed in numbered(400):
        name = f"_8Vy3dlHg2w_{seed:05d}"
        video(folder / f"rgb/{name}.mp4", kind, seed)
        lists[split].append({"vid_name": name, "label": kind, "start_frame": 0, "end_frame": LENGTH})
    for split, entries in lists.items():
        (folder / f"Diving48_V2_{split}.json").write_text(json.dumps(entries))
    vocabulary = [["Back", "15som", "05Twis", "FREE"], ["Forward", "25som", "NoTwis", "PIKE"]]
    (folder / "Diving48_vocab.json").write_text(json.dumps(vocabulary))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The paper's own datasets and benchmarks, made small, before anything is made."""
    import torch
    from transformers import ViTMAEConfig, ViTMAEModel

    folder = tmp_path_factory.mktemp("public")
    data = folder / "data"
    write_imagenet(data / "imagenet1k")
    write_kinetics(data / "kinetics400")
    write_something(data / "something_something_v2")
    write_diving(data / "diving48")
    (folder / "autoencoder").mkdir()
    (folder / "autoencoder" / "nextvid.json").write_text(json.dumps({"kind": "pixels", "patch": 16}))
    torch.manual_seed(0)
    shape = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    ViTMAEModel(ViTMAEConfig(**shape, image_size=32, patch_size=16)).save_pretrained(folder / "mae")

    said = yaml.safe_load(PAPER.read_text().replace("../../data/", f"{data}/"))
    del said["datasets"]["internvid"]
    for dataset in said["datasets"].values():  # nothing is trained on: there is no trainset
        dataset.pop("weight", None)
        dataset.pop("clips", None)
    said["encoding"] = {"autoencoder": "autoencoder", "resolution": SIDE, "pixels": {"quality": 90}}
    said |= {"root": "root", "runs_root": None, "execution": {"device": "cpu"}}
    said["encoders"] = {"control": {"family": "vit_mae", "folder": "mae"}}
    for name, changes in SMALL.items():
        said["benchmarks"][name] |= {"epochs": 1, "batch": 2} | changes
    (folder / "corpus.yaml").write_text(yaml.safe_dump(said))
    return open_project(folder / "corpus.yaml")


def test_each_protocol_runs_from_the_public_files_to_a_score(project: Project) -> None:
    outcomes = list(make(project, Request("probes", recipe="control")))
    assert all(outcome.passed for outcome in outcomes)
    assert not {"trainset", "pretrain"} & {outcome.asset for outcome in outcomes}, "others' encoders read pixels alone"
    numbers = outcomes[-1].numbers
    for name, (segments, views, levels) in SEEN.items():
        path = Path(str(numbers[f"{name}_score"]))
        score, rows = json.loads(path.read_text()), read_table(str(path.with_name("rows.parquet")), ProbeRows)
        assert (score["segments"], project.corpus.benchmarks[name].levels) == (segments, levels)
        counts = {split: rows.filter(split=split).height for split in ("train", "test")}
        assert counts == {"train": 2 * TRAIN * segments, "test": 2 * TEST * segments * views}
        assert (score["clips"]["train"], score["clips"]["test"]) == (2 * TRAIN, 2 * TEST)
        assert len(score["classes"]) == 2
        assert len(score["encoders"]["control"]["held_out_by_pair"]) == {"in1k": 21, "diving48": 3}.get(name, 20)
        assert score["settings"]["augment"] == ("image" if name == "in1k" else "video")
