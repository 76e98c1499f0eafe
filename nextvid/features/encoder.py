"""A trained encoder from its folder, for use without corpus, store or Dagster: clips in, features out.

An encoder of pixels reads frames. One of latents reads latents as the store has them, or frames if its folder has the
autoencoder that made those latents. The statistics of the latents are among the weights.

Axes: B clips, F frames, H and W pixels, R pixels a side, C channels and h and w cells of the store, N tokens of a clip,
D width.
"""

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from huggingface_hub import ModelCard, PyTorchModelHubMixin, snapshot_download
from jaxtyping import Float, UInt8
from safetensors.torch import save_file
from torch import Tensor, nn

from nextvid.config.datasets import ClipPolicy
from nextvid.config.recipe import ModelConfig
from nextvid.config.strict import parse
from nextvid.encode.autoencoders import Autoencoder
from nextvid.encode.decode_task import CropBox, cropped
from nextvid.encode.frames import Decoding
from nextvid.features.card import CARD, PAPER, card
from nextvid.features.onnx import ONNX, write_onnx
from nextvid.features.windows import Windows
from nextvid.model.encoder import Encoder
from nextvid.model.incremental import IncrementalEncoder
from nextvid.model.tokens import latent_tokens, normalise, pixel_tokens, pixel_values, space_to_depth
from nextvid.train.export import AUTOENCODER, CONFIG, REMEDY, WEIGHTS, publish_config, read_config, read_weights
from storage import atomic
from storage.errors import ConfigError, ConflictError, DamagedError, MediaError, RefusedError, UpstreamError

Clips = UInt8[Tensor, "B F R R 3"]


class NExTVidEncoder(nn.Module, PyTorchModelHubMixin, library_name="nextvid", paper_url=PAPER):
    """A frozen encoder in evaluation mode, with the statistics of its training latents.

    `from_pretrained` opens a folder, without network, or a repository of the Hub; `save_pretrained` writes a folder,
    `push_to_hub` a repository. Weights are safetensors, never a pickle.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: ModelConfig, mean: Float[Tensor, " C"], std: Float[Tensor, " C"]) -> None:
        super().__init__()
        self.encoder = Encoder(model)
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.autoencoder: Autoencoder | None = None
        self.resolution = 0  # pixels a side of the frames of training
        self.clip: ClipPolicy | None = None  # of training: frames, rate, crop; None in folders of earlier versions
        self.folder: Path | None = None  # where it was loaded from
        self.eval().requires_grad_(False)

    @property
    def layers(self) -> int:
        """Transformer blocks; `layer` counts them from 0."""
        return len(self.encoder.blocks)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens in a tubelet."""
        return self.encoder.model.grid_height, self.encoder.model.grid_width

    @property
    def frames(self) -> int | None:
        """Frames of a clip in most of training; clips of any whole number of tubelets are encoded."""
        return self.clip.frames if self.clip else None

    @torch.no_grad()
    def forward(
        self, clips: Float[Tensor, "B F C h w"] | UInt8[Tensor, "B F H W 3"], layer: int = -1, resize: bool = True
    ) -> Float[Tensor, "B N D"]:
        """Features of whole clips after the final norm, tokens in the order t, h, w; of the last layer by default.

        Latents are raw, as stored; frames are RGB bytes. Frames of another size than training's are cropped to a square
        and resized, or refused without `resize`. Raises RefusedError for those, for frames that are no whole tubelets,
        for frames if the folder has no autoencoder, for latents given to an encoder of pixels, and for no such layer.
        """
        if not -self.layers <= layer < self.layers:
            raise RefusedError(f"layer {layer}: this encoder has the layers 0 to {self.layers - 1}")
        tokens = self.tokens(clips, resize)
        tubelets = tokens.shape[1] // self.encoder.model.cells
        if layer in (-1, self.layers - 1):
            features: Tensor = self.encoder(tokens, tubelets)
            return features
        return self.encoder.levels(tokens, tubelets, (layer % self.layers,))[0]

    def tokens(
        self, clips: Float[Tensor, "B F C h w"] | UInt8[Tensor, "B F H W 3"], resize: bool = True
    ) -> Float[Tensor, "B N i"]:
        """What the transformer reads of clips; arguments and errors as in `forward`."""
        model = self.encoder.model
        if clips.ndim != 5 or clips.shape[1] % model.tubelet or not clips.shape[1]:
            raise RefusedError(
                f"clips of shape {tuple(clips.shape)}: give [clips, frames, ...] of whole tubelets of {model.tubelet} "
                "frames"
            )
        if model.encoder.input == "pixels":
            if clips.dtype != torch.uint8:
                raise RefusedError("this encoder was trained on pixels: give it frames [B, F, H, W, 3] of RGB bytes")
            frames = self._sized(clips, resize).to(self.mean.device)
            return pixel_tokens(pixel_values(frames), model.patch, model.tubelet)
        latents = self.latents(clips, resize) if clips.dtype == torch.uint8 else clips.to(self.mean.device)
        normalised = normalise(latents.float(), self.mean, self.std)
        return latent_tokens(space_to_depth(normalised, latents.shape[-1] // model.grid_width), model.tubelet)

    def latents(self, frames: UInt8[Tensor, "B F H W 3"], resize: bool = True) -> Float[Tensor, "B F C h w"]:
        """Raw latents of frames. Raises RefusedError without an autoencoder, or for another size without `resize`."""
        if self.autoencoder is None:
            raise RefusedError("this export has no autoencoder: give it latents [B, F, C, h, w] instead of frames")
        with torch.autocast(self.mean.device.type, enabled=False):  # its own precision, as when the store was made
            running = self.autoencoder.start(list(self._sized(frames, resize).cpu().numpy()))
        return torch.from_numpy(running.result().latents).to(self.mean.device)

    def clips(
        self,
        source: str | Path | np.ndarray | Tensor,
        *,
        frames: int | None = None,
        fps: float | None = None,
        stride: int | None = None,
        every_s: float | None = None,
        resize: bool = True,
    ) -> Clips:
        """Clips of a file, URL or array as training showed them, for `forward`.

        A path is decoded in a process of its own, by the rules of the pipeline: one clip from the middle of a video, or
        one every `every_s` seconds; an image is repeated. `frames`, `fps` or `stride` take the place of training's. An
        array [F, H, W, 3] or [B, F, H, W, 3] of RGB bytes is cropped to a square and resized. With `resize=False`
        another size than training's is refused.

        Raises MediaError (its `reason` is the one that the pipeline's tables would have), ConfigError, RefusedError.
        """
        if not isinstance(source, str | Path):
            if (frames, fps, stride, every_s) != (None,) * 4:
                raise ConfigError("frames, fps, stride and every_s are for files: an array is taken whole")
            array = torch.as_tensor(source)
            return self._sized(array if array.ndim == 5 else array[None], resize)
        windows = Windows.of(self.clip, frames, fps, stride, every_s)
        uri = str(source) if "://" in str(source) else str(Path(source).absolute())
        with Decoding(1) as decoding:
            found = decoding.inspect(uri).result()
            rows = windows.rows(uri, found)
            if not resize:
                assert found.facts is not None
                self._refuse_size((found.facts.height, found.facts.width))
            decoded = decoding.start(rows, self.resolution).collect()
        pictures = [decoded[row] for row in rows["row_id"]]
        for one in pictures:
            if one.frames is None:
                raise MediaError(one.reason or "failed", f"{uri}: its frames cannot be decoded ({one.reason})")
        shown = [repeated(one.frames, windows.policy.frames) for one in pictures if one.frames is not None]
        return torch.from_numpy(np.stack(shown))

    @classmethod
    def from_pretrained(  # type: ignore[override]  # no arguments of a constructor
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        device: str = "cpu",
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
    ) -> "NExTVidEncoder":
        """As `load_encoder`, of a folder or a repository of the Hub, which is downloaded once."""
        if Path(pretrained_model_name_or_path).is_dir():
            return load_encoder(pretrained_model_name_or_path, device)
        try:
            folder = snapshot_download(
                str(pretrained_model_name_or_path),
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                token=token,
                local_files_only=local_files_only,
                allow_patterns=["*.json", "*.safetensors", CARD],
            )
        except (OSError, ValueError) as error:  # of the network, of the Hub, and for a name that no repository has
            raise UpstreamError(
                f"{pretrained_model_name_or_path} is no folder, and the Hub gives no such repository: "
                f"{str(error).splitlines()[0]}"
            ) from error
        return load_encoder(folder, device)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:  # noqa: ANN401 - the mixin's
        """Write a folder that `from_pretrained` and `load_encoder` open. Raises ConflictError for the encoder's own."""
        if self.folder is not None and Path(save_directory).absolute() == self.folder.absolute():
            raise ConflictError(f"{save_directory} is the folder that this encoder was loaded from: name another")
        return super().save_pretrained(save_directory, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        """The weights as they are now; config.json, autoencoder and model card of the folder that it came from."""
        assert self.folder is not None, "an encoder that was loaded"
        weights = {name: value.cpu().contiguous() for name, value in self.state_dict().items()}
        with atomic.staged_file(str(save_directory / WEIGHTS)) as staged:
            save_file(weights, staged)
        if self.autoencoder is not None:
            shutil.copytree(self.folder / AUTOENCODER, save_directory / AUTOENCODER, dirs_exist_ok=True)
        if (self.folder / CARD).is_file():
            shutil.copy(self.folder / CARD, save_directory / CARD)
        config = read_config(self.folder)
        config.pop("files", None)
        publish_config(save_directory, config)

    def generate_model_card(self, *_: object, **__: object) -> ModelCard:
        """The card of an encoder whose folder has none: what config.json says."""
        assert self.folder is not None, "an encoder that was loaded"
        return ModelCard(card(read_config(self.folder)))

    def stream(self) -> "FeatureStream":
        """Features of tubelets as they come, for a camera or a file that is being written."""
        return FeatureStream(self)

    def program(self, frames: int | None = None) -> torch.export.ExportedProgram:
        """The encoder as a graph of torch.export, for any number of clips of `frames` frames, by default training's.

        Its input is what `forward` takes: frames at the resolution of training, or raw latents. Raises ConfigError
        where the folder does not say a clip's frames.
        """
        model, frames = self.encoder.model, frames or self.frames
        if frames is None:
            raise ConfigError("this encoder was exported without its clips: give frames")
        if model.encoder.input == "pixels":
            example = torch.zeros(2, frames, self.resolution, self.resolution, 3, dtype=torch.uint8)
        else:
            channels = self.mean.shape[0]
            fold = round(math.sqrt(model.frame_channels // channels))
            example = torch.zeros(2, frames, channels, fold * model.grid_height, fold * model.grid_width)
        shapes = {"clips": {0: torch.export.Dim("clips", min=1)}}
        return torch.export.export(_Whole(self), (example.to(self.mean.device),), dynamic_shapes=shapes)

    def _sized(self, frames: UInt8[Tensor, "B F H W 3"], resize: bool) -> Clips:
        """Frames at the resolution of training: the square in the middle, resized as the pipeline does."""
        if frames.dtype != torch.uint8 or frames.ndim != 5 or frames.shape[-1] != 3:
            raise RefusedError(
                f"{frames.dtype} of shape {tuple(frames.shape)}: give RGB bytes [clips, frames, H, W, 3]"
            )
        height, width = frames.shape[2:4]
        if (height, width) == (self.resolution, self.resolution):
            return frames
        if not resize:
            self._refuse_size((height, width))
        side = min(height, width)
        whole = self.clip is not None and self.clip.crop == "whole"
        box = CropBox(0, 0, width, height)
        if not whole:
            box = CropBox((width - side) // 2, (height - side) // 2, side, side)
        flat = rearrange(frames, "B F H W c -> (B F) H W c").cpu().numpy()
        resized = torch.from_numpy(cropped(flat, box, flip=False, resolution=self.resolution))
        return rearrange(resized, "(B F) H W c -> B F H W c", B=frames.shape[0]).to(frames.device)

    def _refuse_size(self, size: tuple[int, int]) -> None:
        if size != (self.resolution, self.resolution):
            raise RefusedError(f"frames of {size} pixels: resize them to {self.resolution} x {self.resolution}")


class _Whole(nn.Module):
    """Features of the last layer alone: what is exported has no options."""

    def __init__(self, encoder: NExTVidEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, clips: Tensor) -> Tensor:
        return self.encoder(clips)


class FeatureStream:
    """Tubelets of clips in, their features out, equal to those of the whole clip because the encoder is frame-causal.

    Keys and values of all earlier tubelets are kept: 2 D numbers a token and block. Training knew clips of a few
    tubelets (`encoder.frames`); begin a new stream where later positions were never trained.
    """

    def __init__(self, encoder: NExTVidEncoder) -> None:
        self._encoder = encoder
        self._incremental = IncrementalEncoder(encoder.encoder)

    @torch.no_grad()
    def push(self, clips: Float[Tensor, "B F C h w"] | UInt8[Tensor, "B F H W 3"]) -> Float[Tensor, "B N D"]:
        """Features of the next frames, one tubelet or several. Raises RefusedError as `forward` of the encoder does."""
        tubelets = self._encoder.tokens(clips).split(self._encoder.encoder.model.cells, dim=1)
        return torch.cat([self._incremental.encode(tokens)[0] for tokens in tubelets], dim=1)


def repeated(frames: UInt8[np.ndarray, "f R R 3"], count: int) -> UInt8[np.ndarray, "F R R 3"]:
    """Frames of a clip as they are; the one of an image `count` times, as in training."""
    return frames.repeat(count, axis=0) if len(frames) == 1 else frames


def copy_encoder(folder: Path, out: Path, readme: str | None = None, onnx: bool = False) -> NExTVidEncoder:
    """Copy an exported encoder to a new folder and open the copy, so that damage is found before it is published.

    `readme` is its model card; with `onnx` there is a file ONNX of it too.

    Raises what `load_encoder` does, and ConflictError if `out` exists.
    """
    if not (folder / CONFIG).is_file():
        raise UpstreamError(f"{folder} has no exported encoder yet: the run writes it when it is complete")
    with atomic.staged_folder(str(out.absolute())) as staged:
        shutil.copytree(folder, staged, dirs_exist_ok=True)
        if readme is not None:
            (staged / CARD).write_text(readme, encoding="utf-8")
        found = load_encoder(staged)
        if onnx:
            write_onnx(found.program(), staged / ONNX)
        return found


@dataclass(frozen=True)
class ExportFacts:
    """The config.json of an exported encoder, as far as it decides what the encoder computes."""

    model: ModelConfig
    carries_autoencoder: bool
    encoded_by: str  # digest of the autoencoder that made the latents of training
    resolution: int  # pixels a side of the frames of training
    precision: str  # of the autoencoder
    clip: ClipPolicy | None  # of training: frames, rate, crop; None in folders of earlier versions


def read_facts(folder: Path) -> ExportFacts:
    """The facts of an exported encoder, without its weights. Raises as `load_encoder` does."""
    return facts_of(read_config(folder), f"{folder}/{CONFIG}")


def facts_of(config: Mapping[str, Any], place: str) -> ExportFacts:
    """The facts that a config.json has. `place` is for messages only."""
    try:
        model, autoencoder = config["model"], config["autoencoder"]
        resolution, precision = config["encoding"]["resolution"], config["encoding"]["precision"]
        encoded_by = str(config["encoding"]["autoencoder"])
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{place}: {error} is missing: export the run again") from error
    if type(resolution) is not int or resolution < 1 or precision not in ("fp32", "bf16"):
        raise ConfigError(
            f"{place}: resolution {resolution!r} or precision {precision!r} is none: export the run again"
        )
    if autoencoder not in (None, AUTOENCODER):  # any other path could lead out of the folder
        raise ConfigError(f"{place}: the autoencoder must be in '{AUTOENCODER}', not {autoencoder!r}")
    clip = parse(ClipPolicy, config["clip"], f"{place}, clip") if config.get("clip") else None
    return ExportFacts(
        parse(ModelConfig, model, place), autoencoder is not None, encoded_by, resolution, precision, clip
    )


def load_encoder(path: str | Path, device: str = "cpu") -> NExTVidEncoder:
    """Open an exported encoder: frozen, in evaluation mode, fp32.

    Every byte is compared with its checksum first. Raises UpstreamError if there is none, ConfigError for another
    format, DamagedError for a file that was changed or is another encoder's.
    """
    folder = Path(path)
    config = read_config(folder)
    facts = facts_of(config, f"{folder}/{CONFIG}")
    tensors = read_weights(folder, config)
    if absent := {"mean", "std"} - tensors.keys():
        raise DamagedError(f"{folder / WEIGHTS} has no {' and no '.join(sorted(absent))}; {REMEDY}")
    if (depth := facts.model.encoder.depth) > len(tensors):
        raise DamagedError(f"{folder / WEIGHTS} has fewer tensors than the {depth} blocks that {CONFIG} says; {REMEDY}")
    model = facts.model.model_copy(update={"attention": "loop"})  # which every device has; the results agree
    try:
        with torch.device("meta"):  # without memory, of which a model that is described as larger would take all
            found = NExTVidEncoder(model, tensors["mean"], tensors["std"])
        found.load_state_dict(tensors, assign=True)
        found.float()
    except RuntimeError as error:
        first = str(error).splitlines()[-1].strip()[:200]
        raise DamagedError(f"{folder / WEIGHTS} is of another model than {CONFIG} says: {first}; {REMEDY}") from None
    if facts.carries_autoencoder:
        found.autoencoder = Autoencoder.load(folder / AUTOENCODER, device, facts.precision)
        if found.autoencoder.digest != facts.encoded_by:
            raise DamagedError(f"{folder / AUTOENCODER} did not make the latents that this encoder reads; {REMEDY}")
    found.resolution, found.clip, found.folder = facts.resolution, facts.clip, folder
    return found.to(device)
