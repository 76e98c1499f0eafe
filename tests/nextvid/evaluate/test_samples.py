"""The maker of samples end to end on a tiny run whose source files are gone."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image

from nextvid.config.overrides import apply_overrides
from nextvid.config.project import Project
from nextvid.evaluate.generate import reading_back
from nextvid.evaluate.samples import make_samples
from nextvid.evaluate.scene import CLIPS, choose_clips, open_scene
from nextvid.model.tokens import pixel_values, space_to_depth
from nextvid.train.run import find_run
from nextvid.trainset.trainset import Trainset
from storage.errors import RefusedError, UpstreamError
from tests.factories import flip, save_autoencoder
from tests.nextvid.tiny_project import FRAMES, RECIPE, write_pixel_project


def test_pictures_and_numbers_are_made_once(own_copy: Project) -> None:
    first, again = make_samples(own_copy, RECIPE), make_samples(own_copy, RECIPE)
    assert (first.made, again.made) == (True, False)
    assert first.numbers == again.numbers
    run = find_run(own_copy, RECIPE)
    folder = Path(own_copy.root.samples(RECIPE, run.id))
    said = json.loads((folder / "samples.json").read_text())
    assert (said["run"], said["trainset"]) == (run.id, run.trainset)
    assert set(said["masked"]) == {"short", "long"}
    assert set(said["autoregressive"]) == {"all_cells", "quarter_of_cells", "training_cells"}
    assert {clip["split"] for clip in said["clips"]} == {"test"}
    for found in (*said["masked"].values(), *said["autoregressive"].values()):
        assert np.isfinite(list(found.values())).all()
    for path in first.pictures.values():
        Image.open(path).verify()


def test_it_waits_for_a_gpu_that_is_held(own_copy: Project, refuse_to_share: Callable[..., None]) -> None:
    refuse_to_share(
        f"samples {RECIPE}", own_copy, lambda project, tell: make_samples(project, RECIPE, on_progress=tell)
    )


def test_copying_the_last_frame_misses_by_what_the_data_say(evaluated: Project) -> None:
    make_samples(evaluated, RECIPE)
    folder = Path(evaluated.root.samples(RECIPE, find_run(evaluated, RECIPE).id))
    said = json.loads((folder / "samples.json").read_text())
    # clips are one still picture plus independent noise of variance .09: copying misses by 2 * .09 either way
    for kind, name in (("masked", "short"), ("autoregressive", "all_cells")):
        assert said[kind][name]["copy_last_latent_mse"] == pytest.approx(0.18, abs=0.01)


def test_test_clips_come_first_and_ids_decide(evaluated: Project) -> None:
    trainset = Trainset.open(evaluated.root)
    rows = choose_clips(evaluated, trainset, FRAMES, most=40)
    assert rows["split"].to_list() == ["test"] * 30 + ["train"] * 10
    assert rows["row_id"].to_list()[:30] == sorted(rows["row_id"].to_list()[:30])
    assert choose_clips(evaluated, trainset, FRAMES).height == CLIPS
    with pytest.raises(UpstreamError, match="no clip of 64 frames"):
        choose_clips(evaluated, trainset, 64)


def test_trap_17_truth_is_the_autoencoder_s_reconstruction_of_stored_latents(evaluated: Project) -> None:
    run = find_run(evaluated, RECIPE)
    scene = open_scene(evaluated, run, Trainset.open(evaluated.root), "cpu")
    raw = scene.source.latents(scene.rows.head(1)).astype(np.float32)[0]
    np.testing.assert_allclose(scene.truth[0].astype(int), scene.autoencoder.decode(raw).astype(int), atol=1)


def test_encoders_of_pixels_see_the_reconstruction(evaluated: Project) -> None:
    """A scene as a recipe with other input and targets has it, 8 x 8 pixels a cell."""
    run = find_run(evaluated, RECIPE)
    scene = open_scene(evaluated, run, Trainset.open(evaluated.root), "cpu")
    reads = apply_overrides(run.recipe, ["model.encoder.input=pixels"])
    tokens = replace(scene, recipe=reads).tokens()
    assert tokens.shape == (CLIPS, 4 * 64, 2 * 8 * 8 * 3)
    corner = torch.from_numpy(scene.truth[3, 2:4, 8:16, 16:24]).float() / 127.5 - 1  # cell (1, 2) of tubelet 1
    torch.testing.assert_close(tokens[3, 64 + 8 + 2], rearrange(corner, "u y x c -> (c u y x)"))
    read_back = reading_back(reads.model, scene.decode)(scene.targets[:, :2])
    torch.testing.assert_close(read_back, tokens[:, :64], atol=2 / 255 + 1e-6, rtol=0)  # a byte, by another batch

    predicts = apply_overrides(reads, ["losses.target=pixels", "model.frame_channels=192"])
    pixels = space_to_depth(pixel_values(torch.from_numpy(scene.truth)), 8)
    assert np.array_equal(replace(scene, recipe=predicts).frames(pixels), scene.truth)


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides", [(), ("losses.target=pixels", f"model.frame_channels={3 * 8**2}")], ids=["latents out", "pixels out"]
)
def test_a_run_that_was_trained_on_pixels_generates(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    """Trained on rows of the pixel store; what it generates onward is given back to it as pixels."""
    project = write_pixel_project(tmp_path, overrides)
    outcome = make_samples(project, RECIPE)
    said = json.loads((Path(project.root.samples(RECIPE, str(outcome.run))) / "samples.json").read_text())
    assert set(said["masked"]) == {"short", "long"}
    assert set(said["autoregressive"]) == {"all_cells", "quarter_of_cells", "training_cells"}
    for found in (*said["masked"].values(), *said["autoregressive"].values()):
        assert np.isfinite(list(found.values())).all()
        assert found["psnr_db"] > 0
    for path in outcome.pictures.values():
        Image.open(path).verify()
    assert not make_samples(project, RECIPE).made


def test_targets_without_pictures_are_refused(evaluated: Project) -> None:
    run = find_run(evaluated, RECIPE)
    features = apply_overrides(run.recipe, ["model.encoder.input=pixels", "losses.target=siglip2"])
    with pytest.raises(RefusedError, match="predicts siglip2, which cannot be decoded"):
        open_scene(evaluated, replace(run, recipe=features), Trainset.open(evaluated.root), "cpu")


def test_another_autoencoder_is_refused(own_copy: Project) -> None:
    folder = Path(own_copy.corpus.encoding.autoencoder)
    config = json.loads((folder / "config.json").read_text())
    config["scaling_factor"] = 0.5
    (folder / "config.json").write_text(json.dumps(config))
    save = folder / "diffusion_pytorch_model.safetensors"
    flip(save)
    with pytest.raises(RefusedError, match="restore the weights"):
        open_scene(own_copy, find_run(own_copy, RECIPE), Trainset.open(own_copy.root), "cpu")
    save_autoencoder(folder)
