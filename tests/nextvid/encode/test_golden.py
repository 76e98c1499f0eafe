"""Digests that name what users have stored: pinned, since one that moves encodes a whole corpus again.

A change here is a decision: write down why, and that every store made before it becomes an old one.
"""

import json
from pathlib import Path
from typing import Any

from nextvid.config.corpus import CorpusConfig
from nextvid.corpus.cutting import View, clip_id, row_id
from nextvid.encode.weights import autoencoder_digest
from storage.spec import EncodingSpec

PINNED = Path(__file__).parents[2] / "golden" / "encoding_digests.json"
KL = {"_class_name": "AutoencoderKL", "block_out_channels": [128, 128, 256, 256, 512], "latent_channels": 32}


def spec(**changed: Any) -> str:
    fields: dict[str, Any] = {
        "autoencoder": "0" * 32,
        "resolution": 256,
        "resize": "bicubic",
        "precision": "fp32",
        "posterior": "mean",
        "storage": "float16",
        "channels": 32,
        "height": 16,
        "width": 16,
        "time_map": "frame",
    }
    return EncodingSpec(**fields | changed).digest()


def folder(path: Path, config: dict[str, Any] | None, weights: str, **wrapper: Any) -> str:
    path.mkdir()
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
        (path / weights).write_bytes(b"weights")
    if wrapper:
        (path / "nextvid.json").write_text(json.dumps(wrapper))
    return autoencoder_digest(path)


def test_digests_are_the_pinned_ones(tmp_path: Path) -> None:
    diffusers, transformers = "diffusion_pytorch_model.safetensors", "model.safetensors"
    cosmos = {
        "_class_name": "AutoencoderKLCosmos",
        "latent_channels": 16,
        "spatial_compression_ratio": 8,
        "temporal_compression_ratio": 8,
    }
    vision = {"model_type": "siglip_vision_model", "hidden_size": 768, "image_size": 256, "patch_size": 16}
    corpus = CorpusConfig.model_validate(
        {
            "root": "/root",
            "encoding": {"autoencoder": "/weights"},
            "datasets": {"films": {"uri": "/films", "weight": 1.0, "clips": [{"frames": 16, "fps": 4}]}},
        }
    )
    clip = clip_id("ab" * 16, [0, 250_000, 500_000])
    found = {
        "spec": spec(),
        "spec bf16": spec(precision="bf16"),
        "spec sample": spec(posterior="sample"),
        "spec keepbits7": spec(storage="keepbits7"),
        "spec int8": spec(storage="int8"),
        "spec causal8": spec(time_map="causal8"),
        "autoencoder": folder(tmp_path / "kl", KL, diffusers),
        "autoencoder with patch": folder(tmp_path / "patch", KL, diffusers, kind="autoencoder_kl", patch=4),
        "cosmos": folder(tmp_path / "cosmos", cosmos, diffusers),
        "siglip": folder(tmp_path / "siglip", vision, transformers),
        "pixels": folder(tmp_path / "pixels", None, "", kind="pixels", patch=16),
        "curation": corpus.curation_digest(),
        "clip": clip,
        "row": row_id(clip, View(0, 0, 64, 64, False)),
    }
    assert found == json.loads(PINNED.read_text())
