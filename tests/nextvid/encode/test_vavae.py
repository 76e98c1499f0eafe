"""The converter of VA-VAE against an independent implementation of its encoder and decoder (ldm.py): the same numbers,
strictness, and nothing executed. The published file is not needed."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nextvid.encode import vavae
from nextvid.encode.autoencoders import Autoencoder
from nextvid.encode.weights import facts
from storage.errors import ConfigError, ConflictError
from tests.nextvid.encode.ldm import LDM, randomised

WIDTHS = (8, 8, 12, 12, 16)
SMALL: dict[str, Any] = vavae.CONFIG | {"block_out_channels": WIDTHS, "norm_num_groups": 4}
# What is beside the autoencoder in the published file, by the training source.
EXTRA = {
    "foundation_model.model.blocks.0.weight": torch.ones(3),
    "linear_proj.weight": torch.ones(2),
    "loss.logvar": torch.zeros(1),
}
LIGHTNING = {
    "epoch": 3,
    "global_step": 7,
    "pytorch-lightning_version": "2.1.0",
    "loops": {},
    "callbacks": {},
    "optimizer_states": [],
    "lr_schedulers": [],
}


@pytest.fixture
def ldm(monkeypatch: pytest.MonkeyPatch) -> LDM:
    """A narrow model of the same topology, in place of the 70 M parameters of the real one."""
    monkeypatch.setattr(vavae, "CONFIG", SMALL)
    torch.manual_seed(0)
    return randomised(LDM(WIDTHS, groups=4))


def written(model: LDM, path: Path, wrapped: bool = False, **more: Any) -> Path:
    """The model's tensors in the published layout, with what else is in it."""
    state: dict[str, Any] = {**model.state_dict(), **EXTRA, **more}
    torch.save(LIGHTNING | {"state_dict": state} if wrapped else state, path)
    return path


def test_the_real_shape_has_the_published_tensors() -> None:
    """Names and shapes of all 342, from the independent implementation at its real widths."""
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        ours, theirs = AutoencoderKL(**vavae.CONFIG).state_dict(), LDM().state_dict()
    assert len(theirs) == vavae.TENSORS == 342
    assert sum(name.startswith(("encoder.down.4.attn", "decoder.up.4.attn")) for name in theirs) == 50
    assert "decoder.up.0.upsample.conv.weight" not in theirs  # the first level of LDM is the last of diffusers
    converted = {vavae.diffusers_name(name): value for name, value in theirs.items()}
    assert set(converted) == set(ours)
    for name, value in converted.items():
        matrix = ".attentions." in name and value.ndim == 4
        assert (value.shape[:2] if matrix else value.shape) == ours[name].shape, name
    assert sum(value.numel() for value in theirs.values()) == 69_836_067  # 28.4M and 41.4M, docs/method.md 8


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_moments_and_frames_are_those_of_the_independent_model(
    ldm: LDM, tmp_path: Path, wrapped: bool, dtype: torch.dtype, bound: float
) -> None:
    from diffusers import AutoencoderKL

    assert vavae.import_vavae(written(ldm, tmp_path / "v.pt", wrapped), tmp_path / "out") == vavae.TENSORS
    model = AutoencoderKL.from_pretrained(tmp_path / "out").to(dtype)
    ldm.to(dtype)
    generator = torch.Generator().manual_seed(1)
    frames = torch.rand((2, 3, 64, 48), generator=generator, dtype=dtype) * 2 - 1
    latents = torch.randn((2, 32, 4, 3), generator=generator, dtype=dtype)
    with torch.no_grad():
        moments, wanted = model.encode(frames).latent_dist.parameters, ldm.moments(frames)
        assert (moments - wanted).abs().max() < bound
        assert wanted.std() > 0.01  # something depends on the input
        pictures, wanted = model.decode(latents).sample, ldm.frames(latents)
        assert (pictures - wanted).abs().max() < bound
        assert wanted.std() > 0.01


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[LDM, Path]:
    """The published shape with random weights, and the folder that the command line made of it."""
    torch.manual_seed(0)
    model, folder = randomised(LDM()), tmp_path_factory.mktemp("published")
    checkpoint, out = written(model, folder / "vavae.ckpt", wrapped=True), folder / "vavae"
    command = [sys.executable, "-m", "nextvid", "import-vavae", str(checkpoint), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.stdout.startswith("342 tensors in"), done.stderr
    checkpoint.unlink()
    return model, out


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_at_its_real_width_a_published_file_gives_the_same_numbers(
    published: tuple[LDM, Path], dtype: torch.dtype, bound: float
) -> None:
    """70 M parameters, a small picture: attention in the lowest level looks at 4 x 3 cells."""
    from diffusers import AutoencoderKL

    ldm, folder = published[0].to(dtype), published[1]
    model = AutoencoderKL.from_pretrained(folder).to(dtype)
    assert sum(weights.numel() for weights in model.parameters()) == 69_836_067
    generator = torch.Generator().manual_seed(1)
    frames = torch.rand((1, 3, 64, 48), generator=generator, dtype=dtype) * 2 - 1
    latents = torch.randn((1, 32, 4, 3), generator=generator, dtype=dtype)
    with torch.inference_mode():
        moments, wanted = model.encode(frames).latent_dist.parameters, ldm.moments(frames)
        assert (moments - wanted).abs().max() < bound
        assert wanted.std() > 0.1
        pictures, wanted = model.decode(latents).sample, ldm.frames(latents)
        assert (pictures - wanted).abs().max() < bound
        assert wanted.std() > 0.1


def test_attention_in_the_lowest_level_matters(ldm: LDM) -> None:
    """Without it the numbers differ by far more than the bounds above: the comparison would see it missing."""
    frames = torch.rand((1, 3, 64, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = ldm.moments(frames)
        ldm.encoder.down[4].attn[1].proj_out.weight.zero_()  # type: ignore[union-attr, index]
        assert (ldm.moments(frames) - before).abs().max() > 1e-3


def test_the_adapter_reads_what_was_converted(ldm: LDM, tmp_path: Path) -> None:
    stats = {"mean": torch.randn(1, 32, 1, 1), "std": torch.rand(1, 32, 1, 1)}
    torch.save(stats, tmp_path / "stats.pt")
    vavae.import_vavae(written(ldm, tmp_path / "v.pt"), tmp_path / "out", tmp_path / "stats.pt")
    assert facts(tmp_path / "out")[1:3] == (32, 16)
    frames = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    got = Autoencoder.load(tmp_path / "out").encode(frames)
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        wanted = ldm.moments(pixels)[:, :32]
    np.testing.assert_allclose(got.latents, wanted.numpy(), atol=1e-4)  # raw: the statistics are kept, not applied


class TestStatistics:
    def test_are_kept_in_the_configuration(self, ldm: LDM, tmp_path: Path) -> None:
        import json

        stats = {"mean": torch.arange(32.0).reshape(1, 32, 1, 1), "std": torch.ones(1, 32, 1, 1)}
        torch.save(stats, tmp_path / "stats.pt")
        vavae.import_vavae(written(ldm, tmp_path / "v.pt"), tmp_path / "out", tmp_path / "stats.pt")
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["latents_mean"] == list(range(32))
        assert config["latents_std"] == [1.0] * 32

    @pytest.mark.parametrize(
        ("stats", "words"),
        [
            ({"mean": torch.zeros(1, 32, 1, 1)}, "'mean' and 'std'"),
            ({"mean": torch.zeros(1, 16, 1, 1), "std": torch.ones(1, 16, 1, 1)}, "16 means"),
            ({"mean": torch.zeros(1, 32, 1, 1), "std": torch.zeros(1, 32, 1, 1)}, "positive"),
            ({"mean": torch.full((1, 32, 1, 1), torch.nan), "std": torch.ones(1, 32, 1, 1)}, "finite"),
            ({"mean": 1.0, "std": 2.0}, "'mean' and 'std'"),
        ],
    )
    def test_others_are_refused(self, ldm: LDM, tmp_path: Path, stats: dict[str, Any], words: str) -> None:
        torch.save(stats, tmp_path / "stats.pt")
        with pytest.raises(ConfigError, match=words):
            vavae.import_vavae(written(ldm, tmp_path / "v.pt"), tmp_path / "out", tmp_path / "stats.pt")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        ("missing", "341 tensors"),
        ("shape", "do not fit"),
        ("extra", "343 tensors"),
        ("foreign", "ema_model.encoder.weight"),
        ("not a tensor", "no tensor"),
        ("wrapper", "surprise"),
    ],
)
def test_trap_18_another_model_is_refused(ldm: LDM, tmp_path: Path, spoil: str, words: str) -> None:
    state: dict[str, Any] = {**ldm.state_dict(), **EXTRA}
    around: dict[str, Any] = {}
    match spoil:
        case "missing":
            del state["encoder.down.4.attn.0.q.weight"]
        case "shape":
            state["encoder.conv_in.weight"] = torch.ones(9, 3, 3, 3)
        case "extra":
            state["encoder.down.5.block.0.conv1.weight"] = torch.ones(1)
        case "foreign":
            state["ema_model.encoder.weight"] = torch.ones(1)
        case "not a tensor":
            state["encoder.conv_in.weight"] = 3
        case "wrapper":
            around = {"surprise": 1}
    torch.save({"state_dict": state} | around, tmp_path / "v.pt")
    with pytest.raises(ConfigError, match=words):
        vavae.import_vavae(tmp_path / "v.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_hostile_pickle_runs_nothing_and_the_remedy_is_named(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"state_dict": Trap()}, tmp_path / "v.pt")
    with pytest.raises(ConfigError, match=r"runs code.*weights_only=False"):
        vavae.import_vavae(tmp_path / "v.pt", tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut off"])
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "v.pt").write_bytes(content)
    with pytest.raises(ConfigError, match=r"v\.pt"):
        vavae.import_vavae(tmp_path / "v.pt", tmp_path / "out")
    with pytest.raises(ConfigError, match="no such file"):
        vavae.import_vavae(tmp_path / "none.pt", tmp_path / "out")


def test_existing_folder_stays(ldm: LDM, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(ConflictError):
        vavae.import_vavae(written(ldm, tmp_path / "v.pt"), tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "x"
