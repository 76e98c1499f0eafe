"""Probes of recipes that read pixels: the rows that have pixels, as encoder input, and a score from them."""

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from nextvid.config.project import Project
from nextvid.evaluate import features as features_module
from nextvid.evaluate.features import Augmented, PixelSource, features, load_networks
from nextvid.evaluate.probes import make_probes, plan_task
from nextvid.model.tokens import pixel_tokens, pixel_values
from nextvid.report.data import lineage_section, read_facts
from nextvid.train.run import find_run
from nextvid.trainset.trainset import Trainset
from storage import atomic
from storage.reader import read_row
from storage.store import PixelStore
from tests.nextvid.tiny_project import FRAMES, RECIPE, clip_rows, write_pixel_project


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with a complete run of a few steps whose encoder reads pixels; one clip of a test file has none."""
    test = clip_rows().filter(pl.col("split") == "test")["row_id"]
    return write_pixel_project(tmp_path_factory.mktemp("pixels"), (), without=[test[0]])


def test_tokens_are_the_stored_frames(evaluated: Project) -> None:
    """Read by zarr, and images repeated."""
    task = plan_task(evaluated, "species", find_run(evaluated, RECIPE))
    assert task.pixels is not None
    model = task.run.recipe.model
    source = PixelSource(evaluated.root, task.pixels, task.run.recipe, ["pets.000000", "stills.000000"], FRAMES)
    store = PixelStore(evaluated.root, task.pixels)
    rows = task.rows.part("test").head(5)
    places = rows.select("row_id").join(store.commits("pets.000000"), on="row_id", maintain_order="left")
    plain = [read_row(store, "pets.000000", FRAMES, r["part"], r["slot"]) for r in places.iter_rows(named=True)]
    wanted = pixel_tokens(pixel_values(torch.from_numpy(np.stack(plain))), model.patch, model.tubelet)
    assert torch.equal(source.tokens(rows), wanted)
    stills = source.pixels(store.commits("stills.000000").head(2))
    assert stills.shape == (2, FRAMES, 64, 64, 3)
    assert (stills == stills[:, :1]).all()
    assert (stills[:, 0] == np.stack([read_row(store, "stills.000000", 1, 0, n)[0] for n in range(2)])).all()
    found = features(load_networks(task.run).encoders["ema"], task.run.recipe, source, rows)
    assert found.shape == (5, FRAMES // model.tubelet * model.cells, 32)
    source.close()


def test_a_clip_without_pixels_is_left_out_and_counted(evaluated: Project) -> None:
    task = plan_task(evaluated, "species", find_run(evaluated, RECIPE))
    assert task.rows.left_out["not_encoded"] == 1
    assert task.rows.part("test").height == 29


def test_clips_are_varied_by_epoch_and_only_where_heads_learn(
    evaluated: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every epoch sees each training clip once for each encoder; held-out and test clips are never varied."""
    task = plan_task(evaluated, "species", find_run(evaluated, RECIPE))
    assert task.settings.augment == "video"
    assert task.pixels is not None
    source = PixelSource(evaluated.root, task.pixels, task.run.recipe, ["pets.000000"], FRAMES)
    rows = task.rows.part("train").head(3)
    stored = source.tokens(rows)
    one, again, other = (Augmented(source, "video", 0, epoch).tokens(rows) for epoch in (0, 0, 1))
    assert torch.equal(one, again)
    assert stored.shape == one.shape
    assert not any(torch.equal(a[n], b[n]) for a, b in ((one, stored), (one, other)) for n in range(3))
    source.close()

    seen: list[tuple[int, int, bytes]] = []

    def noted(frames: np.ndarray, kind: str, seed: int, epoch: int, row: bytes) -> np.ndarray:
        seen.append((seed, epoch, row))
        return frames

    monkeypatch.setattr(features_module, "augmented", noted)
    make_probes(evaluated, RECIPE)
    learnt = task.rows.part("train").filter(~pl.col("held_out"))["row_id"].to_list()
    assert Counter(seen) == Counter({(0, epoch, row): 3 for epoch in range(task.settings.epochs) for row in learnt})
    shutil.rmtree(evaluated.root.probe(RECIPE, task.run.id, "species", task.digest()))


def test_a_score_from_stored_pixels(evaluated: Project) -> None:
    """The whole asset, without a video: latents are not asked for."""
    for path in Path(evaluated.root.folder("latents")).rglob("latent/c/0/0/0/0/0"):
        path.unlink()
    outcome = make_probes(evaluated, RECIPE)
    assert outcome.made
    assert {f"species_{name}_accuracy" for name in ("ema", "online", "random")} <= outcome.numbers.keys()
    task = plan_task(evaluated, "species", find_run(evaluated, RECIPE))
    score = atomic.read_json(f"{evaluated.root.probe(RECIPE, task.run.id, 'species', task.digest())}/score.json")
    assert task.pixels is not None
    assert score["pixel_spec"] == task.pixels.digest()
    assert score["encoding_spec"] == Trainset.open(evaluated.root).spec.digest()
    assert not make_probes(evaluated, RECIPE).made


def test_the_report_says_which_pixels_and_how_close_they_are(evaluated: Project) -> None:
    run = find_run(evaluated, RECIPE)
    facts = read_facts(evaluated, run)
    section = lineage_section(facts, atomic.read_json(str(run.folder / "config.json")))
    (words,) = (row[1] for row in section.blocks[0].rows if row[0] == "pixels")  # type: ignore[union-attr]
    assert str(words).startswith(f"{run.pixels}, JPEG of quality 90, 4:2:0, ")
    assert "dB PSNR over" in str(words)
    assert all(Path(path).exists() for path in section.blocks[0].sources)
