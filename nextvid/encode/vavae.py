"""The published VA-VAE checkpoint as a diffusers folder of safetensors, converted strictly.

The result is loaded as any other AutoencoderKL. Names and numbers were checked against the public source: 342 tensors,
50 of them of the attention inside the lowest level. `from_single_file` of diffusers drops those 50 without an error,
hence our own converter.
"""

import json
import math
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from storage.atomic import staged_folder
from storage.errors import ConfigError

# The exact shape: LDM's ddconfig of hustvl/LightningDiT, tokenizer/configs/vavae_f16d32.yaml.
CONFIG: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4 + ("AttnDownEncoderBlock2D",),
    "up_block_types": ("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 128, 256, 256, 512),
    "layers_per_block": 2,
    "act_fn": "silu",
    "latent_channels": 32,
    "norm_num_groups": 32,
    "sample_size": 256,
    "mid_block_add_attention": True,
    "force_upcast": False,
    "scaling_factor": 1.0,
}
TENSORS = 342  # counted in the published checkpoint

_KEPT = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
_IGNORED = ("foundation_model.", "linear_proj.", "loss.")  # the model it was aligned with, and its training losses
_LIGHTNING = frozenset({  # what the trainer's wrapper holds beside the tensors (PyTorch Lightning, checkpoint contents)
    "epoch", "global_step", "pytorch-lightning_version", "loops", "callbacks", "optimizer_states", "lr_schedulers",
    "hparams_name", "hparams_type", "hyper_parameters", "native_amp_scaling_state", "MixedPrecision",
})  # fmt: skip
_LEVELS = len(CONFIG["block_out_channels"])
_RENAMED = (  # LDM's names -> diffusers', in this order
    (r"^(encoder)\.down\.(\d)\.block\.(\d)\.", r"\1.down_blocks.\2.resnets.\3."),
    (r"^(encoder)\.down\.(\d)\.attn\.(\d)\.", r"\1.down_blocks.\2.attentions.\3."),
    (r"^(encoder)\.down\.(\d)\.downsample\.conv\.", r"\1.down_blocks.\2.downsamplers.0.conv."),
    (r"^(decoder)\.up\.(\d)\.block\.(\d)\.", r"\1.up_blocks.\2.resnets.\3."),
    (r"^(decoder)\.up\.(\d)\.attn\.(\d)\.", r"\1.up_blocks.\2.attentions.\3."),
    (r"^(decoder)\.up\.(\d)\.upsample\.conv\.", r"\1.up_blocks.\2.upsamplers.0.conv."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
)
_IN_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def import_vavae(checkpoint: str | Path, folder: str | Path, stats: str | Path | None = None) -> int:
    """Write the checkpoint as a diffusers folder that did not exist; returns the number of tensors.

    `stats` is the published latents_stats.pt, kept in config.json for reference. Nothing in either file is executed.
    Raises ConfigError where a file is no VA-VAE checkpoint, ConflictError where the folder exists.
    """
    state = _state(Path(checkpoint))
    converted = {diffusers_name(name): value for name, value in state.items() if name.startswith(_KEPT)}
    if len(converted) != TENSORS:
        raise ConfigError(f"{checkpoint}: {len(converted)} tensors of an autoencoder, VA-VAE f16d32 has {TENSORS}")
    write_folder(converted, CONFIG | (_statistics(Path(stats)) if stats else {}), Path(folder))
    return len(converted)


def diffusers_name(name: str) -> str:
    """What diffusers calls a tensor of the LDM layout."""
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    if found := re.match(r"^(decoder\.up_blocks)\.(\d)\.(.*)$", name):  # LDM counts up levels from the last
        name = f"{found[1]}.{_LEVELS - 1 - int(found[2])}.{found[3]}"
    if found := re.match(r"^(.*\.attentions\.\d)\.(\w+)\.(weight|bias)$", name):
        name = f"{found[1]}.{_IN_ATTENTION[found[2]]}.{found[3]}"
    return name


def write_folder(converted: Mapping[str, torch.Tensor], config: Mapping[str, Any], folder: Path) -> None:
    """Load tensors strictly into the configured model and save it. ConfigError names what is missing or left over."""
    import diffusers  # 2.7 s to import

    model = diffusers.AutoencoderKL(**config)
    wanted = {name: value.shape for name, value in model.state_dict().items()}
    fitted = {  # attention's 1 x 1 convolutions are matrices in diffusers
        name: value[..., 0, 0] if ".attentions." in name and value.ndim == 4 else value
        for name, value in converted.items()
    }
    wrong = sorted(name for name, value in fitted.items() if wanted.get(name) != value.shape)
    if missing := sorted(set(wanted) - set(fitted)):
        raise ConfigError(f"{len(missing)} tensors are missing, the first is {missing[0]}: this is not VA-VAE f16d32")
    if wrong:
        raise ConfigError(f"{len(wrong)} tensors do not fit, the first is {wrong[0]}: this is not VA-VAE f16d32")
    model.load_state_dict({name: value.float() for name, value in fitted.items()}, strict=True)
    with staged_folder(str(folder)) as temporary:
        model.save_pretrained(temporary, safe_serialization=True)
        (temporary / "nextvid.json").write_text(json.dumps({"kind": "autoencoder_kl", "patch": 1}) + "\n")


def _state(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, flat or in the trainer's wrapper. Raises ConfigError for anything unexpected."""
    found = _load(path)
    state = found.get("state_dict", found)
    unknown = sorted(set(found) - _LIGHTNING - {"state_dict"}) if "state_dict" in found else []
    if not isinstance(state, dict):
        raise ConfigError(f"{path}: 'state_dict' holds {type(state).__name__}, a dictionary of tensors was expected")
    unknown += sorted(str(name) for name in state if not str(name).startswith(_KEPT + _IGNORED))
    if unknown:
        raise ConfigError(f"{path}: {len(unknown)} entries are none of VA-VAE's, the first is '{unknown[0]}'")
    for name, value in state.items():
        if name.startswith(_KEPT) and not isinstance(value, torch.Tensor):
            raise ConfigError(f"{path}: '{name}' is no tensor but {type(value).__name__}")
    return state


def _load(path: Path) -> dict[str, Any]:
    """A checkpoint's dictionary, read without executing anything in it."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except Exception as error:  # zip, torch and what reads the pickle raise their own
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        if not message.startswith("Weights only load failed"):  # torch's words
            why = message if zipfile.is_zipfile(path) else "torch.save writes zip archives, and this is none"
            raise ConfigError(f"{path}: not readable as a checkpoint: {why}") from None
        raise ConfigError(
            f"{path}: more than plain tensors, or damaged; a file that runs code is never loaded. Where you trust its "
            "origin, keep its tensors alone: torch.save(torch.load(PATH, weights_only=False, "
            f"map_location='cpu')['state_dict'], OUT), and import OUT ({message})"
        ) from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: holds {type(found).__name__}, a dictionary of tensors was expected")
    return found


def _statistics(path: Path) -> dict[str, list[float]]:
    """Mean and deviation by channel of latents_stats.pt, tensors (1, 32, 1, 1)."""
    found = _load(path)
    try:
        mean, std = (found[key].flatten().tolist() for key in ("mean", "std"))
    except (KeyError, AttributeError):
        raise ConfigError(f"{path}: 'mean' and 'std' were expected") from None
    if len(mean) != CONFIG["latent_channels"] or len(std) != CONFIG["latent_channels"]:
        raise ConfigError(f"{path}: {len(mean)} means and {len(std)} deviations, 32 of each were expected")
    if not all(map(math.isfinite, mean + std)) or min(std) <= 0:
        raise ConfigError(f"{path}: means must be finite, and deviations finite and positive")
    return {"latents_mean": mean, "latents_std": std}
