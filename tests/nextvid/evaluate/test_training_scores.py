"""Scores while training: which clips, how they are answered, and that they change nothing of the run."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from nextvid.config.project import Project
from nextvid.config.recipe import ExecutionConfig
from nextvid.evaluate.benchmark_rows import BenchmarkRows
from nextvid.evaluate.training_scores import CLASSES, RIDGES, answered, linear_labels, open_scorer, sampled
from nextvid.train import checkpoint, loop
from nextvid.train.distributed import Ranks
from nextvid.train.events import accuracies, newest, read_events
from nextvid.train.loop import train
from nextvid.train.pretrain import finish_run, prepare_run
from nextvid.train.run import Run, open_run
from nextvid.train.step import build
from storage.schemas import Labels
from storage.tables import write_table
from tests.nextvid.evaluate.test_probes import Together
from tests.nextvid.tiny_project import OVERRIDES, RECIPE

ALONE = Ranks(0, 1, torch.device("cpu"))
HOW = ExecutionConfig(
    device="cpu", log_every_steps=1, diagnose_every_steps=2, checkpoint_every_steps=3, score_clips=24, threads=1
)


def begin(project: Project, seed: int, how: ExecutionConfig = HOW) -> Run:
    return open_run(Path(prepare_run(project, RECIPE, [*OVERRIDES, f"seed={seed}"], how).folder))


def kinds(run: Run, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(run.folder) if event["kind"] == kind]


def test_a_run_is_scored_at_each_diagnosis_and_its_losses_are_those_of_a_run_that_is_not(own_copy: Project) -> None:
    plain = begin(own_copy, 1, HOW.model_copy(update={"score_clips": 0}))
    train(own_copy, plain, ALONE, open_scorer)
    losses = [(event["step"], event["loss"], event["norm"]) for event in kinds(plain, "step")]
    weights = checkpoint.load_tensors(checkpoint.path_at(plain.checkpoints, 5) / "ema.safetensors")
    assert not kinds(plain, "scores")
    for path in (*plain.checkpoints.rglob("*.*"), plain.folder / "events.jsonl"):
        path.unlink()
    scored = begin(own_copy, 1)
    train(own_copy, scored, ALONE, open_scorer)
    assert [(event["step"], event["loss"], event["norm"]) for event in kinds(scored, "step")] == losses
    again = checkpoint.load_tensors(checkpoint.path_at(scored.checkpoints, 5) / "ema.safetensors")
    assert all(torch.equal(value, again[name]) for name, value in weights.items())
    found = kinds(scored, "scores")
    assert [event["step"] for event in found] == [0, 2, 4, 5]
    assert found[0]["clips"] == {"species": 24}
    assert found[-1]["accuracy"]["species/linear"] > 0.8  # the signal is there for any encoder
    numbers = finish_run(own_copy, RECIPE, scored.id).numbers
    assert numbers["species_knn"] == accuracies(read_events(scored.folder))["species_knn"]


def test_a_resumed_run_has_each_score_once(own_copy: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    run, original = begin(own_copy, 2), loop._Session._after_step

    def dies(at: int) -> None:
        def after_step(session: Any) -> None:
            original(session)
            if session.progress.step == at:
                raise KeyboardInterrupt

        monkeypatch.setattr(loop._Session, "_after_step", after_step)
        with pytest.raises(KeyboardInterrupt):
            train(own_copy, run, ALONE, open_scorer)

    dies(1)  # before its first checkpoint, so all is done again
    dies(4)
    monkeypatch.undo()
    train(own_copy, run, ALONE, open_scorer)
    assert [event["step"] for event in kinds(run, "scores")] == [0, 2, 4, 5]
    assert [event["step"] for event in kinds(run, "diagnostics")] == [0, 2, 4, 5]


def test_ranks_share_the_clips_and_rank_0_reads_the_tables(own_copy: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    run = begin(own_copy, 3)
    reference = build(run.recipe, ALONE).reference

    def scores(ranks: Ranks) -> dict[str, Any]:
        with open_scorer(own_copy, run, reference, ranks) as scorer:
            found = scorer.encode(reference)()
        return {name: value for name, value in found.items() if name != "seconds"}

    alone, barrier, box = scores(ALONE), threading.Barrier(3), dict[int, Any]()
    with ThreadPoolExecutor(3) as pool:
        ranks = [Together(rank, 3, torch.device("cpu"), barrier, box) for rank in range(3)]
        assert list(pool.map(scores, ranks)) == [alone] * 3


def test_a_benchmark_that_cannot_be_scored_is_told_and_stops_nothing(own_copy: Project) -> None:
    write_table(own_copy.root.table("labels", "pets.000000"), Labels.create_empty(), Labels)
    run = begin(own_copy, 4)
    train(own_copy, run, ALONE, open_scorer)
    (event,) = kinds(run, "not_scored")
    assert (event["benchmark"], event["step"]) == ("species", 0)
    assert "'unlabelled': 90" in event["why"]
    assert newest(kinds(run, "scores"), "scores")["accuracy"] == {}


def rows_of(counts: list[int], shots_a_file: int = 2, views: int = 1) -> BenchmarkRows:
    """A benchmark with so many train shots of each class, and as many test ones, that must not be taken."""
    rows = [
        {"split": split, "label": label, "shot_id": b"%03d%04d" % (label, shot), "view_index": view, "segment": 0,
         "media_id": b"%03d%04d" % (label, shot // shots_a_file), "group": None,
         "row_id": b"%d.%d.%d" % (label, shot, view)}
        for split in ("test", "train")
        for label, count in enumerate(counts)
        for shot in range(count)
        for view in range(views)
    ]  # fmt: skip
    frame = pl.DataFrame(rows, schema_overrides={"group": pl.String}).with_row_index("sample")
    return BenchmarkRows("many", "class", tuple(f"class {n}" for n in range(len(counts))), 1, frame, {})


def test_a_sample_has_as_many_clips_of_each_of_a_few_classes() -> None:
    found = sampled(rows_of([3] * 20 + [30] * 15, views=2), 100)
    assert set(found["split"]) == {"train"}
    counts = dict(found.group_by("label").len().iter_rows())
    assert len(counts) == CLASSES
    assert set(counts.values()) == {10}
    assert min(counts) >= 20  # those with fewer clips than their share come last
    assert found["shot_id"].is_unique().all()
    assert found.group_by("media_id").agg(pl.col("fold").n_unique())["fold"].to_list() == [1] * 50
    assert sampled(rows_of([3, 2]), 100).height == 5


def slow_labels(known: np.ndarray, labels: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """The plain reference: a ridge regression with an intercept for each ridge and each clip that is left out."""
    std = known.std(0)
    known, queries = (known - known.mean(0)) / std, (queries - known.mean(0)) / std
    wanted = np.eye(labels.max() + 1)[labels]
    scale = np.trace(known @ known.T) / len(known)

    def fitted(x: np.ndarray, y: np.ndarray, ridge: float) -> Callable[[np.ndarray], np.ndarray]:
        centre, mean = x.mean(0), y.mean(0)
        weights = np.linalg.solve(
            (x - centre).T @ (x - centre) + ridge * np.eye(x.shape[1]), (x - centre).T @ (y - mean)
        )
        return lambda asked: (asked - centre) @ weights

    def error(ridge: float) -> float:
        rest = [np.arange(len(known)) != one for one in range(len(known))]
        means = [wanted[r].mean(0) for r in rest]
        return sum(
            np.square(fitted(known[r], wanted[r], ridge)(known[~r]) + mean - wanted[~r]).sum()
            for r, mean in zip(rest, means, strict=True)
        )

    best = min(RIDGES * scale, key=error)
    return fitted(known, wanted, best)(queries).argmax(1)


@pytest.mark.parametrize(("clips", "width"), [(30, 5), (12, 40)])
def test_the_linear_probe_is_a_ridge_chosen_by_leaving_one_out(clips: int, width: int) -> None:
    rng = np.random.default_rng(width)
    labels = np.arange(clips) % 3
    draw = partial(rng.normal, size=(clips, width))
    known, queries = draw() + 0.4 * labels[:, None], draw() + 0.4 * labels[:, None]
    found = linear_labels(known.astype(np.float32), labels, queries.astype(np.float32))
    assert (found == slow_labels(known, labels, queries)).mean() > 0.9


def test_vectors_that_say_nothing_are_answered_by_chance_and_no_worse() -> None:
    rng = np.random.default_rng(0)
    labels, folds = np.repeat(np.arange(10), 40), rng.integers(0, 4, size=400)
    found = answered(rng.normal(size=(400, 2, 32)), labels, folds)
    assert 0.07 <= found["linear"] <= 0.13  # 2 standard errors of a tenth


def test_what_moves_is_found_by_changes_and_a_collapsed_encoder_scores_chance() -> None:
    rng = np.random.default_rng(0)
    labels, folds = np.arange(60) % 2, np.arange(60) // 2 % 4
    still = 10 * rng.normal(size=(60, 1, 8))
    moving = still + np.where(labels == 0, 1, -1)[:, None, None] * np.arange(3)[None, :, None]
    found = answered(moving, labels, folds)
    assert found["knn_by_change"] == found["linear"] == 1
    assert found["knn"] < 0.8
    flat = answered(np.ones((60, 3, 8)), labels, folds)
    assert max(flat.values()) <= 0.6
    assert all(np.isnan(value) for value in answered(np.full((60, 3, 8), np.nan), labels, folds).values())
