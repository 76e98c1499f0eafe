"""A run resumes bit for bit from any step, also after a kill; refuses what is not its own; stops when it must."""

import itertools
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import nextvid
from nextvid.config.overrides import apply_overrides
from nextvid.config.project import Project
from nextvid.config.recipe import ExecutionConfig
from nextvid.train import checkpoint, loop
from nextvid.train import step as step_module
from nextvid.train.distributed import Ranks
from nextvid.train.events import read_events
from nextvid.train.loop import train
from nextvid.train.run import Run, open_run, run_lock, write_run
from storage.errors import ConflictError, DamagedError, RefusedError
from storage.records import publish_record, read_record
from tests.factories import copy_project, flip
from tests.forked import parent_of
from tests.nextvid.train.corpus import begin, make_project, tiny_spec, write_trainset
from tests.nextvid.train.tiny import ALONE, HOW, tiny_recipe

pytestmark = pytest.mark.usefixtures("one_thread")
GOLDEN = Path(__file__).parents[2] / "golden" / "first_losses.txt"


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return make_project(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project whose run was never stopped, to be read only."""
    torch.set_num_threads(1)  # as in `one_thread`, which begins after this
    project = make_project(tmp_path_factory.mktemp("whole"))
    train(project, begin(project), ALONE)
    return project


@pytest.fixture(scope="module")
def uninterrupted(whole: Project) -> Run:
    return begin(whole)


@pytest.fixture
def trained(whole: Project, tmp_path: Path) -> tuple[Project, Run]:
    """A copy of it that a test may change."""
    project = copy_project(whole, tmp_path / "copy")
    return project, begin(project)


def tensors(run: Run, step: int) -> dict[str, torch.Tensor]:
    """Everything that a checkpoint holds."""
    path = checkpoint.path_at(run.checkpoints, step)
    names = ("model", "ema", "optimizer")
    return {
        f"{name}:{key}": value
        for name in names
        for key, value in checkpoint.load_tensors(path / f"{name}.safetensors").items()
    }


def losses(run: Run) -> list[tuple[int, dict[str, float]]]:
    """Logged losses by step."""
    return [(event["step"], event["loss"]) for event in read_events(run.folder) if event["kind"] == "step"]


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


class _Stop(Exception):  # noqa: N818 - stands for a kill
    pass


def _train_until(monkeypatch: pytest.MonkeyPatch, step: int, project: Project, run: Run) -> None:
    """One attempt that ends as a kill would, right after `step` steps were taken."""
    original = loop._Session._after_step

    def after_step(self: Any) -> None:
        original(self)
        if self.progress.step == step:
            raise _Stop

    with monkeypatch.context() as patch:
        patch.setattr(loop._Session, "_after_step", after_step)
        with pytest.raises(_Stop):
            train(project, run, ALONE)


def test_a_whole_run_leaves_what_it_promises(uninterrupted: Run) -> None:
    run = uninterrupted
    assert run.complete
    events = read_events(run.folder)
    kinds = [event["kind"] for event in events]
    assert (kinds[0], kinds[-1]) == ("start", "end")
    assert [event["name"] for event in events if event["kind"] == "stage"] == [s.name for s in run.recipe.stages]
    steps = [event for event in events if event["kind"] == "step"]
    assert [event["step"] for event in steps] == list(range(1, 13))
    assert steps[-1]["draws"] == 3 * (4 + 4 + 4 + 2)
    assert set(steps[0]["loss"]) == {"align/short", "align/long", "flow/short", "flow/long"}
    assert set(steps[0]["norm"]) == {"encoder", "predictor", "decoder"}
    assert steps[0]["lr"] == pytest.approx(2e-4)
    assert [event["step"] for event in events if event["kind"] == "diagnostics"] == [0, 5, 10, 12]
    ends = list(itertools.accumulate(stage.steps for stage in run.recipe.stages))
    assert [checkpoint.step_of(path) for path in checkpoint.complete(run.checkpoints)] == ends
    assert list((run.folder / "tensorboard").iterdir())


def test_asking_again_trains_nothing(trained: tuple[Project, Run]) -> None:
    project, run = trained
    before = tensors(run, 12)
    train(project, run, ALONE)
    assert equal(tensors(run, 12), before)
    assert [event["step"] for event in read_events(run.folder) if event["kind"] == "start"] == [0, 12]


@pytest.mark.parametrize("stopped", [1, 3, 7, 10])
def test_trap_12_resuming_is_bit_equal_to_never_having_stopped(
    project: Project, uninterrupted: Run, monkeypatch: pytest.MonkeyPatch, stopped: int
) -> None:
    often = HOW.model_copy(update={"checkpoint_every_steps": 1, "diagnose_every_steps": 4})
    resumed = begin(project, how=often)
    _train_until(monkeypatch, stopped, project, resumed)
    assert resumed.newest_step() == stopped
    train(project, resumed, ALONE)
    assert equal(tensors(resumed, 12), tensors(uninterrupted, 12))
    assert losses(resumed) == losses(uninterrupted)


def test_a_kill_between_checkpoints_loses_only_time(
    project: Project, uninterrupted: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    resumed = begin(project)
    for stopped in (5, 5, 11):  # after the checkpoint of step 3 twice, then after that of step 9
        _train_until(monkeypatch, stopped, project, resumed)
    train(project, resumed, ALONE)
    assert equal(tensors(resumed, 12), tensors(uninterrupted, 12))
    assert losses(resumed) == losses(uninterrupted)  # each step once, as the last attempt saw it


def _folder(parent: Path, name: str) -> Path:
    (parent / name).mkdir()
    return parent / name


def test_a_torn_checkpoint_is_passed_over_when_resuming(trained: tuple[Project, Run]) -> None:
    project, run = trained
    last = tensors(run, 12)
    (checkpoint.path_at(run.checkpoints, 12) / "ema.safetensors").unlink()
    assert not run.complete
    train(project, run, ALONE)
    assert run.complete
    assert equal(tensors(run, 12), last)


def test_a_damaged_checkpoint_is_not_resumed_from(trained: tuple[Project, Run]) -> None:
    project, run = trained
    path = checkpoint.path_at(run.checkpoints, 12) / "model.safetensors"
    flip(path)
    with pytest.raises(DamagedError, match="delete the folder"):
        train(project, run, ALONE)


def test_a_checkpoint_of_another_trainset_is_refused(trained: tuple[Project, Run]) -> None:
    project, run = trained
    other = write_trainset(project.root, tiny_spec(), seed=1)
    stranger = begin(project)
    assert stranger.trainset == other
    assert stranger.id != run.id
    stranger.checkpoints.parent.mkdir(exist_ok=True)
    run.checkpoints.rename(stranger.checkpoints)
    with pytest.raises(RefusedError, match=f"trainset is {run.trainset} there and {other} here"):
        train(project, stranger, ALONE)


def test_run_id_hangs_on_what_and_not_on_how(project: Project) -> None:
    run = begin(project)
    assert len(run.id) == 12
    assert begin(project, how=ExecutionConfig(threads=3, ranks=2, device="cpu")).id == run.id
    assert open_run(run.folder).how.threads == 3  # how may change between attempts
    assert begin(project, repeat=1).id != run.id
    assert begin(project, tiny_recipe().model_copy(update={"seed": 1})).id != run.id


def test_an_edited_config_is_refused(project: Project) -> None:
    run = begin(project)
    path = str(run.folder / "config.json")
    publish_record(path, read_record(path) | {"trainset": "d" * 32})
    with pytest.raises(RefusedError, match="describes another run"):
        write_run(run)


def test_two_trainers_of_one_run(project: Project) -> None:
    run = begin(project)
    with run_lock(run.folder), pytest.raises(ConflictError, match="is at work here"):
        train(project, run, ALONE)


def test_three_steps_that_are_not_finite_stop_the_run(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    run = begin(project)
    poison(monkeypatch, {4, 6, 7, 8})
    with pytest.raises(RefusedError, match="3 steps in a row had no finite gradient"):
        train(project, run, ALONE)
    events = read_events(run.folder)
    skipped = [(event["step"], event["in_a_row"]) for event in events if event["kind"] == "skipped"]
    assert skipped == [(5, 1), (7, 1), (8, 2), (9, 3)]
    assert events[-1]["kind"] == "error"
    assert "no finite gradient" in events[-1]["message"]


def test_skips_in_a_row_are_counted_across_a_resumption(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    run = replace(begin(project), how=HOW.model_copy(update={"checkpoint_every_steps": 1}))
    poison(monkeypatch, {1, 2, 3})
    _train_until(monkeypatch, 3, project, run)
    with pytest.raises(RefusedError, match="3 steps in a row"):
        train(project, run, ALONE)


GUARDED = ("optim.spikes.window=2", "optim.spikes.deviations=50", "optim.spikes.stop_after=3")


def test_steps_whose_loss_leaps_are_skipped_and_told(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    run = begin(project, apply_overrides(tiny_recipe(), GUARDED))
    poison(monkeypatch, {5, 6}, 1e4)
    train(project, run, ALONE)
    skipped = [(e["step"], e["in_a_row"], e["why"]) for e in read_events(run.folder) if e["kind"] == "skipped"]
    assert skipped == [(6, 1, "the loss leaps"), (7, 2, "the loss leaps")]
    assert run.complete


def test_a_guard_that_skips_everything_ends_the_run(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    run = begin(project, apply_overrides(tiny_recipe(), GUARDED))
    poison(monkeypatch, set(range(4, 12)), 1e4)
    with pytest.raises(RefusedError, match="3 steps in a row had a loss over the running mean by more than 50 ") as end:
        train(project, run, ALONE)
    assert "\n" not in str(end.value)


def test_the_guard_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guarded = apply_overrides(tiny_recipe(), GUARDED)
    often = HOW.model_copy(update={"checkpoint_every_steps": 1})
    whole, broken = (make_project(_folder(tmp_path, name)) for name in ("whole", "broken"))
    uninterrupted, resumed = begin(whole, guarded), begin(broken, guarded, how=often)
    poison(monkeypatch, {6}, 1e4)
    train(whole, uninterrupted, ALONE)
    _train_until(monkeypatch, 6, broken, resumed)
    train(broken, resumed, ALONE)
    assert equal(tensors(resumed, 12), tensors(uninterrupted, 12))
    states = [
        checkpoint.read_progress(checkpoint.path_at(run.checkpoints, 12)).spikes for run in (uninterrupted, resumed)
    ]
    assert states[0] == states[1]
    assert states[0] is not None
    assert states[0][0] == 11  # the loss that leaped is not counted


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int], value: float = float("inf")) -> None:
    """Make all latents of these steps `value`, by default infinite."""
    original = step_module.take_step

    def take_step(trained: Any, batch: Any, step: int, micro_batch: int) -> Any:
        if step in steps:
            batch.latents.fill_(value)
        return original(trained, batch, step, micro_batch)

    monkeypatch.setattr(step_module, "take_step", take_step)


def test_collapse_sounds_the_alarm(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = iter([20.0, 20.0, 5.9, 5.9, 6.1, 6.1, 5.0, 5.0])

    def judged(_: object) -> dict[str, float]:
        return {"feature_std": 1.0, "effective_rank": next(ranks)}

    monkeypatch.setattr(loop, "judged", judged)
    run = begin(project)
    train(project, run, ALONE)
    assert [event["step"] for event in read_events(run.folder) if event["kind"] == "alarm"] == [5, 12]
    assert checkpoint.read_progress(checkpoint.complete(run.checkpoints)[-1]).first_rank == 20.0


@pytest.mark.parametrize("alarm", ["stop", "off"])
def test_the_alarm_stops_or_is_silent(project: Project, monkeypatch: pytest.MonkeyPatch, alarm: str) -> None:
    ranks = iter([20.0, 20.0, *[5.0] * 20])
    monkeypatch.setattr(loop, "judged", lambda _: {"feature_std": 1.0, "effective_rank": next(ranks)})
    run = begin(project, how=HOW.model_copy(update={"alarm": alarm}))
    if alarm == "stop":
        with pytest.raises(RefusedError, match=r"collapsed at step 5: their effective rank is 5.0, and was 20.0"):
            train(project, run, ALONE)
    else:
        train(project, run, ALONE)
        assert not any(event["kind"] == "alarm" for event in read_events(run.folder))


def test_exported_encoder_is_the_average_and_takes_raw_latents(uninterrupted: Run) -> None:
    run = uninterrupted
    exported = nextvid.load_encoder(run.folder / "encoder")
    weights = checkpoint.load_tensors(checkpoint.path_at(run.checkpoints, 12) / "ema.safetensors")
    assert all(torch.equal(exported.encoder.state_dict()[name], value) for name, value in weights.items())
    assert not exported.training
    assert not any(parameter.requires_grad for parameter in exported.parameters())


@pytest.mark.slow
def test_killed_without_warning_and_resumed_is_bit_equal(tmp_path: Path, repository: Path) -> None:
    recipe = tiny_recipe(steps=(8, 8, 8, 8))
    often = HOW.model_copy(update={"checkpoint_every_steps": 1})
    whole, broken = (make_project(_folder(tmp_path, name)) for name in ("whole", "broken"))
    uninterrupted, killed = begin(whole, recipe), begin(broken, recipe, often)
    train(whole, uninterrupted, ALONE)
    with parent_of(repository, ["tests.nextvid.train.corpus"]) as forks:
        for wanted in (2, 9, 17):
            forks.start("tests.nextvid.train.corpus", "carry_on", str(broken.path), str(killed.folder))
            deadline = time.monotonic() + 240
            while (killed.newest_step() or 0) < wanted:
                assert time.monotonic() < deadline
                time.sleep(0.005)
            forks.kill()
            assert forks.ended() == -signal.SIGKILL
    train(broken, killed, ALONE)
    assert equal(tensors(killed, 32), tensors(uninterrupted, 32))
    assert losses(killed) == losses(uninterrupted)


def test_first_losses_are_pinned(project: Project) -> None:
    """A change of mathematics, order or initialisation shows here first; `PIN=1 pytest -k pinned` writes them anew."""
    run = begin(project, tiny_recipe(steps=(8, 6, 6, 2)))
    train(project, run, Ranks(0, 1, torch.device("cpu")))
    found = [line(values) for _, values in losses(run)[:20]]
    if os.environ.get("PIN"):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text("\n".join(["align/long align/short flow/long flow/short", *found]) + "\n")
    pinned = GOLDEN.read_text().splitlines()[1:]
    assert len(pinned) == 20
    for step, (wanted, now) in enumerate(zip(pinned, found, strict=True)):
        assert _floats(now.split()) == pytest.approx(_floats(wanted.split()), rel=1e-5), f"step {step}"


def line(values: dict[str, float]) -> str:
    """Losses of one step, sorted by name."""
    return " ".join(f"{values[name]:.8f}" for name in sorted(values))


def _floats(words: Sequence[str]) -> list[float]:
    return [float(word) for word in words]
