"""Models of a few thousand weights on a 3x4 grid (height and width differ, so that swaps show), and clips for them."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nextvid.config.recipe import RecipeConfig
from nextvid.config.strict import parse
from nextvid.model.flow import FlowDraws, NoiseKey
from nextvid.model.nextvid import NExTVid
from nextvid.model.reference import reference_encoder, reference_features
from nextvid.model.tokens import tube_ids

HEIGHT, WIDTH = 3, 4
CELLS = HEIGHT * WIDTH
TUBELETS = 4
CHANNELS = 5  # of one frame
KEPT = (7, 3)  # visible cells of the two strategies


def tiny_recipe(**changes: Any) -> RecipeConfig:
    """Pixel input, two strategies; `changes` are merged into the recipe, by section."""
    values: dict[str, Any] = {
        "name": "tiny",
        "precision": "fp32",
        "model": {
            "grid_height": HEIGHT,
            "grid_width": WIDTH,
            "patch": 2,
            "frame_channels": CHANNELS,
            "encoder": {"depth": 2, "width": 32, "heads": 2, "mlp_hidden": 64},
            "predictor": {"depth": 2, "width": 32, "heads": 2},
            "decoder": {"depth": 2, "width": 32, "heads": 2},
        },
        "masks": {
            "entries": 64,
            "strategies": [
                {"name": "short", "blocks": 2, "scale": 0.15, "budget": KEPT[0]},
                {"name": "long", "blocks": 1, "scale": 0.6, "budget": KEPT[1]},
            ],
        },
        "stages": [
            {"name": "warmup", "steps": 1, "frames": 8, "batch": 2, "tau_copies": 1, "lr_start": 0, "lr_end": 0}
        ],
    }
    return parse(RecipeConfig, _merge(values, changes), "tiny")


def s_model(kind: str, **losses: Any) -> dict[str, Any]:
    """Changes that make the simplified model of docs/method.md 10."""
    share = "clip" if kind == "xattn_self" else "tubelet"
    model = {"predictor": {"kind": "none"}, "decoder": {"kind": kind}}
    return {"model": model, "losses": {"align": 0.0, "tau_share": share, **losses}}


def tiny_model(recipe: RecipeConfig | None = None, seed: int = 0, trained: bool = True) -> NExTVid:
    """A model; `trained` replaces zero initialisations (query, gates, heads) by noise, as some steps would."""
    torch.manual_seed(seed)
    model = NExTVid(recipe or tiny_recipe())
    if trained:
        shake(model)
    return model


@torch.no_grad()
def shake(module: nn.Module) -> None:
    """Add noise to every parameter."""
    for parameter in module.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))


def clip(recipe: RecipeConfig | None = None, clips: int = 2, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Random encoder tokens and targets of whole clips."""
    generator = torch.Generator().manual_seed(seed)
    config = (recipe or tiny_recipe()).model
    inputs = 3 * config.tubelet * config.patch**2
    tokens = torch.randn(clips, TUBELETS * CELLS, inputs, generator=generator)
    targets = torch.randn(clips, TUBELETS, CELLS, config.target_channels, generator=generator)
    return tokens, targets


def visible(clips: int = 2, kept: tuple[int, ...] = KEPT, seed: int = 2) -> list[Tensor]:
    """Ids of random tubes, other cells in each clip and strategy."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for count in kept:
        cells = torch.stack([torch.randperm(CELLS, generator=generator)[:count].sort()[0] for _ in range(clips)])
        found.append(tube_ids(cells, TUBELETS, CELLS))
    return found


def key(clips: int = 2, step: int = 0) -> NoiseKey:
    return NoiseKey(seed=3, step=step, draws=tuple(range(100, 100 + clips)))


def draw_shapes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a model run on the meta device: no draws have values there, and nothing autocasts."""

    def shapes_only(key: object, strategy: int, copies: range, shape: tuple[int, int, int], *_: object) -> FlowDraws:
        tau = torch.empty(len(copies), 1, shape[0], device="meta")
        return FlowDraws(tau, torch.empty(len(copies), 1, *shape, device="meta"))

    monkeypatch.setattr("nextvid.model.nextvid.draw_flow", shapes_only)
    monkeypatch.setattr("torch.autocast", lambda *_, **__: nullcontext())  # the meta device has none


def features(model: NExTVid, tokens: Tensor) -> Tensor:
    """Targets from an exact copy of the online encoder."""
    return reference_features(reference_encoder(model.encoder), tokens, target_norm=True)


def _merge(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for name, change in changes.items():
        inside = merged.get(name)
        merged[name] = _merge(inside, change) if isinstance(inside, dict) and isinstance(change, dict) else change
    return merged
