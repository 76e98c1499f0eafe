"""Autoencoders for these tests: random weights of the demo's family, and one that is exact arithmetic.

The exact one is an AutoencoderTiny whose convolutions hold a cosine transform: it keeps the lowest frequencies of every
8 x 8 patch, so that latents are known in closed form and decoded frames resemble their source, without any training.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from nextvid.config.project import Project
from storage import shard
from tests.factories import save_autoencoder
from tests.nextvid.encode.small_corpus import begin

PATCH = 8  # pixels a side of a patch, folded to depth by nextvid.json
KEPT = 5  # frequencies kept per axis and colour: 3 * 25 = 75 of 192 numbers
SCALE = 0.02  # latents stay where the decoder's tanh(x / 3) * 3 is linear to 1e-5


def cosine_basis() -> np.ndarray:
    """Orthonormal rows [3 * KEPT^2, 3 * PATCH^2], columns in pixel_unshuffle's order (colour, row, column)."""
    k, n = np.arange(PATCH)[:, None], np.arange(PATCH)[None]
    one = np.sqrt(2 / PATCH) * np.cos(np.pi * (n + 0.5) * k / PATCH)
    one[0] /= np.sqrt(2)
    two = np.einsum("ui,vj->uvij", one[:KEPT], one[:KEPT]).reshape(KEPT**2, PATCH**2)
    return np.kron(np.eye(3), two)


@pytest.fixture
def project(tmp_path: Path, cosine_autoencoder: Path) -> Project:
    """Three films and two stills, cut and not yet encoded."""
    return begin(tmp_path, cosine_autoencoder)


@pytest.fixture(scope="session")
def random_autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """AutoencoderKL of the demo's family with random weights: patch 4, f8, 8 channels."""
    return save_autoencoder(tmp_path_factory.mktemp("random_autoencoder"))


@pytest.fixture(scope="session")
def cosine_autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """AutoencoderTiny whose latents are SCALE times the low cosine coefficients of (pixel / 255 - 0.5)."""
    from diffusers import AutoencoderTiny

    basis = torch.from_numpy(cosine_basis()).float()
    kept, pixels = basis.shape
    model = AutoencoderTiny(
        in_channels=pixels,
        out_channels=pixels,
        encoder_block_out_channels=(kept,),
        decoder_block_out_channels=(2 * kept,),
        num_encoder_blocks=(0,),
        num_decoder_blocks=(0,),
        latent_channels=kept,
    )
    first_in, last_in = model.encoder.layers[0], model.encoder.layers[1]
    first_out, last_out = model.decoder.layers[0], model.decoder.layers[-1]
    with torch.no_grad():
        for weights in model.parameters():
            weights.zero_()
        first_in.weight[:, :, 1, 1] = SCALE * basis
        first_in.bias[:] = -0.5 * SCALE * basis.sum(1)
        last_in.weight[:, :, 1, 1] = torch.eye(kept)
        # positive and negative parts pass the rectifier in channels of their own
        first_out.weight[:, :, 1, 1] = torch.cat([torch.eye(kept), -torch.eye(kept)])
        last_out.weight[:, :, 1, 1] = torch.cat([basis, -basis]).T / SCALE
        last_out.bias[:] = 0.5
    folder = tmp_path_factory.mktemp("cosine_autoencoder")
    model.save_pretrained(folder)
    (folder / "nextvid.json").write_text(json.dumps({"kind": "autoencoder_tiny", "patch": PATCH}))
    return folder


def random_cosmos(folder: Path, over_time: int) -> Path:
    """AutoencoderKLCosmos, tiny, with a random encoder and a decoder that always says grey."""
    from diffusers import AutoencoderKLCosmos

    torch.manual_seed(0)
    model = AutoencoderKLCosmos(
        encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(),
        num_layers=1,
        latent_channels=4,
        resolution=64,
        temporal_compression_ratio=over_time,
        latents_mean=None,
        latents_std=None,
    )
    with torch.no_grad():
        for weights in model.decoder.conv_out.parameters():
            weights.zero_()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def cosmos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_cosmos(tmp_path_factory.mktemp("cosmos"), 4)


@pytest.fixture(scope="session")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SigLIP2's image encoder, tiny, patch 16 at 64 pixels."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=16
    )
    folder = tmp_path_factory.mktemp("siglip")
    SiglipVisionModel(config).save_pretrained(folder)
    return folder


@contextmanager
def shards_of_four() -> Iterator[None]:
    """Shards of four rows, so that small corpora have several. Indexes are remembered by their rows, so forgotten."""
    shard.index.cache_clear()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(shard, "ROWS_PER_SHARD", 4)
        patched.setattr(shard, "INDEX_BYTES", 16 * 4 + 4)
        yield
    shard.index.cache_clear()


@pytest.fixture
def small_shards() -> Iterator[None]:
    with shards_of_four():
        yield
