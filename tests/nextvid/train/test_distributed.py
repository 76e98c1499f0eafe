"""A run cut over two processes is the run of one; its checkpoints are read by either. Real torchrun, gloo, two CPUs."""

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors import safe_open
from torch.nn.utils import parameters_to_vector

from nextvid.config.project import Project
from nextvid.config.recipe import ExecutionConfig
from nextvid.features.encoder import load_encoder
from nextvid.model.reference import reference_encoder
from nextvid.train import checkpoint
from nextvid.train.async_checkpoint import AsyncCheckpoints
from nextvid.train.checkpoint import Identity
from nextvid.train.distributed import join, like, local, whole
from nextvid.train.events import Event, read_events
from nextvid.train.optim import build_optimizer
from nextvid.train.pretrain import make_pretrain
from nextvid.train.run import Run, open_run
from nextvid.train.step import build_model
from nextvid.trainset.mask_plan import make_plan
from storage.errors import DamagedError
from tests.factories import flip
from tests.nextvid.train.corpus import make_project
from tests.nextvid.train.tiny import HOW, tiny_recipe

pytestmark = pytest.mark.usefixtures("tiny_by_name")
CUT = HOW.model_copy(update={"shard": True, "ranks": 2, "keep_last": 9})
WHOLE = HOW.model_copy(update={"keep_last": 9})
MIDDLE = 6  # the end of a stage, and so a checkpoint that is kept


def trained(folder: Path, how: ExecutionConfig) -> tuple[Project, Run]:
    """A whole run."""
    folder.mkdir()
    project = make_project(folder)
    make_plan(project.root, tiny_recipe())
    outcome = make_pretrain(project, "tiny", how=how)
    assert outcome.passed
    return project, open_run(Path(project.root.run("tiny", str(outcome.run))))


def resumed(project: Project, run: Run, how: ExecutionConfig) -> Run:
    """The same run from its checkpoint in the middle, carried out differently."""
    for path in checkpoint.complete(run.checkpoints):
        if checkpoint.step_of(path) > MIDDLE:
            shutil.rmtree(path)
    for name in ("encoder", "encoder_online"):
        shutil.rmtree(run.folder / name)
    outcome = make_pretrain(project, "tiny", how=how)
    assert outcome.made
    assert outcome.run == run.id
    return open_run(run.folder)


def steps_of(run: Run) -> list[Event]:
    return [event for event in read_events(run.folder) if event["kind"] == "step"]


def assert_same(found: Run, wanted: Run) -> None:
    """Losses and norms step by step, and what comes out; sums are taken in another order."""
    assert len(steps_of(found)) == len(steps_of(wanted)) == 12
    for a, b in zip(steps_of(found), steps_of(wanted), strict=True):
        assert a["draws"] == b["draws"]
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-4)
        assert a["norm"] == pytest.approx(b["norm"], rel=1e-2)
    for name in ("encoder", "encoder_online"):
        one, other = (parameters_to_vector(load_encoder(run.folder / name).parameters()) for run in (found, wanted))
        # all together: biases of keys have no gradient but noise, which AdamW makes as large as any
        assert float((one - other).norm() / other.norm()) < 1e-3


@pytest.mark.services
def test_a_cut_run_is_the_whole_one_and_each_resumes_the_other(tmp_path: Path) -> None:
    project, plain = trained(tmp_path / "plain", WHOLE)
    other, cut = trained(tmp_path / "cut", CUT)
    assert cut.id == plain.id
    assert_same(cut, plain)
    assert read_events(cut.folder)[0]["ranks"] == 2
    _assert_files(cut)
    _assert_read_by_one(cut)
    assert_same(resumed(other, cut, WHOLE), plain)
    assert_same(resumed(project, plain, CUT), cut)


# Largest relative differences. bf16 has 8 bits: one rounding is 4e-3, and sums over clips are rounded apart.
BOUNDS = {"fp32": (1e-5, 1e-4, 1e-4), "bf16": (5e-3, 2e-2, 1e-3)}


@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize(
    "blocks",
    [pytest.param("plain", marks=pytest.mark.services), pytest.param("compiled", marks=pytest.mark.faults)],
)
def test_a_cut_step_with_recomputed_and_compiled_blocks_is_the_plain_step(precision: str, blocks: str) -> None:
    """In processes without the checks of array shapes at run time, which dynamo cannot trace."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "tests.nextvid.train.fsdp", precision, blocks]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for name, bound in zip(("losses", "gradients", "weights"), BOUNDS[precision], strict=True):
        assert found[name] < bound, found


def _assert_files(run: Run) -> None:
    """One safetensors file a rank and a state, nothing else; each rank's file holds about half."""
    for path in checkpoint.complete(run.checkpoints):
        files = sorted(file.name for file in path.iterdir())
        assert files[-1] == "state.json"
        assert [name.partition("-model")[0] for name in files[:-1]] == ["shard-00001", "shard-00002"]
        sizes = [(path / name).stat().st_size for name in files[:-1]]
        assert max(sizes) < 0.7 * sum(sizes)
    with safe_open(path / files[0], framework="pt") as file:
        name = "model/encoder.embed.weight"
        assert file.get_slice(name).get_shape() == [12, 8]  # half of 24 rows


def _assert_read_by_one(run: Run) -> None:
    """This process has no group: the last checkpoint is the exported encoders, moments and all."""
    model = build_model(run.recipe)
    reference, optimizer = reference_encoder(model.encoder), build_optimizer(model, run.recipe.optim)
    last = checkpoint.complete(run.checkpoints)[-1]
    assert checkpoint.load(last, run.identity, model, reference, optimizer).step == 12
    exported = load_encoder(run.folder / "encoder").encoder.state_dict()
    assert all(torch.equal(value, exported[name]) for name, value in reference.state_dict().items())
    assert all(float(state["step"]) == 12 for state in optimizer.state.values())
    assert all(state["exp_avg_sq"].any() for state in optimizer.state.values())
    damaged = next(last.glob("shard-00002*"))
    flip(damaged)
    with pytest.raises(DamagedError, match="bytes differ"):
        checkpoint.load(last, run.identity, model, reference, optimizer)
    flip(damaged)  # as it was


def test_tensors_that_are_not_cut_are_themselves() -> None:
    tensor = torch.randn(3)
    assert local(tensor) is tensor
    assert whole(tensor) is tensor
    assert torch.equal(like(tensor.clone(), tensor), tensor)


@pytest.mark.parametrize(("nodes", "limit"), [(1, None), (2, timedelta(seconds=7))])
def test_every_group_waits_as_long_as_how_says(
    nodes: int, limit: timedelta | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    joined, made = Mock(), Mock()
    monkeypatch.setattr(torch.distributed, "init_process_group", joined)
    monkeypatch.setattr(torch.distributed, "new_group", made)
    how = ExecutionConfig(device="cpu", ranks=2, nodes=nodes, timeout_s=7)
    with join(how) as ranks, ThreadPoolExecutor() as thread:
        AsyncCheckpoints(ranks, Identity("r", "d", "t", "m"), thread, cut=True)
    assert [call.kwargs["timeout"] for call in (joined.call_args, made.call_args)] == [limit, limit]
