"""Fine-tuning: rates by layer, blocks that are skipped, and one training whatever ranks and kills."""

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nextvid.config.benchmarks import FinetuneConfig
from nextvid.config.project import Project
from nextvid.config.recipe import ExecutionConfig
from nextvid.evaluate.attentive import ProbeSettings
from nextvid.evaluate.benchmark_rows import per_sample
from nextvid.evaluate.features import FrozenEncoder, Parts, load_networks, run_encoders
from nextvid.evaluate.finetune import OneSegment, Tuned, Tuning, judge, optimiser_of
from nextvid.evaluate.fitting import ALONE
from nextvid.evaluate.probes import make_probes, plan_encoder, plan_probes, plan_task, prepare_probes
from nextvid.evaluate.scoring import Scored, Task, score_encoder
from nextvid.evaluate.stream import Streamed, open_clips
from nextvid.train.checkpoint import Identity
from nextvid.train.distributed import Ranks
from nextvid.train.events import read_events
from nextvid.train.node import trainers
from nextvid.train.run import find_run
from storage.errors import RefusedError
from tests.factories import edit_project
from tests.nextvid.evaluate.streams import CPU
from tests.nextvid.evaluate.test_probes import Together, epochs_of
from tests.nextvid.tiny_project import FRAMES, RECIPE, probe

SWEEP = [{"rates": [2e-3], "weight_decays": [0.05], "warm_up_epochs": 1.0, "warm_up_from": 1e-6}]


def tunes(project: Project, **more: Any) -> Project:
    """The project with a benchmark that fine-tunes on the clips of `species`."""

    def change(said: dict[str, Any]) -> None:
        kept = {name: said["benchmarks"]["species"][name] for name in ("datasets", "target", "policy")}
        short = {"protocol": "finetune", "epochs": 4, "batch": 8, "judged": "shot", "sweep": SWEEP}
        said["benchmarks"]["species"] = kept | short | more
        said["benchmarks"]["species"]["policy"] |= {"cut_from": "shot"}

    return edit_project(project.path, change)


@pytest.fixture
def tuned(own_copy: Project) -> Project:
    return tunes(own_copy)


def encoders(project: Project, task: Task) -> list[FrozenEncoder]:
    return run_encoders(load_networks(find_run(project, RECIPE)), task.trainset, FRAMES)


class Layers(nn.Module):
    """An encoder of bytes."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(3, width)
        self.places = nn.Parameter(torch.zeros(1, 4, width))
        self.blocks = nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.norm(self.blocks(self.embed(given.float()) + self.places))
        return found


def layers(depth: int = 3, width: int = 8) -> tuple[FrozenEncoder, list[nn.Module]]:
    """An encoder, and its blocks."""
    module = Layers(depth, width)
    return FrozenEncoder("x", "pixels", 1, width, 1, module, parts=Parts(module, "blocks", "norm")), [*module.blocks]


def test_rates_fall_by_layer_and_matrices_alone_decay() -> None:
    encoder, _ = layers()
    assert encoder.parts is not None
    tuned = Tuned(encoder, 2, seed=0)
    found = {
        name: (group["scale"], group["weight_decay"])
        for group in optimiser_of(tuned, encoder.parts, FinetuneConfig(layer_decay=0.5), 0.1).param_groups
        for name in group["parameter_names"]
    }
    assert found.keys() == {name for name, _ in tuned.named_parameters()}
    assert found["encoder.embed.weight"] == (0.5**4, 0.1)
    assert found["encoder.places"] == (0.5**4, 0.0)
    for number in range(3):
        assert found[f"encoder.blocks.{number}.weight"] == (0.5 ** (3 - number), 0.1)
        assert found[f"encoder.blocks.{number}.bias"] == (0.5 ** (3 - number), 0.0)
    assert {found[name] for name in ("encoder.norm.weight", "norm.bias", "head.bias")} == {(1.0, 0.0)}
    assert found["head.weight"] == (1.0, 0.1)


def test_skipped_blocks_change_nothing_and_the_mean_is_kept(tmp_path: Path) -> None:
    """By epoch and sample alone, later blocks oftener, none in evaluation."""
    encoder, blocks = layers(depth=5)
    tuned, samples = Tuned(encoder, 2, seed=0), np.arange(400)
    config, settings = FinetuneConfig(drop_path=0.4), ProbeSettings(epochs=1, batch=4)
    tuning = Tuning(
        tuned, encoder, config, settings, samples % 2, samples, tmp_path, Identity("", "", "", ""), CPU
    )  # fmt: skip
    drawn = tuning._draw(samples, epoch=3)
    torch.testing.assert_close(tuning._draw(samples[7:9], epoch=3), drawn[7:9])
    assert not torch.equal(tuning._draw(samples, epoch=4), drawn)
    shares = (drawn == 0).float().mean(0)
    np.testing.assert_allclose(shares, [0.0, 0.1, 0.2, 0.3, 0.4], atol=0.07)
    np.testing.assert_allclose(drawn.mean(0), 1.0, atol=0.1)
    given = torch.ones(2, 4, 3)
    plain = tuned(given)
    tuning._kept = torch.tensor([[1.0] * 5, [1.0, 0.0, 0.0, 0.0, 0.0]])
    skipped = tuned(given)
    torch.testing.assert_close(skipped[0], plain[0])
    for block in blocks[1:]:
        block.register_forward_hook(lambda _block, given, out: given[0])
    tuning._kept = None
    torch.testing.assert_close(skipped[1], tuned(given)[1])


def test_it_lowers_the_loss_and_its_score_is_one_of_the_table(tuned: Project) -> None:
    numbers = probe(tuned, RECIPE).numbers
    score = json.loads(Path(str(numbers["species_score"])).read_text())
    assert (score["protocol"], set(score["encoders"])) == ("finetune", {"ema", "random"})
    assert score["finetune"] == {"layer_decay": 0.75, "drop_path": 0.1, "smoothing": 0.1}
    assert score["clips"] == {"train": 60, "held_out": 0, "test": 30}
    for found in score["encoders"].values():
        assert found["accuracy"] > 0.85  # the signal is there
    folder = Path(tuned.root.probes(RECIPE, find_run(tuned, RECIPE).id))
    losses = [event["loss"] for event in read_events(folder) if event["kind"] == "epoch"]
    for told in (losses[:4], losses[4:]):
        assert told[0] > 0.6, "of two classes, log 2 at the start"
        assert told[-1] < 0.6 * told[0]
    assert not list(folder.rglob("step_*/state.json"))


def test_a_killed_training_goes_on_and_ends_with_the_same_bits(tuned: Project) -> None:
    task = plan_task(tuned, "species", find_run(tuned, RECIPE))
    told: list[int] = []

    def die(name: str, epoch: int, loss: float) -> None:
        told.append(epoch)
        if told == [0, 1]:
            raise KeyboardInterrupt

    def scored(folder: str, on_epoch: Callable[[str, int, float], None]) -> tuple[Scored, dict[str, torch.Tensor]]:
        ema = encoders(tuned, task)[0]
        assert ema.parts is not None
        found = score_encoder(tuned.root, task, ema, str(tuned.path.parent / folder), ALONE, on_epoch=on_epoch)
        return found, ema.parts.module.state_dict()

    with pytest.raises(KeyboardInterrupt):
        scored("killed", die)
    resumed, weights = scored("killed", die)
    assert told == [0, 1, 2, 3]
    whole, expected = scored("whole", lambda *_: None)
    assert resumed.numbers == whole.numbers
    np.testing.assert_array_equal(resumed.pooled, whole.pooled)
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


def test_ranks_change_nothing(tuned: Project) -> None:
    """Weights to 1e-5, with shares of a batch that differ; biases of keys, whose gradients are near 0, to 1e-4."""
    task = plan_task(tuned, "species", find_run(tuned, RECIPE))
    task = replace(task, settings=task.settings.model_copy(update={"epochs": 2}))
    weights, scores = {}, {}
    for count in (1, 2, 3):
        barrier, box = threading.Barrier(count, timeout=60), dict[int, Any]()
        ranks: list[Ranks] = [Together(rank, count, CPU, barrier, box) for rank in range(count)]
        own = [encoders(tuned, task)[0] for _ in ranks]
        folder = str(tuned.path.parent / f"score_{count}")
        with ThreadPoolExecutor(count) as threads:
            work = [
                threads.submit(score_encoder, tuned.root, task, e, folder, r) for e, r in zip(own, ranks, strict=True)
            ]
            scores[count] = work[-1].result()
        last = own[-1].parts
        assert last is not None
        weights[count] = last.module.state_dict()
    for count in (2, 3):
        assert scores[count].numbers == scores[1].numbers
        for name, value in weights[1].items():
            most = 1e-4 if name.endswith("qkv.bias") else 1e-5
            torch.testing.assert_close(weights[count][name], value, rtol=1e-5, atol=most, msg=f"{name}, {count}")


def test_each_epoch_shows_one_segment_and_tests_average_all(own_copy: Project) -> None:
    policy = {"frames": FRAMES, "stride": None, "fps": 4, "crop": "whole", "views": 1, "clips_per_shot": 2}
    project = tunes(own_copy, policy=policy)  # each shot has one clip, which is repeated
    task = plan_task(project, "species", find_run(project, RECIPE))
    encoder = encoders(project, task)[0]
    shown: list[int] = []

    class Listed(Streamed):
        def read(self, asked: Any, epoch: int | None = None) -> Any:
            shown.extend(n for group in asked for n in group.tolist())
            return iter(())

    with open_clips(project.root, task.trainset, task.pixels, task.rows, encoder, CPU) as clips:
        segments = OneSegment(Listed(encoder, clips, "train"), samples=50, segments=5)
        for epoch in (0, 1):
            list(segments.of([np.arange(0, 25), np.arange(25, 50)], epoch))
        tuned = Tuned(encoder, 2, seed=0)
        nn.init.normal_(tuned.head.weight, generator=torch.Generator().manual_seed(1))
        right, pooled = judge(tuned, encoder, clips, task.rows, 7, ALONE)
        once = Streamed(encoder, clips, "test").read(np.arange(0, 60, 2).reshape(2, 15))
        answers = torch.cat([tuned(given).detach() for given in once]).argmax(1)
    assert right == (answers.numpy() == per_sample(task.rows.part("test"), "label")).sum()
    assert [n // 5 for n in shown] == [*range(50), *range(50)]
    assert shown[:50] != shown[50:]
    assert set(np.array(shown) % 5) == set(range(5))
    assert pooled.shape == (7, 32)


def test_floors_have_nothing_to_train(tuned: Project) -> None:
    project = edit_project(tuned.path, lambda said: said.update(encoders={"stored": {"family": "latents"}}))
    with pytest.raises(RefusedError, match="'species' trains the encoder, and 'stored' is computed without weights"):
        plan_encoder(project, "species", "stored")
    assert probe(project, "stored").rows == 0, "all benchmarks are those that can be scored"


@pytest.mark.faults
def test_two_killed_ranks_go_on_and_learn_what_one_learns(tuned: Project) -> None:
    """Under torchrun, killed in the second encoder's training."""
    planned = plan_probes(tuned, RECIPE)
    how = ExecutionConfig(device="cpu", ranks=2)
    with trainers(prepare_probes(tuned, planned, how), subprocess.DEVNULL, subprocess.STDOUT, print) as process:
        while process.poll() is None and epochs_of(planned.folder) < 6:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
    make_probes(tuned, RECIPE, how=("device=cpu", "ranks=2"))
    told = [event["step"] for event in read_events(Path(planned.folder)) if event["kind"] == "epoch"]
    assert told == list(range(told[0], 9))
    assert told[0] > 5, "the first encoder is not trained again"
    (score,) = map(Path, planned.folders.values())
    two = json.loads((score / "score.json").read_text())["encoders"], dict(np.load(score / "features.npz"))
    (score / "score.json").unlink()
    probe(tuned)
    assert two[0] == json.loads((score / "score.json").read_text())["encoders"]
    for name, expected in np.load(score / "features.npz").items():
        np.testing.assert_allclose(two[1][name].astype(np.float32), expected.astype(np.float32), atol=2e-3)  # halves
