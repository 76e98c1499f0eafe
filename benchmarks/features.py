"""`nextvid features` against decoding alone and the encoder alone: `python -m benchmarks.features [--quick]`.

Decoding alone: the same probing and decoding in the same number of processes, every clip taken and dropped. Encoder
alone: the same batches from memory, on the same number of threads. The slower of the two bounds what `nextvid features`
can reach; its rate over that bound is the share of the time in which the bottleneck is busy. Arms run in turns. Two
encoders with random weights, one that limits and one that decoding limits. Start-up (processes, weights) is in all
arms, as a user meets it.
"""

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from safetensors.torch import save_file

from benchmarks.encode import films_of_noise
from benchmarks.measure import machine, median_ratio, show, write
from nextvid.config.datasets import ClipPolicy
from nextvid.config.recipe import EncoderConfig, ModelConfig
from nextvid.encode.frames import Decoding
from nextvid.encode.pipeline import shares
from nextvid.features.encoder import NExTVidEncoder, load_encoder
from nextvid.features.extract import Asked, SourceFile, batch_on, pooled, shown
from nextvid.features.make import find_files, make_features
from nextvid.features.windows import Windows
from nextvid.machine import device_of
from nextvid.train.export import FORMAT, WEIGHTS, publish_config

TARGET = 0.9  # our aim
SIDE, FRAMES = 128, 16  # pixels a side of a clip, frames at 8 a second
POLICY = ClipPolicy(frames=FRAMES, fps=8, crop="centre", pad="skip")
ENCODERS = {  # by what limits; with each film so many times, since of 3 s of work a tenth is start and end
    "small, encoder limits": (EncoderConfig(depth=12, width=192, heads=3, mlp_hidden=768), 2),
    "tiny, decoding limits": (EncoderConfig(depth=2, width=64, heads=2, mlp_hidden=128), 4),
}


@dataclass(frozen=True)
class Load:
    """The folder of films, how often a clip is taken from each, and how many turns are run."""

    films: Path
    every_s: float
    turns: int
    device: str

    def repeated(self, times: int) -> "Load":
        """Each film so many times."""
        folder = self.films.with_name(f"{self.films.name}{times}")
        folder.mkdir(exist_ok=True)
        for number in range(times):
            for film in self.films.iterdir():
                shutil.copy(film, folder / f"{number}-{film.name}")
        return replace(self, films=folder)


def main(
    quick: bool = False,
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
    device: str = "auto",
) -> None:
    """Measure, print a table, and with --json write what README.md documents.

    Args:
        quick: two films and one turn, in under a minute.
        json: file for the results.
        device: auto, cpu or cuda.
    """
    with tempfile.TemporaryDirectory(prefix="nextvid-features-") as top:
        films_of_noise(Path(top, "films"), 2 if quick else 12)
        load = Load(Path(top, "films"), 2.0 if quick else 0.5, 1 if quick else 3, device_of(device))
        rows = [
            _compared(name, config, load.repeated(1 if quick else times), Path(top))
            for name, (config, times) in ENCODERS.items()
        ]
    targets = {
        f"busy: {row['name']}": {"measured": row["of_bound"], "at_least": TARGET, "met": row["of_bound"] >= TARGET}
        for row in rows
    }
    keys = ("clips", "features_per_s", "decode_per_s", "encode_per_s", "of_bound")
    columns = ("", "clips", "features /s", "decoding alone /s", "encoder alone /s", "of the slower")
    show("nextvid features against its parts", columns, [[row["name"], *(row[key] for key in keys)] for row in rows])
    for name, target in targets.items():
        print(f"{name}: {target['measured']:.3f}, wanted >= {TARGET}: {'met' if target['met'] else 'MISSED'}")
    about = machine() | {"torch": torch.__version__, "device": load.device}
    write(json, {"benchmark": "features", "quick": quick, "machine": about, "rows": rows, "targets": targets})


def _compared(name: str, config: EncoderConfig, load: Load, top: Path) -> dict[str, Any]:
    folder = _export(top / name.partition(",")[0], config)
    asked = Asked(folder, Windows(POLICY, load.every_s))
    clips = _views(load, asked)
    seconds: dict[str, list[float]] = {"features": [], "decode": [], "encode": []}
    for turn in range(load.turns):
        arms: dict[str, Callable[[], object]] = {
            "features": partial(make_features, [str(load.films)], asked, folder / f"{turn}.parquet", load.device),
            "decode": partial(_views, load, asked),
            "encode": partial(_encode, clips, asked, load.device),
        }
        for arm in sorted(arms, reverse=turn % 2 == 1):
            began = time.perf_counter()
            arms[arm]()
            seconds[arm].append(time.perf_counter() - began)
    slower = [max(pair) for pair in zip(seconds["decode"], seconds["encode"], strict=True)]
    rates = {f"{arm}_per_s": len(clips) / float(np.median(found)) for arm, found in seconds.items()}
    bound = median_ratio(slower, seconds["features"])
    return {"name": name, "clips": len(clips), "turns": load.turns, **rates, "of_bound": bound}


def _views(load: Load, asked: Asked) -> list[np.ndarray]:
    """Every clip, decoded as `nextvid features` does."""
    with Decoding(shares(load.device, 1)[0]) as decoding:
        files = [SourceFile(*row) for row in find_files([str(load.films)]).iter_rows()]
        found = [clip.frames for clip in shown(decoding, files, asked.windows, SIDE)]
    return [frames for frames in found if frames is not None]


def _encode(clips: Sequence[np.ndarray], asked: Asked, device: str) -> None:
    torch.set_num_threads(shares(device, 1)[1])
    encoder = load_encoder(asked.encoder, device)
    batch = batch_on(device, asked)
    for first in range(0, len(clips), batch):
        frames = torch.from_numpy(np.stack(clips[first : first + batch]))
        pooled(encoder(frames), FRAMES // 2, asked.pool).cpu()


def _export(folder: Path, config: EncoderConfig) -> Path:
    """The folder of an encoder of pixels with random weights."""
    model = ModelConfig(grid_height=SIDE // 16, grid_width=SIDE // 16, encoder=config)
    torch.manual_seed(0)
    encoder = NExTVidEncoder(model, torch.zeros(1), torch.ones(1))
    folder.mkdir()
    save_file({name: value.contiguous() for name, value in encoder.state_dict().items()}, folder / WEIGHTS)
    said = {
        "format": FORMAT, "model": model.model_dump(mode="json"), "recipe": "random", "run": "random",
        "trainset": "none", "autoencoder": None,
        "encoding": {"resolution": SIDE, "precision": "fp32", "autoencoder": "none"},
        "clip": POLICY.model_dump(mode="json", include={"frames", "fps", "stride", "crop", "pad"}),
    }  # fmt: skip
    publish_config(folder, said)
    return folder


if __name__ == "__main__":
    tyro.cli(main)
