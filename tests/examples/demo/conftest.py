"""Makes `examples` importable (it is no installed package) and writes one small corpus for tests that read files."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo corpus of 12 videos and 8 images, seed 0; read only."""
    from examples.demo.write_corpus import write_corpus

    folder = tmp_path_factory.mktemp("demo") / "corpus"
    write_corpus(folder, videos=12, images=8)
    return folder
