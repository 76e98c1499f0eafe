"""The maker of probes end to end on a tiny run: what is asked, what is written, and that it is written once."""

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from safetensors.torch import load_file

from nextvid.config.accepted import accept
from nextvid.config.project import Project, open_project
from nextvid.config.recipe import ExecutionConfig
from nextvid.evaluate import kept, scoring, stream
from nextvid.evaluate.compute import Shared
from nextvid.evaluate.features import load_networks, run_encoders
from nextvid.evaluate.fitting import ALONE
from nextvid.evaluate.probes import make_probes, plan_probes, plan_task, prepare_probes
from nextvid.evaluate.scoring import score_encoder, standard_error
from nextvid.train import checkpoint
from nextvid.train.distributed import Ranks
from nextvid.train.events import read_events
from nextvid.train.node import trainers
from nextvid.train.run import find_run
from storage.errors import ConfigError, DamagedError, RefusedError, UpstreamError
from storage.schemas import Labels, ProbeRows
from storage.tables import read_table, write_table
from tests.nextvid.tiny_project import FRAMES, RECIPE, probe


def test_scores_are_written_once_with_their_sources(own_copy: Project) -> None:
    first = probe(own_copy, RECIPE)
    assert first.made
    again = probe(own_copy, RECIPE)
    assert not again.made
    assert again.numbers == first.numbers
    run = find_run(own_copy, RECIPE)
    assert (first.run, first.rows) == (run.id, 30)
    folder = Path(own_copy.root.probe(RECIPE, run.id, 5, "species", plan_task(own_copy, "species", run).digest()))
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
        assert kept["ema/dense"].shape == kept["random/dense"].shape == (3, FRAMES // 2 * 64, 3)
        assert kept["ema/attention"].sum(1) == pytest.approx(1.0, abs=0.01)
        right = kept["ema/answers"] == kept["labels"][kept["ema/attention_samples"]]
        first_wrong = min([*np.flatnonzero(~right), len(right)])
        assert 0 < right.sum() == first_wrong <= 3, "first those answered rightly, then the others"


def test_it_waits_for_a_gpu_that_is_held(own_copy: Project, refuse_to_share: Callable[..., None]) -> None:
    refuse_to_share(f"probes {RECIPE}", own_copy, lambda project, tell: make_probes(project, RECIPE, on_progress=tell))


def test_the_three_encoders_are_what_they_are_called(evaluated: Project) -> None:
    run = find_run(evaluated, RECIPE)
    networks = load_networks(run)
    random, ema, online = (networks.encoders[name].embed.weight for name in ("random", "ema", "online"))
    assert not torch.equal(online, random)
    assert not torch.equal(ema, online)
    assert torch.equal(load_networks(run).encoders["random"].embed.weight, random)
    # after 5 steps of momentum .99 the average has hardly left the start
    assert (ema - random).norm() < 0.2 * (online - random).norm()


def test_the_chosen_pair_follows_the_held_out_clips(own_copy: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Test clips must not choose: the pair that is best on held-out clips is taken, whatever test says."""
    run = find_run(own_copy, RECIPE)
    task = plan_task(own_copy, "species", run)
    held = task.rows.part("train")["held_out"].to_numpy()
    batches = -(-int(held.sum()) // stream.CLIPS_AT_ONCE)
    best_on_test = [torch.tensor([[3, 1], [3, 2]])] * 2
    answers = iter([torch.tensor([[1, 4], [2, 3]]), *[torch.zeros(2, 2).long()] * (batches - 1), *best_on_test])
    monkeypatch.setattr(scoring, "right_answers", lambda *_: next(answers))
    ema = run_encoders(load_networks(run), task.trainset, FRAMES)[0]
    found = score_encoder(own_copy.root, task, ema, str(own_copy.path.parent / "score"), ALONE).numbers
    assert found["rate"] == task.settings.pairs[1].rate
    assert found["by_seed"] == [2 / 30, 4 / 30]


def test_other_settings_are_another_score(evaluated: Project) -> None:
    task = plan_task(evaluated, "species", find_run(evaluated, RECIPE))
    assert replace(task, config=task.config.model_copy(update={"seeds": 3})).digest() != task.digest()


def test_a_killed_score_goes_on_from_its_last_epoch(own_copy: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same bits; encoders that were done are not scored again, nothing unfinished is left."""
    run = find_run(own_copy, RECIPE)
    task = plan_task(own_copy, "species", run)
    told: list[tuple[str, int]] = []

    def die(name: str, epoch: int, loss: float) -> None:
        told.append((name, epoch))
        if told == [("ema", e) for e in range(4)] + [("online", 0), ("online", 1)]:
            raise KeyboardInterrupt

    ema, online, _ = run_encoders(load_networks(run), task.trainset, FRAMES)
    folder = own_copy.path.parent / "score"
    score_encoder(own_copy.root, task, ema, str(folder), ALONE, on_epoch=die)
    with pytest.raises(KeyboardInterrupt):
        score_encoder(own_copy.root, task, online, str(folder), ALONE, on_epoch=die)
    monkeypatch.setattr(kept, "vectors_of", None)  # the pass over train is not made again
    found = [score_encoder(own_copy.root, task, e, str(folder), ALONE, on_epoch=die) for e in (ema, online)]
    monkeypatch.undo()
    assert told[6:] == [("online", 2), ("online", 3)]
    fresh = [score_encoder(own_copy.root, task, e, str(folder) + "_2", ALONE) for e in (ema, online)]
    assert [one.numbers for one in found] == [one.numbers for one in fresh]
    assert all((one.pooled == other.pooled).all() for one, other in zip(found, fresh, strict=True))
    assert not list(Path(own_copy.root.cache_folder, "features").glob("*/"))


def test_benchmarks_of_the_same_clips_have_one_pass_of_features(own_copy: Project) -> None:
    """Scores are those of a benchmark alone; of two, the second one encodes nothing."""
    run = find_run(own_copy, RECIPE)
    planned = plan_probes(own_copy, RECIPE)
    (task,) = planned.tasks.values()
    task = replace(task, settings=task.settings.model_copy(update={"epochs": 1}))
    ema, encoded = run_encoders(load_networks(run), task.trainset, FRAMES)[0], list[int]()

    def counted(clips: torch.Tensor) -> torch.Tensor:
        encoded.append(len(clips))
        return ema.encode(clips)

    folder, counting = own_copy.path.parent, replace(ema, encode=counted)
    alone = score_encoder(own_copy.root, task, counting, str(folder / "alone"), ALONE)
    once = sum(encoded)
    shared = Shared(own_copy, planned, {"species": task, "again": task})
    for name in ("species", "again"):
        found = score_encoder(
            own_copy.root, task, counting, str(folder / name), ALONE, kept_in=shared.of(name, ema.name)
        )
        assert found.numbers == alone.numbers
        assert sum(encoded) == 2 * once
    shared.remove()
    assert not list(Path(own_copy.root.cache_folder, "features").glob("*/"))
    assert Shared(own_copy, planned, {"species": task}).of("species", "ema") == {}


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
        probe(edited, RECIPE, benchmarks=["sizes"])
    assert plan_task(edited.as_asked(), "species", find_run(edited.as_asked(), RECIPE)).digest() != accepted.digest()


def test_unknown_benchmark_and_unfinished_run(own_copy: Project) -> None:
    with pytest.raises(ConfigError, match="known: species"):
        probe(own_copy, RECIPE, benchmarks=["colours"])
    with pytest.raises(UpstreamError, match="no such run"):
        probe(own_copy, RECIPE, run="0123456789ab")
    run = find_run(own_copy, RECIPE)
    for path in run.checkpoints.iterdir():
        (path / "state.json").unlink()
    with pytest.raises(ConfigError, match=f"run {run.id} is of recipe {RECIPE}, not of nextvid_l"):
        probe(own_copy, "nextvid_l", run=run.id)
    with pytest.raises(UpstreamError, match="recipe nextvid_l has no complete run without overrides"):
        probe(own_copy, "nextvid_l")
    with pytest.raises(UpstreamError, match="0 of 5 steps"):
        probe(own_copy, RECIPE)
    with pytest.raises(UpstreamError, match="has no checkpoint yet"):
        probe(own_copy, RECIPE, run.id)


def test_a_run_that_has_not_ended_is_scored_at_its_newest_checkpoint(own_copy: Project) -> None:
    """Or at an older one; each score is under its step."""
    run = find_run(own_copy, RECIPE)
    (checkpoint.path_at(run.checkpoints, 5) / "state.json").unlink()
    with pytest.raises(UpstreamError, match=r"no checkpoint of step 3; there are those of 1, 2, 4$"):
        probe(own_copy, RECIPE, run.id, step=3)
    for step, asked in ((4, None), (2, 2)):
        written = str(probe(own_copy, RECIPE, run.id, step=asked).numbers["species_score"])
        assert f"/step_{step:09d}/species/" in written
        assert json.loads(Path(written).read_text())["checkpoint"] == f"step_{step:09d}"


def test_a_benchmark_without_labels_says_what_was_left_out(own_copy: Project) -> None:
    write_table(own_copy.root.table("labels", "pets.000000"), Labels.create_empty(), Labels)
    with pytest.raises(UpstreamError, match="'unlabelled': 90"):
        probe(own_copy, RECIPE)


def test_clips_that_are_no_whole_tubelets_are_refused(own_copy: Project) -> None:
    content = yaml.safe_load(own_copy.path.read_text())
    content["benchmarks"]["species"]["policy"]["frames"] = 5
    own_copy.path.write_text(yaml.safe_dump(content))
    with pytest.raises(RefusedError, match="'species' has clips of 5 frames, which are no whole tubelets of the 2"):
        probe(open_project(own_copy.path), RECIPE)


@dataclass(frozen=True)
class Together(Ranks):
    """A rank that is a thread."""

    barrier: threading.Barrier
    box: dict[int, Any]

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        self.box[self.rank] = values.clone()
        self.barrier.wait()
        total = torch.stack([self.box[rank] for rank in range(self.count)]).sum(0)
        self.barrier.wait()
        return values.copy_(total)

    def from_first(self, value: str | None) -> str | None:
        self.box[self.rank] = value
        self.barrier.wait()
        found: str | None = self.box[0]
        self.barrier.wait()
        return found

    def wait(self) -> None:
        self.barrier.wait()


@pytest.mark.parametrize("bound_gb", [0, 1])
def test_ranks_change_nothing(own_copy: Project, bound_gb: int) -> None:
    """Heads after two epochs to 1e-5, and scores; streamed, and with features kept by ranks together."""
    run = find_run(own_copy, RECIPE)
    task = plan_task(own_copy, "species", run)
    task = replace(task, settings=task.settings.model_copy(update={"epochs": 2}))
    root = replace(own_copy.root, cache_bytes=bound_gb << 30)
    ema = run_encoders(load_networks(run), task.trainset, FRAMES)[0]
    heads, numbers = {}, {}
    for count in (1, 2, 3):
        barrier, box = threading.Barrier(count, timeout=60), dict[int, Any]()
        ranks = [Together(rank, count, torch.device("cpu"), barrier, box) for rank in range(count)]
        folder = own_copy.path.parent / f"score_{count}"
        with ThreadPoolExecutor(count) as threads:
            work = [threads.submit(score_encoder, root, task, ema, str(folder), one) for one in ranks]
            numbers[count] = work[-1].result().numbers
        heads[count] = load_file(folder / scoring.UNFINISHED / "ema.safetensors")
    assert numbers[1] == numbers[2] == numbers[3]
    assert numbers[1]["features"] == ("kept" if bound_gb else "streamed")
    for name, value in heads[1].items():
        for count in (2, 3):
            torch.testing.assert_close(heads[count][name], value, rtol=1e-5, atol=1e-5, msg=f"{name}, {count}")


@pytest.mark.faults
def test_children_say_what_is_wrong(own_copy: Project) -> None:
    """Planned here, computed under torchrun: the last error that it reported is told."""
    planned = plan_probes(own_copy, RECIPE)
    assert planned.checkpoint is not None
    damaged = planned.checkpoint / "ema.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    with pytest.raises(DamagedError, match=r"^probes [0-9a-f]{12}: .*ema\.safetensors: bytes differ .*; delete"):
        make_probes(own_copy, RECIPE)


@pytest.mark.faults
def test_two_killed_ranks_go_on_from_the_last_epoch(own_copy: Project) -> None:
    """Under torchrun, killed twice; the score is that of one rank which nobody killed."""
    planned = plan_probes(own_copy, RECIPE)
    prepared = prepare_probes(own_copy, planned, ExecutionConfig(device="cpu", ranks=2))
    for epochs in (2, 5):
        with trainers(prepared, subprocess.DEVNULL, subprocess.STDOUT, print) as process:
            while process.poll() is None and epochs_of(planned.folder) < epochs:
                time.sleep(0.01)
            os.killpg(process.pid, signal.SIGKILL)
    make_probes(own_copy, RECIPE, how=("device=cpu", "ranks=2"))
    told = [event["step"] for event in read_events(Path(planned.folder)) if event["kind"] == "epoch"]
    assert told == list(range(told[0], 13))  # of the last attempt
    assert told[0] > 1
    (score,) = planned.folders.values()
    found = json.loads(Path(score, "score.json").read_text())["encoders"]
    Path(score, "score.json").unlink()
    probe(own_copy)
    assert found == json.loads(Path(score, "score.json").read_text())["encoders"]


def epochs_of(folder: str) -> int:
    try:
        return max((event["step"] for event in read_events(Path(folder))), default=0)
    except UpstreamError:
        return 0
