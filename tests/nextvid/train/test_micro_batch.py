"""Micro-batches are as many clips as fit, are halved when memory ends, and change nothing that is trained."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nextvid.config.recipe import ExecutionConfig
from nextvid.model.nextvid import NExTVid
from nextvid.train import micro_batch
from nextvid.train.events import read_events
from nextvid.train.loop import train
from nextvid.train.micro_batch import MicroBatches
from storage.errors import RefusedError
from tests.nextvid.train.corpus import begin, make_project
from tests.nextvid.train.tiny import ALONE, HOW, tiny_recipe

pytestmark = pytest.mark.usefixtures("one_thread")


def out_of_memory_above(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let forwards of more clips than `most` fail as torch does on a GPU."""
    original = NExTVid.forward

    def forward(self: NExTVid, tokens: torch.Tensor, *args: Any) -> Any:
        if len(tokens) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines")
        return original(self, tokens, *args)

    monkeypatch.setattr(NExTVid, "forward", forward)


def test_a_first_step_halves_until_it_fits_and_trains_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("whole", "halved"):
        (tmp_path / name).mkdir()
    whole, halved = (make_project(tmp_path / name) for name in ("whole", "halved"))
    expected, found = begin(whole), begin(halved)
    train(whole, expected, ALONE)
    out_of_memory_above(1, monkeypatch)
    train(halved, found, ALONE)
    told = [event for event in read_events(found.folder) if event["kind"] == "micro_batch"]
    assert [(event["step"], event["clips"], event["out_of_memory_at"]) for event in told] == [
        (0, 1, 4),
        (3, 1, 4),
        (6, 1, 4),
        (9, 1, 2),
    ]
    assert not any(event["kind"] == "micro_batch" for event in read_events(expected.folder))
    logged = [
        [event["loss"] for event in read_events(run.folder) if event["kind"] == "step"] for run in (expected, found)
    ]
    for ours, theirs in zip(*logged, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)  # weights may not: AdamW amplifies what should be 0


def test_what_cannot_be_halved_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = make_project(tmp_path)
    out_of_memory_above(0, monkeypatch)
    with pytest.raises(
        RefusedError, match=r"micro-batch of 1 .4 frames a clip. ran out of memory on cpu .*GiB"
    ) as refused:
        train(project, begin(project), ALONE)
    assert "\n" not in str(refused.value)
    asked = begin(project, how=HOW.model_copy(update={"micro_batch": 2}), repeat=1)
    with pytest.raises(RefusedError, match=r"micro-batch of 2 .* add --how micro_batch=auto"):
        train(project, asked, ALONE)


def test_a_clip_that_no_micro_batch_makes_fit_is_refused_before_anything_is_allocated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = make_project(tmp_path)
    run = begin(project)
    with monkeypatch.context() as patch:
        patch.setattr(micro_batch, "device_bytes", lambda _: 2 << 30)
        patch.setattr("nextvid.train.loop.build", None)
        with pytest.raises(RefusedError, match=r"stage warmup: one clip of 4 frames needs .* which has 2.0 GiB"):
            train(project, run, ALONE)
    train(project, run, ALONE)
    assert run.complete


@pytest.mark.parametrize(("asked", "expected"), [("auto", [4, 4, 4, 2]), (0, [4, 4, 4, 2]), (2, [2, 2, 2, 2])])
def test_the_micro_batch_of_each_stage(asked: int | str, expected: list[int]) -> None:
    how = ExecutionConfig.model_validate({"micro_batch": asked})
    found = MicroBatches(tiny_recipe(), how, ALONE)
    assert [found[stage] for stage in range(4)] == expected
