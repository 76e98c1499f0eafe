"""A trained encoder as a folder of its own: config.json, model.safetensors and, if it has one, its autoencoder.

`nextvid.load_encoder(path)` (nextvid/features/encoder.py) opens it without corpus, store or Dagster. config.json has
the size and crc32c of each other file, and its own digest as `seal`: whoever reads the folder checks them first.
Encoders exported before there were such sums are read as they are, with a warning.
"""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from nextvid.config.corpus import CorpusConfig
from nextvid.encode.weights import autoencoder_digest
from nextvid.model.encoder import Encoder
from nextvid.train.run import Run
from nextvid.trainset.files import read_sealed
from nextvid.trainset.trainset import Trainset
from storage import atomic
from storage.digest import crc32c, file_sums
from storage.errors import ConfigError, DamagedError, UpstreamError
from storage.records import publish_record

FORMAT = 1  # raise it when a reader of the old format would misread the folder
WEIGHTS = "model.safetensors"
AUTOENCODER = "autoencoder"
CONFIG = "config.json"
REMEDY = "export the run again, or copy the folder again from where it came"

_log = logging.getLogger(__name__)


def export_encoder(folder: Path, encoder: Encoder, trainset: Trainset, run: Run, corpus: CorpusConfig) -> None:
    """Write an encoder's folder, whole or not at all, unless it exists.

    The autoencoder of `corpus` is copied into it if it made the trainset's latents.
    """
    if folder.exists():
        return
    tensors = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    tensors |= {"mean": torch.from_numpy(np.array(trainset.mean)), "std": torch.from_numpy(np.array(trainset.std))}
    source = Path(corpus.encoding.autoencoder)
    carried = (
        run.recipe.model.encoder.input == "latents"
        and (source / "config.json").is_file()
        and autoencoder_digest(source) == trainset.spec.autoencoder
    )
    config = {
        "format": FORMAT,
        "model": run.recipe.model.model_dump(mode="json"),
        "recipe": run.recipe.name,
        "run": run.id,
        "init": None if run.source is None else run.source.text(),
        "trainset": trainset.digest,
        "encoding": trainset.spec.to_json(),
        "autoencoder": AUTOENCODER if carried else None,
        "clip": _clip(run, corpus),
    }
    with atomic.staged_folder(str(folder)) as staged:
        save_file(
            {name: value.detach().float().cpu().contiguous() for name, value in tensors.items()}, staged / WEIGHTS
        )
        if carried:
            shutil.copytree(source, staged / AUTOENCODER)
        publish_config(staged, config)


def publish_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write config.json of a folder whose other files are there, with their sums."""
    carried = sorted(path for path in (folder / AUTOENCODER).rglob("*") if path.suffix in (".json", ".safetensors"))
    paths = [folder / WEIGHTS, *carried]
    files = {path.relative_to(folder).as_posix(): file_sums(path) for path in paths}
    publish_record(str(folder / CONFIG), {**config, "files": files})


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of an exported encoder, checked against its seal; files: `check_files`.

    Raises UpstreamError where there is none, ConfigError for another format, DamagedError where it was changed.
    """
    path = folder / CONFIG
    if not path.is_file():
        what = f"has no exported encoder: {CONFIG} is missing" if folder.is_dir() else "is no folder"
        raise UpstreamError(f"{folder} {what}; 'nextvid export RUN FOLDER' writes one")
    config: Any = atomic.read_json(str(path))
    found = config.get("format") if isinstance(config, dict) else None
    if found != FORMAT:
        newer = isinstance(found, int) and found > FORMAT
        remedy = "a newer version of nextvid wrote it: update nextvid" if newer else "export the run again"
        raise ConfigError(f"{folder}: format {found!r}, and this version reads {FORMAT}: {remedy}")
    return read_sealed(str(path), REMEDY) if {"seal", "files"} & config.keys() else config


def check_files(folder: Path, config: Mapping[str, Any]) -> None:
    """DamagedError where a file of an exported encoder is not the one that `config` names: `read_config` gave it."""
    if "files" not in config:
        _log.warning("%s was exported without checksums, so its files cannot be checked: export the run again", folder)
        return
    for name, sums in config["files"].items():
        _refuse_missing(folder / name)
        _refuse_changed(folder / name, sums, file_sums(folder / name))


def read_weights(folder: Path, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of an exported encoder, after `check_files`. Their file is read once: what is checked is returned."""
    path, files = folder / WEIGHTS, config.get("files", {})
    others = {name: sums for name, sums in files.items() if name != WEIGHTS}
    check_files(folder, {**config, "files": others} if "files" in config else config)
    _refuse_missing(path)
    data = path.read_bytes()
    if "files" in config:
        _refuse_changed(path, files.get(WEIGHTS), {"size_bytes": len(data), "crc32c": crc32c(data)})
    try:
        return load(data)
    except SafetensorError as error:
        raise DamagedError(f"{path}: not readable as safetensors: {error}; {REMEDY}") from None


def _refuse_missing(path: Path) -> None:
    if not path.is_file():
        raise DamagedError(f"{path} is missing; {REMEDY}")


def _refuse_changed(path: Path, recorded: Mapping[str, int] | None, found: Mapping[str, int]) -> None:
    if recorded != found:
        raise DamagedError(f"{path}: its bytes differ from their checksum in {CONFIG}; {REMEDY}")


def _clip(run: Run, corpus: CorpusConfig) -> dict[str, Any] | None:
    """Frames, rate and crop of the clips that most of training read; None where no dataset has such clips any more.

    Frames are those of the longest stage; the rate is that of the dataset with the largest weight. Random crops are
    for training: outside of it the square in the middle is shown, as in benchmarks.
    """
    frames = max(run.recipe.stages, key=lambda stage: stage.steps).frames
    for dataset in sorted(corpus.datasets.values(), key=lambda dataset: -(dataset.weight or 0)):
        for policy in dataset.clips:
            if dataset.weight and policy.frames == frames:
                crop = "whole" if policy.crop == "whole" else "centre"
                return {"frames": frames, "fps": policy.fps, "stride": policy.stride, "crop": crop, "pad": "skip"}
    return None
