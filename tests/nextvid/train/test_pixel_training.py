"""Recipes that read pixels train for real: whole runs, resumption, export, probes' encoders, and what is refused."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import nextvid
from nextvid.config.overrides import apply_overrides
from nextvid.config.project import Project
from nextvid.config.recipe import RecipeConfig
from nextvid.model.tokens import pixel_tokens, pixel_values
from nextvid.train import checkpoint
from nextvid.train.events import read_events
from nextvid.train.loop import train
from nextvid.train.pretrain import prepare_run
from nextvid.train.run import Run, open_run, run_id
from nextvid.train.step import build_model
from nextvid.trainset.mask_plan import make_plan
from nextvid.trainset.pixels import freeze_pixels
from nextvid.trainset.trainset import Trainset
from storage.errors import RefusedError, UpstreamError
from tests.nextvid.train.corpus import begin as begin_run
from tests.nextvid.train.corpus import make_project, tiny_spec
from tests.nextvid.train.pixel_corpus import ask_for_pixels, write_pixels
from tests.nextvid.train.test_loop import _train_until, tensors
from tests.nextvid.train.test_pixel_rows import (
    PIXELS_IN,
    PIXELS_OUT,
    _loader,
    make_pixel_project,
    pixel_recipe,
    pixels_of,
)
from tests.nextvid.train.tiny import ALONE, HOW, latents_of, tiny_recipe

pytestmark = pytest.mark.usefixtures("one_thread")


def begin(project: Project, recipe: RecipeConfig, how: Any = HOW) -> Run:
    """A run that reads the trainset's pixels."""
    return begin_run(project, recipe, how, pixels=freeze_pixels(project, Trainset.open(project.root), recipe).digest)


@pytest.mark.parametrize(
    "overrides",
    [PIXELS_IN, PIXELS_OUT, (*PIXELS_IN, "losses.target=siglip2")],
    ids=["latents out", "pixels out", "features out"],
)
def test_a_whole_run_of_pixels(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    """All four stages, two clip lengths, both losses; and the export reads frames."""
    project = make_pixel_project(tmp_path)
    run = begin(project, pixel_recipe(overrides))
    train(project, run, ALONE)
    assert run.complete
    events = read_events(run.folder)
    steps = [event for event in events if event["kind"] == "step"]
    assert [event["step"] for event in steps] == list(range(1, 13))
    assert set(steps[0]["loss"]) == {"align/short", "align/long", "flow/short", "flow/long"}
    before, after = build_model(run.recipe).state_dict(), checkpoint.path_at(run.checkpoints, 12) / "model.safetensors"
    assert all(not torch.equal(before[name], v) for name, v in checkpoint.load_tensors(after).items() if v.ndim > 1)
    assert [event["effective_rank"] > 1 for event in events if event["kind"] == "diagnostics"] == [True] * 4
    frames = torch.randint(0, 256, (2, 8, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    encoder = nextvid.load_encoder(run.folder / "encoder")
    reference = build_model(run.recipe).encoder
    held = checkpoint.load_tensors(checkpoint.path_at(run.checkpoints, 12) / "ema.safetensors")
    reference.load_state_dict(held)
    with torch.no_grad():
        wanted = reference(pixel_tokens(pixel_values(frames), 8, 2), 4)
    torch.testing.assert_close(encoder(frames), wanted)


def test_pixels_in_and_latents_over_time_out(tmp_path: Path) -> None:
    """As with Cosmos (Tab. 3): a frame's target is the latent that covers it, its input is its own pixels."""
    project = ask_for_pixels(make_project(tmp_path, spec=replace(tiny_spec(), time_map="causal4")))
    write_pixels(project)
    run = begin(project, pixel_recipe((*PIXELS_IN, "losses.target=cosmos")))
    with _loader(project, run.recipe) as loader:
        batch = next(iter(loader.batches(0, 1)))
    clips = [n for n in range(len(batch.draws)) if not torch.equal(pixels_of(batch)[n, 1], pixels_of(batch)[n, 2])]
    assert clips, "the first batch has images alone"
    for number in clips:
        first, *others = latents_of(batch)[number]
        assert all(torch.equal(latent, others[0]) for latent in others)  # frames 1 to 4 have one latent
        assert not torch.equal(first, others[0])
    train(project, run, ALONE)
    assert run.complete
    steps = [event for event in read_events(run.folder) if event["kind"] == "step"]
    assert len(steps) == 12
    assert all(math.isfinite(value) for event in steps for value in event["loss"].values())


def test_resuming_is_bit_equal_to_never_having_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    often = HOW.model_copy(update={"checkpoint_every_steps": 1})
    (tmp_path / "whole").mkdir()
    (tmp_path / "broken").mkdir()
    whole, broken = make_pixel_project(tmp_path / "whole"), make_pixel_project(tmp_path / "broken")
    uninterrupted, resumed = begin(whole, pixel_recipe()), begin(broken, pixel_recipe(), often)
    assert uninterrupted.id == resumed.id
    train(whole, uninterrupted, ALONE)
    _train_until(monkeypatch, 7, broken, resumed)
    assert resumed.newest_step() == 7
    train(broken, resumed, ALONE)
    ours, theirs = tensors(resumed, 12), tensors(uninterrupted, 12)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_training_needs_no_video_and_no_latents_where_it_reads_none(tmp_path: Path) -> None:
    """Pixels in and out: with every latent gone it trains all the same."""
    project = make_pixel_project(tmp_path)
    run = begin(project, pixel_recipe(PIXELS_OUT))
    for shard in Path(project.root.folder("latents")).rglob("latent/c.0.0.0.0.0"):
        shard.unlink()
    train(project, run, ALONE)
    assert run.complete


class TestRun:
    def test_the_run_id_says_which_pixels(self, tmp_path: Path) -> None:
        """Other pixels make another run; for a recipe of latents nothing changed."""
        recipe = pixel_recipe()
        ids = {run_id(recipe, "a" * 32, "b" * 32, 0, pixels) for pixels in (None, "c" * 32, "d" * 32)}
        assert len(ids) == 3
        project = make_pixel_project(tmp_path)
        run = begin(project, recipe)
        assert open_run(run.folder) == run
        assert run.pixels is not None

    def test_prepare_run_freezes_the_pixels_and_names_them(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        project = make_pixel_project(tmp_path)
        monkeypatch.setattr("nextvid.config.project.recipe_by_name", lambda name, _: tiny_recipe(name))
        prepared = prepare_run(project, "tiny", PIXELS_IN, HOW)
        recipe = apply_overrides(tiny_recipe(), PIXELS_IN)
        assert (
            open_run(Path(prepared.folder)).pixels == freeze_pixels(project, Trainset.open(project.root), recipe).digest
        )
        assert prepare_run(project, "tiny", PIXELS_IN, HOW).run_id == prepared.run_id
        assert open_run(Path(prepare_run(project, "tiny", [], HOW).folder)).pixels is None
        better = ask_for_pixels(project, quality=95)
        write_pixels(better)
        assert prepare_run(better, "tiny", PIXELS_IN, HOW).run_id != prepared.run_id

    def test_a_trainset_without_pixels_is_refused_before_anything_is_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        project = make_project(tmp_path)
        make_plan(project.root, tiny_recipe())
        monkeypatch.setattr("nextvid.config.project.recipe_by_name", lambda name, _: tiny_recipe(name))
        with pytest.raises(RefusedError, match="asks for none: put 'pixels"):
            prepare_run(project, "tiny", PIXELS_IN, HOW)
        assert not Path(project.root.recipe_folder("tiny")).exists()

    def test_pixels_that_went_away_are_named(self, tmp_path: Path) -> None:
        project = make_pixel_project(tmp_path)
        run = begin(project, pixel_recipe())
        for path in Path(project.root.pointed("trainset", run.trainset)).glob("pixels.*.json"):
            path.unlink()
        with pytest.raises(UpstreamError, match=f"has no pixels {run.pixels}"):
            train(project, run, ALONE)


class TestExport:
    def test_it_refuses_what_it_was_not_trained_on(self, tmp_path: Path) -> None:
        project = make_pixel_project(tmp_path)
        run = begin(project, pixel_recipe())
        train(project, run, ALONE)
        encoder = nextvid.load_encoder(run.folder / "encoder")
        assert encoder.autoencoder is None
        with pytest.raises(RefusedError, match="trained on pixels: give it frames"):
            encoder(torch.zeros(1, 4, 4, 4, 4))
        with pytest.raises(RefusedError, match="resize them to 32 x 32"):
            encoder(torch.zeros(1, 4, 64, 64, 3, dtype=torch.uint8), resize=False)
