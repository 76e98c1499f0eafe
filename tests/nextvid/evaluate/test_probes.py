"""The maker of probes end to end on a tiny run: what is asked, what is written, and that it is written once."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
import yaml

from nextvid.config.accepted import accept
from nextvid.config.project import Project, open_project
from nextvid.evaluate import probes
from nextvid.evaluate.features import LatentSource, encode, features, load_networks
from nextvid.evaluate.probes import make_probes, plan_task, standard_error
from nextvid.model.reference import reference_features
from nextvid.model.tokens import latent_tokens
from nextvid.train.run import find_run
from nextvid.trainset.trainset import Trainset
from storage.errors import ConfigError, UpstreamError
from storage.reader import read_row
from storage.schemas import Labels, ProbeRows
from storage.store import LatentStore
from storage.tables import read_table, write_table
from tests.nextvid.tiny_project import FRAMES, RECIPE


def test_scores_are_written_once_with_their_sources(own_copy: Project) -> None:
    first = make_probes(own_copy, RECIPE)
    assert first.made
    again = make_probes(own_copy, RECIPE)
    assert not again.made
    assert again.numbers == first.numbers
    run = find_run(own_copy, RECIPE)
    assert (first.run, first.rows) == (run.id, 30)
    folder = Path(own_copy.root.probe(RECIPE, run.id, "species", plan_task(own_copy, "species", run).digest()))
    assert first.numbers["species_score"] == str(folder / "score.json")
    score = json.loads((folder / "score.json").read_text())
    assert (score["run"], score["trainset"], score["mask_plan"]) == (run.id, run.trainset, run.mask_plan)
    assert score["clips"] == {"train": 60, "held_out": score["clips"]["held_out"], "test": 30}
    assert score["chance"] == 0.5
    assert set(score["encoders"]) == {"ema", "online", "random"}
    for found in score["encoders"].values():
        assert found["accuracy"] > 0.85  # the signal is there for any encoder
        assert found["accuracy"] == pytest.approx(np.mean(found["by_seed"]))
        assert len(found["by_seed"]) == 2
        assert found["standard_error"] == standard_error(found["accuracy"], 30)
    rows = read_table(str(folder / "rows.parquet"), ProbeRows)
    assert rows.filter(pl.col("split") == "test").height == 30
    with np.load(folder / "features.npz", allow_pickle=False) as kept:
        assert kept["ema"].shape == (30, 32)
        assert kept["labels"].shape == (30,)


def test_it_waits_for_a_gpu_that_is_held(own_copy: Project, refuse_to_share: Callable[..., None]) -> None:
    refuse_to_share(f"probes {RECIPE}", own_copy, lambda project, tell: make_probes(project, RECIPE, on_progress=tell))


def test_trap_31_features_are_the_reference_encoder_s_view_of_the_whole_clip(evaluated: Project) -> None:
    """Trap 31 of docs/method.md 13: final norm, frame-causal, every cell, one token after the other."""
    task = plan_task(evaluated, "species", find_run(evaluated, RECIPE))
    networks = load_networks(task.run)
    rows = task.rows.part("test").head(5)
    source = LatentSource(evaluated.root, task.trainset, task.run.recipe, ["pets.000000"], FRAMES)
    found = features(networks.encoders["ema"], task.run.recipe, source, rows)
    cells, tubelet = task.run.recipe.model.cells, task.run.recipe.model.tubelet
    assert found.shape == (5, FRAMES // tubelet * cells, 32)
    store = LatentStore(evaluated.root, task.trainset.spec)
    plain = [read_row(store, r["batch"], r["frames"], r["part"], r["slot"]) for r in rows.iter_rows(named=True)]
    tokens = latent_tokens(torch.from_numpy(np.stack(plain)).float(), tubelet)
    expected = reference_features(networks.encoders["ema"], tokens, target_norm=False)
    torch.testing.assert_close(torch.from_numpy(found[:, cells:]), expected, rtol=1e-4, atol=1e-5)


def test_trap_31_segments_stand_one_after_the_other(evaluated: Project) -> None:
    task = plan_task(evaluated, "species", find_run(evaluated, RECIPE))
    encoder = load_networks(task.run).encoders["ema"]
    source = LatentSource(evaluated.root, task.trainset, task.run.recipe, ["pets.000000"], FRAMES)
    rows = task.rows.part("test").head(4)
    single = features(encoder, task.run.recipe, source, rows)
    paired = features(encoder, task.run.recipe, source, rows, segments=2)
    assert paired.shape == (2, 2 * single.shape[1], 32)
    np.testing.assert_array_equal(paired[1, single.shape[1] :], single[3])


def test_trap_31_features_do_not_see_the_future(evaluated: Project) -> None:
    task = plan_task(evaluated, "species", find_run(evaluated, RECIPE))
    networks = load_networks(task.run)
    source = LatentSource(evaluated.root, task.trainset, task.run.recipe, ["pets.000000"], FRAMES)
    inputs = source.inputs(task.rows.part("test").head(2))
    changed = inputs.clone()
    changed[:, 4:] = 0
    tubelet = task.run.recipe.model.tubelet
    before, after = (
        encode(networks.encoders["ema"], task.run.recipe, latent_tokens(x, tubelet)) for x in (inputs, changed)
    )
    half = 2 * task.run.recipe.model.cells
    assert torch.equal(before[:, :half], after[:, :half])
    assert not torch.allclose(before[:, half:], after[:, half:])


def test_images_are_repeated_and_normalised(evaluated: Project) -> None:
    trainset = Trainset.open(evaluated.root)
    trainset.mean = trainset.mean + 2
    trainset.std = trainset.std * 4
    run = find_run(evaluated, RECIPE)
    commits = LatentStore(evaluated.root, trainset.spec).commits("stills.000000")
    source = LatentSource(evaluated.root, trainset, run.recipe, ["stills.000000"], FRAMES)
    raw, inputs = source.latents(commits), source.inputs(commits)
    assert raw.shape[1] == FRAMES
    assert (raw == raw[:, :1]).all()
    np.testing.assert_allclose(inputs.numpy(), (raw.astype(np.float32) - 2) / 4, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(source.pictures(inputs), raw.astype(np.float32), rtol=1e-3, atol=1e-3)


def test_the_three_encoders_are_what_they_are_called(evaluated: Project) -> None:
    run = find_run(evaluated, RECIPE)
    networks = load_networks(run)
    random, ema, online = (networks.encoders[name].embed.weight for name in ("random", "ema", "online"))
    assert not torch.equal(online, random)
    assert not torch.equal(ema, online)
    assert torch.equal(load_networks(run).encoders["random"].embed.weight, random)
    # after 5 steps of momentum .99 the average has hardly left the start
    assert (ema - random).norm() < 0.2 * (online - random).norm()


def test_chosen_rate_follows_the_held_out_clips(evaluated: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Test clips must not choose: the rate that is best on held-out clips stands, whatever test says."""
    task = plan_task(evaluated, "species", find_run(evaluated, RECIPE))
    answers = iter([np.array([[0.2, 0.9], [0.4, 0.5]]), np.array([[1.0, 0.1], [1.0, 0.3]])])
    monkeypatch.setattr(probes, "accuracies", lambda *_: next(answers))
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(60, 4, 32)).astype(np.float32), rng.normal(size=(30, 4, 32)).astype(np.float32)
    found = probes.score_encoder(train, test, task)
    assert found["rate"] == task.settings.rates[1]
    assert found["by_seed"] == [0.1, 0.3]


def test_other_settings_are_another_score(evaluated: Project) -> None:
    task = plan_task(evaluated, "species", find_run(evaluated, RECIPE))
    config = task.config.model_copy(update={"seeds": 3})
    assert probes.Task(task.run, task.trainset, config, task.settings, task.rows).digest() != task.digest()


def test_a_benchmark_edited_and_not_accepted_is_scored_under_the_accepted_policy(own_copy: Project) -> None:
    accepted = plan_task(own_copy, "species", find_run(own_copy, RECIPE))
    accept(own_copy.root, own_copy.asked, accepted.trainset.spec.digest(), {})
    content = yaml.safe_load(own_copy.path.read_text())
    content["benchmarks"]["species"]["policy"] |= {"frames": FRAMES // 2, "crop": "centre"}
    content["benchmarks"]["sizes"] = content["benchmarks"]["species"]
    own_copy.path.write_text(yaml.safe_dump(content))
    edited = open_project(own_copy.path)
    assert plan_task(edited, "species", find_run(edited, RECIPE)).digest() == accepted.digest()
    with pytest.raises(ConfigError, match="'sizes' is not accepted yet"):
        make_probes(edited, RECIPE, benchmarks=["sizes"])
    assert plan_task(edited.as_asked(), "species", find_run(edited.as_asked(), RECIPE)).digest() != accepted.digest()


def test_unknown_benchmark_and_unfinished_run(own_copy: Project) -> None:
    with pytest.raises(ConfigError, match="known: species"):
        make_probes(own_copy, RECIPE, benchmarks=["colours"])
    with pytest.raises(UpstreamError, match="no such run"):
        make_probes(own_copy, RECIPE, run="0123456789ab")
    run = find_run(own_copy, RECIPE)
    for checkpoint in run.checkpoints.iterdir():
        (checkpoint / "state.json").unlink()
    with pytest.raises(ConfigError, match=f"run {run.id} is of recipe {RECIPE}, not of nextvid_l"):
        make_probes(own_copy, "nextvid_l", run=run.id)
    with pytest.raises(UpstreamError, match="recipe nextvid_l has no complete run without overrides"):
        make_probes(own_copy, "nextvid_l")
    with pytest.raises(UpstreamError, match="0 of 5 steps"):
        make_probes(own_copy, RECIPE)


def test_a_benchmark_without_labels_says_what_was_left_out(own_copy: Project) -> None:
    write_table(own_copy.root.table("labels", "pets.000000"), Labels.create_empty(), Labels)
    with pytest.raises(UpstreamError, match="'unlabelled': 90"):
        make_probes(own_copy, RECIPE)
