"""A trained encoder as a folder of its own: config.json, model.safetensors and, if it has one, its autoencoder.

`nextvid.load_encoder(path)` (nextvid/features/encoder.py) opens it without corpus, store or Dagster.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from nextvid.config.corpus import CorpusConfig
from nextvid.encode.weights import autoencoder_digest
from nextvid.model.encoder import Encoder
from nextvid.train.run import Run
from nextvid.trainset.trainset import Trainset
from storage import atomic

FORMAT = 1  # raise it when a reader of the old format would misread the folder
WEIGHTS = "model.safetensors"
AUTOENCODER = "autoencoder"


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
        atomic.publish_json(str(staged / "config.json"), config)


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
