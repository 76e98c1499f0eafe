"""One small corpus for tests that read files."""

from pathlib import Path

import pytest

from examples.demo.write_corpus import write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo corpus of 12 videos and 8 images, seed 0; read only."""
    folder = tmp_path_factory.mktemp("demo") / "corpus"
    write_corpus(folder, videos=12, images=8)
    return folder
