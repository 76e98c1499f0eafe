"""The maker of samples end to end on a tiny run whose source files are gone."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nextvid.corpus.project import Project
from nextvid.corpus.trainset import Trainset
from nextvid.probe.encoders import find_run
from nextvid.sample.samples import make_samples
from nextvid.sample.scene import CLIPS, choose_clips, open_scene
from storage.errors import RefusedError, UpstreamError
from tests.nextvid.tiny_project import FRAMES, RECIPE, save_autoencoder


def test_pictures_and_numbers_are_made_once(own_copy: Project) -> None:
    first, again = make_samples(own_copy, RECIPE), make_samples(own_copy, RECIPE)
    assert (first.made, again.made) == (True, False)
    assert first.numbers == again.numbers
    run = find_run(own_copy, RECIPE)
    folder = Path(own_copy.root.samples(RECIPE, run.id))
    said = json.loads((folder / "samples.json").read_text())
    assert (said["run"], said["trainset"]) == (run.id, run.trainset)
    assert set(said["masked"]) == {"short", "long"}
    assert set(said["autoregressive"]) == {"all_cells", "training_cells"}
    assert {clip["split"] for clip in said["clips"]} == {"test"}
    for found in (*said["masked"].values(), *said["autoregressive"].values()):
        assert np.isfinite(list(found.values())).all()
    for path in first.pictures.values():
        Image.open(path).verify()


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


def test_another_autoencoder_is_refused(own_copy: Project) -> None:
    folder = Path(own_copy.corpus.encoding.autoencoder)
    config = json.loads((folder / "config.json").read_text())
    config["scaling_factor"] = 0.5
    (folder / "config.json").write_text(json.dumps(config))
    save = folder / "diffusion_pytorch_model.safetensors"
    data = bytearray(save.read_bytes())
    data[-1] ^= 1
    save.write_bytes(data)
    with pytest.raises(RefusedError, match="put the old weights back"):
        open_scene(own_copy, find_run(own_copy, RECIPE), Trainset.open(own_copy.root), "cpu")
    save_autoencoder(folder)
