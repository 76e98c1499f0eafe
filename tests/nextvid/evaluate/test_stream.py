"""Features as they are asked for: what is read, in which order, the same from a file, and the file within its bound."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from einops import rearrange

from nextvid.config.project import Project
from nextvid.evaluate import stream
from nextvid.evaluate.features import encode, load_networks, run_encoders
from nextvid.evaluate.fitting import ALONE, Lesson, fit
from nextvid.evaluate.kept import keep, scratch, vectors_of
from nextvid.evaluate.probes import plan_task
from nextvid.evaluate.scoring import Task
from nextvid.evaluate.stream import OneView, Stored, Streamed, open_clips
from nextvid.model.reference import reference_features
from nextvid.model.tokens import latent_tokens
from nextvid.train.run import find_run
from storage.reader import read_row
from storage.store import LatentStore
from tests.nextvid.evaluate.streams import CPU, features_of, plain_encoder
from tests.nextvid.tiny_project import FRAMES, RECIPE


@pytest.fixture(scope="module")
def task(evaluated: Project) -> Task:
    return plan_task(evaluated, "species", find_run(evaluated, RECIPE))


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def stored_rows(project: Project, task: Task, numbers: list[int]) -> torch.Tensor:
    """Latents of train's rows by number, through zarr; the tiny trainset's mean is 0 and its deviation 1."""
    store = LatentStore(project.root, task.trainset.spec)
    rows = task.rows.part("train")[numbers].iter_rows(named=True)
    return torch.from_numpy(np.stack([read_row(store, r["batch"], r["frames"], r["part"], r["slot"]) for r in rows]))


@pytest.mark.parametrize("threads", [0, 3])
def test_groups_come_in_order_whatever_is_encoded_at_once(
    evaluated: Project, task: Task, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "CLIPS_AT_ONCE", 4)
    asked = [[3, 0, 9], [1], list(range(20, 30)), [3]]
    encoder = plain_encoder("latents", FRAMES)
    found = features_of(evaluated, task, encoder, "train", [np.array(n) for n in asked], threads=threads)
    for features, numbers in zip(found, asked, strict=True):
        wanted = rearrange(stored_rows(evaluated, task, numbers), "n f c h w -> n (f h w) c")
        assert torch.equal(features.float(), wanted.float())


def test_trap_31_features_are_the_reference_encoder_s_view_of_the_whole_clip(evaluated: Project, task: Task) -> None:
    """Trap 31 of docs/method.md 13: final norm, frame-causal, every cell, one token after the other."""
    run = find_run(evaluated, RECIPE)
    networks = load_networks(run)
    ema, _, _ = run_encoders(networks, task.trainset, FRAMES)
    found = features_of(evaluated, task, ema, "train", [np.arange(5)])[0]
    cells, tubelet = run.recipe.model.cells, run.recipe.model.tubelet
    assert found.shape == (5, FRAMES // tubelet * cells, 32)
    tokens = latent_tokens(stored_rows(evaluated, task, list(range(5))).float(), tubelet)
    expected = reference_features(networks.encoders["ema"], tokens, target_norm=False)
    torch.testing.assert_close(found[:, cells:], expected.half(), rtol=1e-3, atol=1e-4)


def test_trap_31_segments_follow_one_another(evaluated: Project, task: Task) -> None:
    encoder = plain_encoder("latents", FRAMES)
    single = features_of(evaluated, task, encoder, "train", [np.arange(4)])[0]
    with open_clips(evaluated.root, task.trainset, None, task.rows, encoder, CPU) as clips:
        paired = next(Streamed(encoder, replace(clips, segments=2), "train").of([np.arange(2)]))
    assert torch.equal(paired, rearrange(single, "(n g) l d -> n (g l) d", g=2))


def test_trap_31_features_do_not_see_the_future(evaluated: Project, task: Task) -> None:
    run = find_run(evaluated, RECIPE)
    encoder, inputs = load_networks(run).encoders["ema"], stored_rows(evaluated, task, [0, 1]).float()
    changed = inputs.clone()
    changed[:, 4:] = 0
    before, after = (encode(encoder, run.recipe, given) for given in (inputs, changed))
    half = 4 // run.recipe.model.tubelet * run.recipe.model.cells
    assert torch.equal(before[:, :half], after[:, :half])
    assert not torch.allclose(before[:, half:], after[:, half:])


def test_heads_from_a_file_are_those_of_the_stream(evaluated: Project, task: Task, tmp_path: Path) -> None:
    """To 1e-3; and all that k-NN knows is in files too."""
    ema, _, _ = run_encoders(load_networks(find_run(evaluated, RECIPE)), task.trainset, FRAMES)
    train = task.rows.part("train")
    labels, samples = train["label"].to_numpy(), train["sample"].n_unique()
    with open_clips(evaluated.root, task.trainset, None, task.rows, ema, CPU) as clips:
        streamed = Streamed(ema, clips, "train")
        kept = keep(streamed, samples, 1, ema, made(tmp_path / "own"), 10**9, ALONE)
        assert kept.features is not None
        assert kept.features.dtype == np.float16
        heads = [
            fit(Lesson(f, labels, np.arange(samples), 2, kept.tokens, 32), task.settings, [0, 1])
            for f in (streamed, Stored(kept.features, CPU))
        ]
        small = keep(streamed, samples, 1, ema, made(tmp_path / "small"), kept.features.nbytes - 1, ALONE)
        whole = next(streamed.of([np.arange(samples)]))
    for name, parameter in heads[0].named_parameters():
        torch.testing.assert_close(parameter, heads[1].get_parameter(name), rtol=1e-3, atol=1e-3, msg=name)
    assert small.features is None
    for name, vectors in vectors_of(whole, ema, 1).items():
        for known in (kept, small):
            np.testing.assert_allclose(known.vectors[name], vectors, rtol=1e-2, atol=2e-3)
    assert kept.vectors["by_time"].shape == (samples, FRAMES // 2 * 32)


def test_features_of_scores_that_nobody_computes_make_room(evaluated: Project, task: Task, tmp_path: Path) -> None:
    encoder = plain_encoder("latents", FRAMES)
    root = replace(evaluated.root, cache_folder=str(tmp_path))
    size_bytes = 4 * FRAMES * 8 * 8 * 16 * 2
    with open_clips(root, task.trainset, None, task.rows, encoder, CPU) as clips:
        streamed = Streamed(encoder, clips, "train")
        with scratch(root, "old", ALONE) as old:
            keep(streamed, 4, 1, encoder, old, size_bytes, ALONE)
            with scratch(root, "new", ALONE) as new:
                assert keep(streamed, 4, 1, encoder, new, size_bytes, ALONE).features is None  # the old one is in use
        assert old.is_dir()
        with scratch(root, "newest", ALONE) as newest:
            assert keep(streamed, 4, 1, encoder, newest, size_bytes, ALONE).features is not None
        assert not old.exists()


def test_each_epoch_reads_one_view_of_every_sample(evaluated: Project, task: Task) -> None:
    """Test rows play the other views: sample 0 has three more, sample 2 has one, the others none."""
    segments, train = task.rows.segments, task.rows.part("train")
    firsts = train["sample"].unique().sort()
    owners = [int(firsts[0])] * 3 + [int(firsts[2])]
    others = (
        task.rows.part("test")
        .head(4 * segments)
        .with_columns(sample=pl.Series(np.repeat(owners, segments)), split=pl.lit("train").cast(train["split"].dtype))
    )
    rows = replace(task.rows, other_views=others)
    encoder = plain_encoder("latents", FRAMES)
    with open_clips(evaluated.root, task.trainset, None, rows, encoder, CPU) as clips:
        streamed = Streamed(encoder, clips, "train")
        views = OneView(streamed, rows, seed=0)
        samples = np.arange(len(firsts))
        drawn = np.stack([views.drawn(samples, epoch) for epoch in range(60)])
        (found,) = views.of([samples[:3]], 5)
    tested = len(task.rows.frame) // segments - int(firsts[0])
    assert np.unique(drawn[:, 0]).tolist() == [0, tested, tested + 1, tested + 2]
    assert np.unique(drawn[:, 2]).tolist() == [2, tested + 3]
    assert (np.delete(drawn, [0, 2], axis=1) == np.delete(samples, [0, 2])).all()
    assert np.array_equal(views.drawn(samples[[2, 0]], 7), drawn[7][[2, 0]]), "a sample's view hangs on no other"
    frame = pl.concat([rows.frame, others])
    place = (int(firsts[0]) + views.drawn(samples[:3], 5)) * segments
    store = LatentStore(evaluated.root, task.trainset.spec)
    stored = [
        read_row(store, r["batch"], r["frames"], r["part"], r["slot"])
        for r in frame[place.tolist()].iter_rows(named=True)
    ]
    wanted = rearrange(torch.from_numpy(np.stack(stored)), "n f c h w -> n (f h w) c")
    assert torch.equal(found[:, : wanted.shape[1]].float(), wanted.float())
