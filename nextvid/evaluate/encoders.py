"""The three encoders of a run that are compared: averaged (EMA), online, and the run's own random initialisation.

Holds which run is meant and how its weights are found. Reads checkpoints, writes nothing. The random twin has the
recipe, input and seed of the run, since random features of another initialisation differ by more than training gains
(research demo 5: .15 to .47).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from nextvid.model.encoder import Encoder
from nextvid.model.nextvid import NExTVid
from nextvid.model.reference import reference_encoder
from nextvid.train import checkpoint
from nextvid.train.run import Run
from nextvid.train.step import build_model

EncoderName = Literal["ema", "online", "random"]
ENCODERS: tuple[EncoderName, ...] = get_args(EncoderName)


@dataclass(frozen=True)
class Trained:
    """The networks of a run's last checkpoint, frozen, in evaluation mode."""

    model: NExTVid
    ema: Encoder
    random: Encoder
    checkpoint: Path

    def encoder(self, name: EncoderName) -> Encoder:
        """One of the three."""
        match name:
            case "ema":
                return self.ema
            case "online":
                return self.model.encoder
            case "random":
                return self.random


def load_trained(run: Run, device: str = "cpu") -> Trained:
    """The networks of a complete run, on a device."""
    model = build_model(run.recipe)
    random = reference_encoder(model.encoder)
    ema = reference_encoder(model.encoder)
    path = checkpoint.complete(run.checkpoints)[-1]
    checkpoint.load(path, run.identity, model, ema)
    frozen = model.eval().requires_grad_(False)
    return Trained(frozen.to(device), ema.to(device), random.to(device), path)
