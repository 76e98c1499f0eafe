"""A trained encoder as a folder of its own: config.json, model.safetensors and, if it has one, its autoencoder.

`nextvid.load_encoder(path)` opens it without corpus, store or Dagster. An encoder of pixels takes frames. One of
latents takes latents as the store has them, or frames if the folder has the autoencoder that made those latents. The
statistics of the latents are saved with the weights.

Axes: B clips, F frames, H and W pixels, C channels and h and w cells of the store, N tokens of a clip, D width.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from safetensors.torch import save_file
from torch import Tensor, nn

from nextvid.config.recipe import ModelConfig
from nextvid.config.strict import parse
from nextvid.encode.autoencoders import Autoencoder
from nextvid.encode.weights import autoencoder_digest
from nextvid.model.encoder import Encoder
from nextvid.model.tokens import latent_tokens, normalise, pixel_tokens, pixel_values, space_to_depth
from nextvid.train.checkpoint import fill, load_tensors
from nextvid.train.run import Run
from nextvid.trainset.trainset import Trainset
from storage import atomic
from storage.errors import ConfigError, RefusedError, UpstreamError

FORMAT = 1  # raise it when a reader of the old format would misread the folder
WEIGHTS = "model.safetensors"
AUTOENCODER = "autoencoder"


class ExportedEncoder(nn.Module):
    """A frozen encoder in evaluation mode, with the statistics of its training latents."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: ModelConfig, mean: Float[Tensor, " C"], std: Float[Tensor, " C"]) -> None:
        super().__init__()
        self.encoder = Encoder(model)
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.autoencoder: Autoencoder | None = None
        self.resolution: int | None = None
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, clips: Float[Tensor, "B F C h w"] | UInt8[Tensor, "B F H W 3"]) -> Float[Tensor, "B N D"]:
        """Features of whole clips after the final norm, tokens in the order t, h, w.

        Latents are raw, as stored; frames are RGB bytes at the resolution of training. Raises RefusedError for frames
        of another size, for frames if the folder has no autoencoder, and for latents given to an encoder of pixels.
        """
        model = self.encoder.model
        if model.encoder.input == "pixels":
            if clips.dtype != torch.uint8:
                raise RefusedError("this encoder was trained on pixels: give it frames [B, F, H, W, 3] of RGB bytes")
            self._refuse_size(clips)
            tokens = pixel_tokens(pixel_values(clips.to(self.mean.device)), model.patch, model.tubelet)
        else:
            latents = self.latents(clips) if clips.dtype == torch.uint8 else clips
            normalised = normalise(latents.float(), self.mean, self.std)
            tokens = latent_tokens(space_to_depth(normalised, latents.shape[-1] // model.grid_width), model.tubelet)
        features: Tensor = self.encoder(tokens, clips.shape[1] // model.tubelet)
        return features

    def latents(self, frames: UInt8[Tensor, "B F H W 3"]) -> Float[Tensor, "B F C h w"]:
        """Raw latents of frames, from the autoencoder. Raises RefusedError without one, or for another frame size."""
        if self.autoencoder is None:
            raise RefusedError("this export has no autoencoder: give it latents [B, F, C, h, w] instead of frames")
        self._refuse_size(frames)
        flat = rearrange(frames, "B F H W c -> (B F) H W c").cpu().numpy()
        latents = torch.from_numpy(self.autoencoder.encode(flat).latents).to(self.mean.device)
        return rearrange(latents, "(B F) C h w -> B F C h w", B=frames.shape[0])

    def _refuse_size(self, frames: Tensor) -> None:
        if frames.shape[2:4] != (self.resolution, self.resolution):
            raise RefusedError(
                f"frames of {tuple(frames.shape[2:4])} pixels: resize them to {self.resolution} x {self.resolution}"
            )


def export_encoder(folder: Path, encoder: Encoder, trainset: Trainset, run: Run, autoencoder: str) -> None:
    """Write an encoder's folder, whole or not at all, unless it exists.

    The autoencoder at the path `autoencoder` is copied into it if it made the trainset's latents.
    """
    if folder.exists():
        return
    tensors = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    tensors |= {"mean": torch.from_numpy(np.array(trainset.mean)), "std": torch.from_numpy(np.array(trainset.std))}
    source = Path(autoencoder)
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
        "trainset": trainset.digest,
        "encoding": trainset.spec.to_json(),
        "autoencoder": AUTOENCODER if carried else None,
    }
    with atomic.staged_folder(str(folder)) as staged:
        save_file(
            {name: value.detach().float().cpu().contiguous() for name, value in tensors.items()}, staged / WEIGHTS
        )
        if carried:
            shutil.copytree(source, staged / AUTOENCODER)
        atomic.publish_json(str(staged / "config.json"), config)


def copy_encoder(folder: Path, out: Path) -> ExportedEncoder:
    """Copy an exported encoder to a new folder and open the copy, so that damage is found before it is published.

    Raises what `load_encoder` does, and ConflictError if `out` exists.
    """
    if not (folder / "config.json").is_file():
        raise UpstreamError(f"{folder} has no exported encoder yet: the run writes it when it is complete")
    with atomic.staged_folder(str(out.absolute())) as staged:
        shutil.copytree(folder, staged, dirs_exist_ok=True)
        return load_encoder(staged)


def load_encoder(path: str | Path, device: str = "cpu") -> ExportedEncoder:
    """Open an exported encoder: frozen, in evaluation mode, fp32.

    Raises UpstreamError if there is none, ConfigError for another format, DamagedError for weights that cannot be read.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise UpstreamError(f"{folder} has no exported encoder: config.json is missing")
    config: dict[str, Any] = atomic.read_json(str(folder / "config.json"))
    if config.get("format") != FORMAT:
        raise ConfigError(
            f"{folder}: format {config.get('format')!r}, and this version reads {FORMAT}: export it again"
        )
    try:
        model, autoencoder = config["model"], config["autoencoder"]
        resolution, precision = config["encoding"]["resolution"], config["encoding"]["precision"]
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{folder}/config.json: {error} is missing: export the run again") from error
    if autoencoder not in (None, AUTOENCODER):  # any other path could lead out of the folder
        raise ConfigError(f"{folder}/config.json: the autoencoder must be in '{AUTOENCODER}', not {autoencoder!r}")
    tensors = load_tensors(folder / WEIGHTS)
    found = ExportedEncoder(parse(ModelConfig, model, f"{folder}/config.json"), tensors["mean"], tensors["std"])
    fill(found, folder / WEIGHTS)
    if autoencoder:
        found.autoencoder = Autoencoder.load(folder / AUTOENCODER, device, precision)
    found.resolution = resolution
    return found.to(device)
