"""Batches for others: those of the trainer, resumable at any step."""

from typing import Any

import pytest
import torch

import nextvid
from nextvid.config.project import Project
from nextvid.train.batches import TrainingBatches
from nextvid.train.distributed import Ranks
from nextvid.train.loader import Batch
from storage.errors import ConfigError, RefusedError
from tests.nextvid.train.corpus import loading, make_project
from tests.nextvid.train.tiny import tiny_recipe


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return make_project(tmp_path_factory.mktemp("batches"))


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every recipe is the tiny one."""
    monkeypatch.setattr(Project, "recipe", lambda self, name: tiny_recipe(name))


def same(one: Batch, other: Batch) -> bool:
    assert one.latents is not None and other.latents is not None  # noqa: PT018
    masks = all(torch.equal(a, b) for a, b in zip(one.visible, other.visible, strict=True))
    return masks and one.draws == other.draws and torch.equal(one.latents, other.latents)


def batches(project: Project, **more: Any) -> TrainingBatches:
    return nextvid.training_batches(project.path, "tiny", **more)


@pytest.mark.parametrize("rank", [0, 1])
def test_they_are_the_trainer_s_from_any_step(project: Project, rank: int) -> None:
    ranks = Ranks(rank, 2, torch.device("cpu"))
    with loading(project, tiny_recipe(), ranks) as loader:
        wanted = list(loader.batches(0))
    mine = batches(project, rank=rank, ranks=2)
    assert len(mine) == 12
    found, states = [], []
    for batch in mine:
        found.append(batch)
        states.append(mine.state_dict())
    assert all(map(same, found, wanted))
    assert len(found) == len(wanted) == 12
    for state in (states[0], states[6], states[-1]):
        later = batches(project, rank=rank, ranks=2)
        later.load_state_dict(state)
        rest = list(later)
        assert len(rest) == 12 - state["step"]
        assert all(map(same, rest, wanted[state["step"] :]))


def test_a_reader_that_stops_goes_on_behind_its_last_batch(project: Project) -> None:
    mine = batches(project)
    assert next(iter(mine)).step == 0
    assert [batch.step for batch in mine] == list(range(1, 12))


def test_a_state_of_other_data_is_refused(project: Project) -> None:
    other = nextvid.training_batches(project.path, "tiny", ["seed=1"])
    with pytest.raises(RefusedError, match="the state is of recipe"):
        other.load_state_dict(batches(project).state_dict())


def test_a_rank_that_is_none(project: Project) -> None:
    with pytest.raises(ConfigError, match="rank 2 of 2"):
        batches(project, rank=2, ranks=2)
