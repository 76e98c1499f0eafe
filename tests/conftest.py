"""Fixtures that every package's tests share, and how hypothesis runs: few examples by default, never a deadline.

`HYPOTHESIS_PROFILE=thorough` is the long run. Seeds stay fixed, so that a red test is red for everybody.
"""

import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from storage.root import DataRoot

# Before anything imports torch, for child processes too: xdist has a worker a core, and a second thread of each only
# spins beside the other worker's.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.fsync = lambda fd: None  # tests kill processes, never the machine; what is synced when is test_atomic.py's to see

settings.register_profile(
    "default",
    deadline=None,
    max_examples=25,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.register_profile("thorough", settings.get_profile("default"), max_examples=1000, derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(autouse=True)
def _denormals() -> None:
    """Training here, in fixtures too, flushes them for the whole thread, and hypothesis then draws no floats."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)


@pytest.fixture
def data_root(tmp_path: Path) -> DataRoot:
    """An empty data root on the local file system; runs stand under it too."""
    return DataRoot.open(str(tmp_path / "root"))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout's top folder."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def real_media(pytestconfig: pytest.Config) -> Path:
    """The folder of real videos and images; a test that asks for it is skipped where there is none."""
    folder = Path(os.environ.get("NEXTVID_REALDATA", pytestconfig.rootpath / "../shared/data")).resolve()
    if not folder.is_dir():
        pytest.skip(f"no real media at {folder}; name their folder in NEXTVID_REALDATA")
    return folder
