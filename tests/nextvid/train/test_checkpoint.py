"""Checkpoints come back bit for bit, belong to one run, and are whole or not there."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nextvid.config.overrides import apply_overrides
from nextvid.model.encoder import Encoder
from nextvid.model.nextvid import NExTVid
from nextvid.model.reference import reference_encoder
from nextvid.train import checkpoint
from nextvid.train.checkpoint import Identity, Progress
from nextvid.train.optim import build_optimizer
from nextvid.train.step import build_model
from storage import atomic
from storage.digest import file_sums
from storage.errors import DamagedError, RefusedError, UpstreamError
from storage.records import publish_record, read_record
from tests.factories import flip
from tests.nextvid.train.tiny import tiny_recipe

IDENTITY = Identity("0" * 12, "a" * 32, "b" * 32, "c" * 32)


def _parts(steps: int = 2, seed: int = 0) -> tuple[NExTVid, Encoder, torch.optim.AdamW]:
    recipe = tiny_recipe().model_copy(update={"seed": seed})
    model = build_model(recipe)
    reference = reference_encoder(model.encoder)
    optimizer = build_optimizer(model, recipe.optim)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
        optimizer.param_groups[0]["lr"] = 1e-3
        optimizer.step()
    return model, reference, optimizer


def _same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, b.state_dict()[name]) for name, x in a.state_dict().items())


def test_everything_comes_back_bit_for_bit(tmp_path: Path) -> None:
    model, reference, optimizer = _parts()
    progress = Progress(2, 8, 1, 17.25)
    path = checkpoint.save(tmp_path, IDENTITY, progress, model, reference, optimizer)
    other, other_reference, other_optimizer = _parts(steps=0, seed=1)
    assert not _same(model, other)
    assert checkpoint.load(path, IDENTITY, other, other_reference, other_optimizer) == progress
    assert _same(model, other)
    assert _same(reference, other_reference)
    for parameter in other.parameters():  # and the next step is the same step
        parameter.grad = torch.ones_like(parameter)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for group, other_group in zip(optimizer.param_groups, other_optimizer.param_groups, strict=True):
        group["lr"] = other_group["lr"] = 1e-3
    optimizer.step()
    other_optimizer.step()
    assert _same(model, other)


def test_before_the_first_step_there_are_no_moments(tmp_path: Path) -> None:
    model, reference, optimizer = _parts(steps=0)
    path = checkpoint.save(tmp_path, IDENTITY, Progress(0, 0), model, reference, optimizer)
    assert checkpoint.load(path, IDENTITY, *_parts(steps=0, seed=3)) == Progress(0, 0)


@pytest.mark.parametrize("field", ["run", "recipe", "trainset", "mask_plan"])
def test_refuses_another_runs_checkpoint_and_says_what_differs(tmp_path: Path, field: str) -> None:
    path = checkpoint.save(tmp_path, IDENTITY, Progress(1, 4), *_parts(1))
    wanted = replace(IDENTITY, **{field: "f" * 12})
    with pytest.raises(RefusedError, match=f"{field} is {getattr(IDENTITY, field)} there and {'f' * 12} here"):
        checkpoint.load(path, wanted, *_parts(0))


@pytest.mark.parametrize("torn", ["missing", "short", "stateless", "empty"])
def test_a_torn_folder_is_passed_over_and_written_again(tmp_path: Path, torn: str) -> None:
    old = checkpoint.save(tmp_path, IDENTITY, Progress(1, 4), *_parts(1))
    path = checkpoint.save(tmp_path, IDENTITY, Progress(2, 8), *_parts(2))
    match torn:
        case "missing":
            (path / "ema.safetensors").unlink()
        case "short":
            data = (path / "optimizer.safetensors").read_bytes()
            (path / "optimizer.safetensors").write_bytes(data[:-1])
        case "stateless":
            (path / "state.json").unlink()
        case "empty":
            shutil.rmtree(path)
            path.mkdir()
    assert checkpoint.complete(tmp_path) == [old]
    with pytest.raises(UpstreamError, match="no complete checkpoint"):
        checkpoint.load(path, IDENTITY, *_parts(0))
    assert checkpoint.save(tmp_path, IDENTITY, Progress(2, 8), *_parts(2)) == path
    assert checkpoint.complete(tmp_path) == [old, path]


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "optimizer.safetensors"])
def test_one_changed_bit_is_an_error_with_its_remedy(tmp_path: Path, name: str) -> None:
    path = checkpoint.save(tmp_path, IDENTITY, Progress(1, 4), *_parts(1))
    flip(path / name, -5)
    with pytest.raises(DamagedError, match=r"delete the folder .* resumes from the checkpoint before"):
        checkpoint.load(path, IDENTITY, *_parts(0))


def test_keeps_the_last_ones_and_ends_of_stages(tmp_path: Path) -> None:
    parts = _parts(1)
    for step in range(1, 9):
        checkpoint.save(tmp_path, IDENTITY, Progress(step, 4 * step), *parts)
    removed = checkpoint.prune(tmp_path, 2, {3, 6})
    assert [checkpoint.step_of(path) for path in removed] == [1, 2, 4, 5]
    assert [checkpoint.step_of(path) for path in checkpoint.complete(tmp_path)] == [3, 6, 7, 8]
    assert checkpoint.prune(tmp_path, 2, {3, 6}) == []


@pytest.mark.parametrize("after", ["state.json", "model.safetensors"])
def test_who_looks_while_a_run_removes_one_does_not_see_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: str
) -> None:
    """The folder goes between the listing and its state, or between the state and its other files."""
    parts = _parts()
    old, new = (checkpoint.save(tmp_path, IDENTITY, Progress(step, 4 * step), *parts) for step in (1, 2))
    read = atomic.read_json

    def removing(path: str) -> Any:
        if after == "state.json" and path.startswith(str(old)):
            shutil.rmtree(old)
        found = read(path)
        if path.startswith(str(old)):
            shutil.rmtree(old)
        return found

    monkeypatch.setattr(atomic, "read_json", removing)
    assert checkpoint.complete(tmp_path) == [new]


def test_names_that_are_no_checkpoints_are_left_alone(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, IDENTITY, Progress(1, 4), *_parts(1))
    (tmp_path / "step_final").mkdir()
    (tmp_path / "step_000000009").write_text("a file")
    assert len(checkpoint.complete(tmp_path)) == 1


def test_tensors_of_another_shape_are_named_before_any_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint.save(tmp_path, IDENTITY, Progress(1, 4), *_parts(1))
    wider = apply_overrides(tiny_recipe(), ["model.encoder.width=48", "model.encoder.depth=1"])
    model = build_model(wider)
    monkeypatch.setattr(checkpoint, "load_file", lambda _: pytest.fail("tensors were read"))
    said = r"model\.safetensors: decoder\.embed_condition\.weight is \[24, 24\] there and \[24, 48\] in the model"
    with pytest.raises(RefusedError, match=said):
        checkpoint.load(path, IDENTITY, model, reference_encoder(model.encoder))
    with pytest.raises(RefusedError, match=r": blocks\.0\.attn\.proj\.bias is \[24\] there and absent in"):
        checkpoint.fill(model, path / "ema.safetensors")


def test_hostile_bytes_execute_nothing(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, IDENTITY, Progress(1, 4), *_parts(1))
    state = read_record(str(path / "state.json"))
    evil = b"cos\nsystem\n(S'touch owned'\ntR."
    (path / "model.safetensors").write_bytes(evil)
    state["files"]["model.safetensors"] = file_sums(path / "model.safetensors")
    publish_record(str(path / "state.json"), state)
    with pytest.raises(DamagedError, match="not readable as safetensors"):
        checkpoint.load(path, IDENTITY, *_parts(0))


KILLED = """
import sys
from pathlib import Path
from nextvid.train import checkpoint
from nextvid.train.checkpoint import Progress
from tests.nextvid.train.test_checkpoint import IDENTITY, _parts

parts = _parts(1)
step = 0
while True:
    step += 1
    checkpoint.save(Path(sys.argv[1]), IDENTITY, Progress(step, 4 * step), *parts)
    checkpoint.prune(Path(sys.argv[1]), 3, ())
"""


def test_killed_while_writing_leaves_complete_checkpoints_only(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], cwd=Path(__file__).parents[3])
    deadline = time.monotonic() + 240
    while len(checkpoint.complete(tmp_path)) < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    found = checkpoint.complete(tmp_path)
    assert found
    for path in found:
        assert checkpoint.load(path, IDENTITY, *_parts(0)).step == checkpoint.step_of(path)
