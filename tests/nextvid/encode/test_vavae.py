"""The converter of VA-VAE: names both ways, strictness, and nothing executed. The published file is not needed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nextvid.encode import vavae
from nextvid.encode.autoencoders import Autoencoder
from nextvid.encode.weights import facts
from storage.errors import ConfigError, ConflictError

SMALL: dict[str, Any] = vavae.CONFIG | {"block_out_channels": (8, 8, 12, 12, 16), "norm_num_groups": 4}


def ldm_name(name: str) -> str:
    """diffusers' name back to LDM's, written from the other end: which module of the public source holds it."""
    parts = name.split(".")
    side = parts[0]
    if side in ("quant_conv", "post_quant_conv") or parts[1] in ("conv_in", "conv_out"):
        return name
    if parts[1] == "conv_norm_out":
        return f"{side}.norm_out.{parts[2]}"
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}
    leaf = {"conv_shortcut": "nin_shortcut"}.get(parts[-2], parts[-2])
    if parts[1] == "mid_block":
        place = f"block_{int(parts[3]) + 1}" if parts[2] == "resnets" else "attn_1"
        return f"{side}.mid.{place}.{leaf if parts[2] == 'resnets' else attention[parts[4]]}.{parts[-1]}"
    level = int(parts[2]) if side == "encoder" else 4 - int(parts[2])
    way = "down" if side == "encoder" else "up"
    match parts[3]:
        case "resnets":
            return f"{side}.{way}.{level}.block.{parts[4]}.{leaf}.{parts[-1]}"
        case "attentions":
            return f"{side}.{way}.{level}.attn.{parts[4]}.{attention[parts[5]]}.{parts[-1]}"
        case _:
            return f"{side}.{way}.{level}.{way}sample.conv.{parts[-1]}"


def as_ldm(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A model's tensors in the layout of the published file, with what else stands in it."""
    state = {}
    for name, value in model.state_dict().items():
        conv = ".attentions." in name and name.endswith("weight") and value.ndim == 2
        state[ldm_name(name)] = value[..., None, None].clone() if conv else value.clone()
    extra = {"foundation_model.model.blocks.0.weight": torch.ones(3), "linear_proj.weight": torch.ones(2)}
    return state | extra | {"loss.logvar": torch.zeros(1)}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """A narrow model of the same topology, in place of the 70 M parameters of the real one."""
    from diffusers import AutoencoderKL

    monkeypatch.setattr(vavae, "CONFIG", SMALL)
    torch.manual_seed(0)
    model: torch.nn.Module = AutoencoderKL(**SMALL).eval()
    with torch.no_grad():
        for weights in model.parameters():
            weights.add_(0.05 * torch.randn_like(weights))  # no norm stays the identity
    return model


def test_exact_shape_has_the_published_tensors() -> None:
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        names = AutoencoderKL(**vavae.CONFIG).state_dict().keys()
    assert len(names) == vavae.TENSORS
    old = {ldm_name(name) for name in names}
    assert {
        "encoder.down.4.attn.1.proj_out.weight",
        "decoder.up.4.attn.2.q.bias",
        "encoder.mid.attn_1.norm.weight",
    } <= old
    assert "decoder.up.0.block.2.conv2.weight" in old
    assert "decoder.up.0.upsample.conv.weight" not in old  # the first level of LDM is the last of diffusers
    assert sum(1 for name in old if name.startswith(("encoder.down.4.attn", "decoder.up.4.attn"))) == 50
    assert {vavae.diffusers_name(name) for name in old} == set(names)


@pytest.mark.parametrize("wrapped", [True, False])
def test_converted_model_computes_the_same(small: torch.nn.Module, tmp_path: Path, wrapped: bool) -> None:
    state = as_ldm(small)
    torch.save({"state_dict": state} if wrapped else state, tmp_path / "v.pt")
    stats = {"mean": torch.randn(1, 32, 1, 1), "std": torch.rand(1, 32, 1, 1)}
    torch.save(stats, tmp_path / "stats.pt")
    assert vavae.import_vavae(tmp_path / "v.pt", tmp_path / "out", tmp_path / "stats.pt") == vavae.TENSORS
    assert facts(tmp_path / "out")[1:3] == (32, 16)
    frames = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    got = Autoencoder.load(tmp_path / "out").encode(frames)
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        wanted = small.encode(pixels).latent_dist.mean  # type: ignore[operator]
    np.testing.assert_allclose(got.latents, wanted.numpy(), atol=2e-5)


@pytest.mark.parametrize("spoil", ["missing", "shape", "extra"])
def test_trap_18_another_model_is_refused(small: torch.nn.Module, tmp_path: Path, spoil: str) -> None:
    state = as_ldm(small)
    match spoil:
        case "missing":
            del state["encoder.down.4.attn.0.q.weight"]
        case "shape":
            state["encoder.conv_in.weight"] = torch.ones(9, 3, 3, 3)
        case "extra":
            state["encoder.down.5.block.0.conv1.weight"] = torch.ones(1)
    torch.save(state, tmp_path / "v.pt")
    with pytest.raises(ConfigError):
        vavae.import_vavae(tmp_path / "v.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_hostile_pickle_runs_nothing(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"state_dict": Trap()}, tmp_path / "v.pt")
    with pytest.raises(ConfigError, match="nothing else is loaded"):
        vavae.import_vavae(tmp_path / "v.pt", tmp_path / "out")
    assert not (tmp_path / "ran").exists()


def test_existing_folder_stays(small: torch.nn.Module, tmp_path: Path) -> None:
    torch.save(as_ldm(small), tmp_path / "v.pt")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(ConflictError):
        vavae.import_vavae(tmp_path / "v.pt", tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "x"
