"""Fixtures of these tests: one thread, and a launcher that knows the recipe `tiny`."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nextvid.config.recipe import RecipeConfig
from tests.nextvid.train.tiny import tiny_recipe


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Bits depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny_by_name(one_thread: None, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe `tiny`, one thread in children too, and a trainer that is found from anywhere."""

    def by_name(name: str, _: Path) -> RecipeConfig:
        assert name == "tiny"
        return tiny_recipe()

    monkeypatch.setattr("nextvid.config.project.recipe_by_name", by_name)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(repository)
