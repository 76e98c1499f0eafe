"""Probes of recipes that read pixels: the rows that have pixels, as encoder input, and a score from them."""

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from einops import rearrange

from nextvid.config.project import Project
from nextvid.evaluate import stream
from nextvid.evaluate.features import load_networks, run_encoders
from nextvid.evaluate.probes import plan_task
from nextvid.evaluate.stream import Variation
from nextvid.model.tokens import pixel_tokens, pixel_values
from nextvid.report.data import lineage_section, read_facts
from nextvid.train.run import find_run
from nextvid.trainset.trainset import Trainset
from storage import atomic
from storage.reader import read_row
from storage.store import PixelStore
from tests.nextvid.evaluate.streams import features_of, plain_encoder
from tests.nextvid.tiny_project import FRAMES, RECIPE, clip_rows, probe, write_pixel_project


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with a complete run of a few steps whose encoder reads pixels; one clip of a test file has none."""
    test = clip_rows().filter(pl.col("split") == "test")["row_id"]
    return write_pixel_project(tmp_path_factory.mktemp("pixels"), (), without=[test[0]])


def test_an_encoder_of_pixels_reads_the_stored_frames(evaluated: Project) -> None:
    """Read by zarr; and the run's own encoder reads them as patches."""
    run = find_run(evaluated, RECIPE)
    task = plan_task(evaluated, "species", run)
    assert task.pixels is not None
    store = PixelStore(evaluated.root, task.pixels)
    rows = task.rows.part("test").head(5)
    places = rows.select("row_id").join(store.commits("pets.000000"), on="row_id", maintain_order="left")
    plain = [read_row(store, "pets.000000", FRAMES, r["part"], r["slot"]) for r in places.iter_rows(named=True)]
    found = features_of(evaluated, task, plain_encoder("pixels", FRAMES), "test", [np.arange(5)])[0]
    assert torch.equal(found, rearrange(torch.from_numpy(np.stack(plain)), "n f h w c -> n (f h w) c").float())
    (ema, _, _) = run_encoders(load_networks(run), task.trainset, FRAMES)
    model = run.recipe.model
    tokens = pixel_tokens(pixel_values(torch.from_numpy(np.stack(plain))), model.patch, model.tubelet)
    wanted = load_networks(run).encoders["ema"](tokens, FRAMES // model.tubelet)
    seen = features_of(evaluated, task, ema, "test", [np.arange(5)])[0]
    torch.testing.assert_close(seen.float(), wanted, rtol=1e-3, atol=1e-4)  # features are float16


def test_a_clip_without_pixels_is_left_out_and_counted(evaluated: Project) -> None:
    task = plan_task(evaluated, "species", find_run(evaluated, RECIPE))
    assert task.rows.left_out["not_encoded"] == 1
    assert task.rows.part("test").height == 29


def test_clips_are_varied_by_epoch_and_only_where_heads_learn(
    evaluated: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every epoch sees whole batches of training clips for each encoder; held-out and test clips are never varied."""
    task = plan_task(evaluated, "species", find_run(evaluated, RECIPE))
    assert task.settings.augment == "video"
    plain, three = plain_encoder("pixels", FRAMES), [np.arange(3)]
    stored = features_of(evaluated, task, plain, "train", three)[0]
    vary = Variation("video", 0)
    one, again, other = (features_of(evaluated, task, plain, "train", three, vary, e)[0] for e in (0, 0, 1))
    assert torch.equal(one, again)
    assert not any(torch.equal(a[n], b[n]) for a, b in ((one, stored), (one, other)) for n in range(3))

    seen: list[tuple[int, int, bytes]] = []

    def noted(frames: np.ndarray, kind: str, seed: int, epoch: int, row: bytes) -> np.ndarray:
        seen.append((seed, epoch, row))
        return frames

    monkeypatch.setattr(stream, "augmented", noted)
    probe(evaluated, RECIPE)
    learnt = task.rows.part("train").filter(~pl.col("held_out"))["row_id"].to_list()
    whole = len(learnt) // task.settings.batch * task.settings.batch * len(task.seeds)
    assert {row for _, _, row in seen} == set(learnt)
    assert Counter(epoch for _, epoch, _ in seen) == dict.fromkeys(range(task.settings.epochs), 3 * whole)
    shutil.rmtree(Path(evaluated.root.probe(RECIPE, find_run(evaluated, RECIPE).id, 5, "species", task.digest())))


def test_a_score_from_stored_pixels(evaluated: Project) -> None:
    """The whole asset, without a video: latents are not asked for."""
    for path in Path(evaluated.root.folder("latents")).rglob("latent/c.0.0.0.0.0"):
        path.unlink()
    outcome = probe(evaluated, RECIPE)
    assert outcome.made
    assert {f"species_{name}_accuracy" for name in ("ema", "online", "random")} <= outcome.numbers.keys()
    task = plan_task(evaluated, "species", find_run(evaluated, RECIPE))
    score = atomic.read_json(
        f"{evaluated.root.probe(RECIPE, find_run(evaluated, RECIPE).id, 5, 'species', task.digest())}/score.json"
    )
    assert task.pixels is not None
    assert score["pixel_spec"] == task.pixels.digest()
    assert score["encoding_spec"] == Trainset.open(evaluated.root).spec.digest()
    assert not probe(evaluated, RECIPE).made


def test_the_report_says_which_pixels_and_how_close_they_are(evaluated: Project) -> None:
    run = find_run(evaluated, RECIPE)
    facts = read_facts(evaluated, run)
    section = lineage_section(facts, atomic.read_json(str(run.folder / "config.json")))
    (words,) = (row[1] for row in section.blocks[0].rows if row[0] == "pixels")  # type: ignore[union-attr]
    assert str(words).startswith(f"{run.pixels}, JPEG of quality 90, 4:2:0, ")
    assert "dB PSNR over" in str(words)
    assert all(Path(path).exists() for path in section.blocks[0].sources)
