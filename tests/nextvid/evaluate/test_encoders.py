"""Encoders of others: features as their own library gives them, on their own grid; and what is refused before that."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from safetensors.torch import load_file, save_file

from nextvid.config.benchmarks import Family, FinetuneConfig, ProbedEncoderConfig
from nextvid.config.project import Project, open_project
from nextvid.config.strict import parse
from nextvid.evaluate.attentive import ProbeSettings
from nextvid.evaluate.encoders import IMAGENET, encoder_digest, frames_of, load_encoder, shape_of
from nextvid.evaluate.features import FrozenEncoder, level_blocks
from nextvid.evaluate.finetune import Tuned, Tuning, optimiser_of
from nextvid.evaluate.probes import plan_encoder
from nextvid.lineage.trace import trace
from nextvid.train.checkpoint import Identity
from storage.errors import ConfigError, RefusedError
from storage.spec import EncodingSpec
from tests.factories import edit_project
from tests.nextvid.tiny_project import probe
from tests.nextvid.train.pixel_corpus import ask_for_pixels, write_pixels

SIDE, FRAMES, PATCHES = 32, 8, 4
SPEC = EncodingSpec("0" * 32, SIDE, "bicubic", "fp32", "mean", "float16", 16, 4, 4)
SMALL: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2}
CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Family, Path]:
    """Tiny encoders with random weights, as transformers saves them; the masked ones with their decoders."""
    import transformers as tf

    torch.manual_seed(0)
    grid = SMALL | {"intermediate_size": 64, "image_size": SIDE, "patch_size": 16}
    decoder = {"decoder_hidden_size": 24, "decoder_num_attention_heads": 2, "decoder_num_hidden_layers": 1}
    models: dict[Family, Any] = {
        "vjepa2": tf.VJEPA2Model(
            tf.VJEPA2Config(
                **SMALL, crop_size=SIDE, patch_size=16, pred_hidden_size=24, pred_num_attention_heads=2,
                pred_num_hidden_layers=1, frames_per_clip=FRAMES,
            )
        ),
        "dinov2": tf.Dinov2Model(tf.Dinov2Config(**SMALL, image_size=56, patch_size=14)),
        "dinov3": tf.DINOv3ViTModel(tf.DINOv3ViTConfig(**grid, num_register_tokens=3)),
        "videomae": tf.VideoMAEForPreTraining(
            tf.VideoMAEConfig(**grid, **decoder, num_frames=4, decoder_intermediate_size=32, use_mean_pooling=False)
        ),
        "vit_mae": tf.ViTMAEForPreTraining(tf.ViTMAEConfig(**grid, **decoder, decoder_intermediate_size=32)),
    }  # fmt: skip
    found: dict[Family, Path] = {}
    for family, model in models.items():
        found[family] = tmp_path_factory.mktemp(family)
        model.save_pretrained(found[family])
    return found


def clips(side: int = SIDE, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, FRAMES, side, side, 3), dtype=torch.uint8, generator=generator)


def load(folder: Path, family: Family, levels: int = 1, frames: int = FRAMES) -> FrozenEncoder:
    config = ProbedEncoderConfig(family=family, folder=str(folder))
    return load_encoder("x", config, frames, SPEC, levels, CPU)


def by_the_library(folder: Path, family: Family, frames: torch.Tensor) -> torch.Tensor:
    """Patch features of clips, by transformers alone."""
    import transformers as tf

    mean, std = (torch.tensor(values)[:, None, None] for values in IMAGENET)
    pixels = (rearrange(frames, "b f h w c -> b f c h w") / 255 - mean) / std
    flat = rearrange(pixels, "b f c h w -> (b f) c h w")
    with torch.no_grad():
        match family:
            case "vjepa2":
                return tf.VJEPA2Model.from_pretrained(folder).eval().get_vision_features(pixels)
            case "dinov2":
                cropped = torch.nn.functional.interpolate(
                    rearrange(frames, "b f h w c -> (b f) c h w") / 255, (28, 28), mode="bicubic", antialias=True
                ).clamp(0, 1)
                found = tf.Dinov2Model.from_pretrained(folder).eval()((cropped - mean) / std).last_hidden_state[:, 1:]
            case "dinov3":
                found = tf.DINOv3ViTModel.from_pretrained(folder).eval()(flat).last_hidden_state[:, 4:]
            case "videomae":
                model = tf.VideoMAEModel.from_pretrained(folder).eval()
                return torch.cat([model(half).last_hidden_state for half in pixels.split(4, dim=1)], dim=1)
            case _:
                model = tf.ViTMAEModel.from_pretrained(folder, mask_ratio=0.0).eval()
                out = model(flat)  # in an order drawn anew
                found = torch.stack([x[1:][order] for x, order in zip(out[0], out.ids_restore, strict=True)])
    return rearrange(found, "(b f) n d -> b (f n) d", b=len(frames))


@pytest.mark.parametrize("family", ["vjepa2", "dinov2", "dinov3", "videomae", "vit_mae"])
def test_features_are_those_of_the_library(folders: dict[Family, Path], family: Family) -> None:
    encoder, given = load(folders[family], family), clips()
    found = encoder.encode(given)
    torch.testing.assert_close(found, by_the_library(folders[family], family, given), rtol=1e-4, atol=1e-5)
    assert found.shape == (2, encoder.times * PATCHES, encoder.width)
    assert (encoder.reads, encoder.width) == ("pixels", 48)
    torch.testing.assert_close(encoder.encode(given[:1])[0], found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["vjepa2", "dinov3", "videomae", "vit_mae"])
def test_levels_follow_one_another_and_the_last_is_the_encoder_s_output(
    folders: dict[Family, Path], family: Family
) -> None:
    given, last = clips(), load(folders[family], family).encode(clips())
    found = load(folders[family], family, levels=2).encode(given)
    assert found.shape[1] == 2 * last.shape[1]
    torch.testing.assert_close(found[:, last.shape[1] :], last)
    assert not torch.allclose(found[:, : last.shape[1]], last, atol=1e-2)


def test_other_sides_are_resized_to_the_encoder_s_own(folders: dict[Family, Path]) -> None:
    flat = torch.full((1, FRAMES, 2 * SIDE, 2 * SIDE, 3), 200, dtype=torch.uint8)
    for family in ("vjepa2", "vit_mae"):
        encoder = load(folders[family], family)
        torch.testing.assert_close(encoder.encode(flat), encoder.encode(flat[:, :, :SIDE, :SIDE]), rtol=1e-3, atol=1e-4)


def test_a_folder_s_own_statistics_are_used(folders: dict[Family, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["dinov3"], tmp_path, dirs_exist_ok=True)
    said = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    config = ProbedEncoderConfig(family="dinov3", folder=str(tmp_path))
    assert shape_of(config).mean == (0.5, 0.5, 0.5)
    assert encoder_digest(config) != encoder_digest(config.model_copy(update={"folder": str(folders["dinov3"])}))
    moved = shutil.copytree(tmp_path, tmp_path / "moved")
    assert encoder_digest(config.model_copy(update={"folder": str(moved)})) == encoder_digest(config), "not the path"
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5]}))
    with pytest.raises(ConfigError, match="are not three numbers each"):
        shape_of(config)


def test_floors_are_mean_colours_and_the_stored_latents() -> None:
    given = clips()
    colours = load_encoder("x", ProbedEncoderConfig(family="pixels"), FRAMES, SPEC, 1, CPU).encode(given)
    assert colours.shape == (2, FRAMES, 48)
    corner = given[1, 3, :8, 24:].float().mean(dim=(0, 1)) / 127.5 - 1
    torch.testing.assert_close(colours[1, 3, 3 * 3 : 4 * 3], corner)
    latents = torch.randn(2, FRAMES, 16, 4, 4)
    floor = load_encoder("x", ProbedEncoderConfig(family="latents"), FRAMES, SPEC, 1, CPU)
    torch.testing.assert_close(floor.encode(latents)[1, 16 + 5], latents[1, 1, :, 1, 1])
    assert (floor.reads, floor.width, floor.times) == ("latents", 16, FRAMES)


def test_blocks_of_levels_are_v_jepa_2_s() -> None:
    """docs/method.md 9."""
    assert level_blocks(24, 4) == (17, 19, 21, 23)
    assert level_blocks(32, 4) == (19, 23, 27, 31)
    assert level_blocks(40, 4) == (24, 29, 34, 39)
    assert level_blocks(4, 4) == (0, 1, 2, 3)
    assert level_blocks(12, 1) == (11,)
    with pytest.raises(RefusedError, match="reads 4 levels of an encoder that has 3 blocks"):
        level_blocks(3, 4)


@pytest.mark.parametrize("family", ["vjepa2", "dinov2", "dinov3", "videomae", "vit_mae"])
def test_fine_tuning_reaches_every_layer(folders: dict[Family, Path], family: Family, tmp_path: Path) -> None:
    """Rates have a level for each block, gradients reach all that features depend on, and a skipped block has none."""
    encoder, samples = load(folders[family], family), np.arange(2)
    assert encoder.parts is not None
    tuned = Tuned(encoder, 2, seed=0)
    tuned.head.weight.data.normal_()
    config, settings = FinetuneConfig(layer_decay=0.5, drop_path=0.9), ProbeSettings(epochs=1, batch=2)
    tuning = Tuning(tuned, encoder, config, settings, samples, samples, tmp_path, Identity("", "", "", ""), CPU)
    blocks = encoder.parts.module.get_submodule(encoder.parts.blocks)
    scales = {group["scale"] for group in optimiser_of(tuned, encoder.parts, config, 0.05).param_groups}
    assert scales == {0.5**layer for layer in range(len([*blocks.children()]) + 2)}
    tuning._kept = torch.tensor([[1.0, 1.0, 0.0, 1.0]] * 2)
    tuned(clips()).square().sum().backward()
    moved = {
        name for name, parameter in tuned.named_parameters() if parameter.grad is not None and parameter.grad.any()
    }
    for number in range(4):
        reached = any(name.startswith(f"encoder.{encoder.parts.blocks}.{number}.") for name in moved)
        assert reached == (number != 2), number
    assert any("embed" in name for name in moved)
    assert {"norm.weight", "head.bias"} <= moved
    tuning._kept = None
    before = tuned(clips())
    assert tuning.losses(clips(), samples[None], epoch=0).detach() > 0
    torch.testing.assert_close(tuned(clips()), before)


def test_clips_that_do_not_fit_are_refused(folders: dict[Family, Path]) -> None:
    def frames(family: Family, count: int, levels: int = 1) -> int:
        return frames_of(ProbedEncoderConfig(family=family, folder=str(folders[family])), count, levels)

    assert (frames("videomae", 1), frames("vjepa2", 1), frames("dinov2", 1)) == (4, 16, 1), "of an image"
    assert (frames("videomae", 8), frames("vjepa2", 6), frames("dinov2", 7)) == (8, 6, 7)
    with pytest.raises(RefusedError, match="clips of 6 frames are no multiple of the 4"):
        frames("videomae", 6)
    with pytest.raises(RefusedError, match="reads 5 levels of an encoder that has 4 blocks"):
        frames("vit_mae", 8, levels=5)
    with pytest.raises(RefusedError, match="'pixels' has one"):
        frames_of(ProbedEncoderConfig(family="pixels"), 8, 4)


def test_folders_that_are_not_what_corpus_yaml_says_are_refused(folders: dict[Family, Path], tmp_path: Path) -> None:
    def refused(folder: Path, family: Family, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            encoder_digest(ProbedEncoderConfig(family=family, folder=str(folder)))

    refused(folders["dinov2"], "vjepa2", "holds a 'dinov2', not family 'vjepa2'")
    refused(tmp_path / "none", "vjepa2", r"no config\.json")
    folder = shutil.copytree(folders["vit_mae"], tmp_path / "mae")
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | {"hidden_size": 64}))
    with pytest.raises(ConfigError, match=r"weights do not fit|cannot load this encoder"):
        load(folder, "vit_mae")
    (folder / "config.json").write_text(json.dumps(said | {"patch_size": "16"}))
    refused(folder, "vit_mae", "'patch_size' is '16', a number was expected")
    (folder / "config.json").write_text(json.dumps(said))
    weights = load_file(folder / "model.safetensors")
    del weights[next(name for name in weights if name.startswith("vit.layers.1") or "layer.1." in name)]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match="1 tensors missing"):
        load(folder, "vit_mae")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "vit_mae", "safetensors only, never from a pickle")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    refused(folder, "vit_mae", "which is no file of its folder")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"family": "vjepa"}, "'family': Input should be"),
        ({"family": "vjepa2"}, "family 'vjepa2' needs a 'folder'"),
        ({"family": "latents", "folder": "x"}, "has no folder: leave it out"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(ProbedEncoderConfig, values, "corpus.yaml")


@pytest.fixture(scope="module")
def probed(evaluated: Project, tmp_path_factory: pytest.TempPathFactory, folders: dict[Family, Path]) -> Project:
    """A project with pixels whose corpus.yaml names encoders; its benchmark is short."""
    base, folder = evaluated.path.parent, tmp_path_factory.mktemp("probed")
    ignored = shutil.ignore_patterns("probes", "samples", "report", "pretrain")
    shutil.copytree(base, folder, dirs_exist_ok=True, ignore=ignored)
    path = folder / "corpus.yaml"
    path.write_text(path.read_text().replace(str(base), str(folder)))
    project = ask_for_pixels(open_project(path))
    write_pixels(project)
    encoders = {
        "control": {"family": "vit_mae", "folder": str(folders["vit_mae"])},
        "colours": {"family": "pixels"},
        "stored": {"family": "latents"},
    }

    def named(said: dict[str, Any]) -> None:
        said["encoders"] = encoders
        said["benchmarks"]["species"] |= {
            "epochs": 6, "limit": 30, "seeds": 1, "batch": 4, "sweep": [{"rates": [3e-3], "weight_decays": [0.05]}],
        }  # fmt: skip

    return edit_project(project.path, named)


def test_encoders_are_scored_as_a_run_is_on_the_same_clips(probed: Project) -> None:
    scores = {}
    for name in probed.corpus.encoders:
        outcome = probe(probed, name)
        assert (outcome.partition, outcome.run, outcome.made) == (name, None, True)
        scores[name] = json.loads(Path(str(outcome.numbers["species_score"])).read_text())
        assert not probe(probed, name).made
    assert {name: list(score["encoders"]) for name, score in scores.items()} == {name: [name] for name in scores}
    assert scores["stored"]["encoders"]["stored"]["accuracy"] > 0.9, "the classes differ in a channel of the latents"
    found = trace(probed, str(outcome.numbers["species_score"]))
    assert (found.kind, found.runs, found.scores[0].recipe) == ("score", (), "stored")
    assert scores["control"]["settings"]["augment"] == "video"
    assert scores["stored"]["settings"]["augment"] == "none"
    assert scores["control"]["clips"] == scores["stored"]["clips"]
    with np.load(Path(str(outcome.numbers["species_score"])).with_name("features.npz")) as kept:
        assert kept["stored"].shape[1] == 16


def test_an_encoder_of_pixels_is_fine_tuned_on_varied_clips(probed: Project) -> None:
    def change(said: dict[str, Any]) -> None:
        said["benchmarks"]["species"] |= {"epochs": 1, "finetune": {}, "held_out": 0.0}

    project = edit_project(Path(shutil.copy(probed.path, probed.path.with_name("tuned.yaml"))), change)
    found = json.loads(Path(str(probe(project, "control").numbers["species_score"])).read_text())
    assert (found["settings"]["augment"], found["clips"]["held_out"]) == ("video", 0)
    assert 0 <= found["encoders"]["control"]["accuracy"] <= 1


def test_rows_without_pixels_and_heads_that_do_not_fit_are_refused(evaluated: Project, probed: Project) -> None:
    asked = edit_project(probed.path, lambda said: said["benchmarks"]["species"].update(attention_heads=5))
    with pytest.raises(RefusedError, match="5 heads of attention cannot share an encoder's width of 48"):
        plan_encoder(asked, "species", "colours")
    without = evaluated.corpus.model_copy(update={"encoders": probed.corpus.encoders})
    project = Project(without, evaluated.root, evaluated.path, without)
    with pytest.raises(RefusedError, match="reads pixels, and the rows of benchmark 'species' have none"):
        plan_encoder(project, "species", "colours")
    with pytest.raises(ConfigError, match="'colours' is no recipe but an encoder"):
        project.recipe("colours")
