"""Each benchmark's `--quick --json` runs as a person types it and writes the keys that benchmarks/README.md documents.

Figures are not judged here, since a busy machine would turn this red; that they are figures, is.
"""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = (
    "loader",
    "scale",
    "manifests",
    "verify",
    "curation",
    "duplicates",
    "sandbox",
    "encode",
    "features",
    "input",
    "probe",
    "attention",
    "masks",
    "roofline",
    "step",
    "batches",
    "ticks",
)


def _documented(repository: Path, name: str) -> dict[str, set[str]]:
    """Keys named in the README's section of a benchmark: of the file, and of each of its rows."""
    text = (repository / "benchmarks" / "README.md").read_text()
    section = re.split(r"^## ", text.partition(f"\n## {name}\n")[2], flags=re.MULTILINE)[0]
    lines = re.findall(r"^- `(file|rows)`: (.*)$", section, flags=re.MULTILINE)
    return {kind: set(re.findall(r"`(\w+)`", keys)) for kind, keys in lines}


@pytest.fixture(scope="module", params=BENCHMARKS)
def written(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, Any], str]:
    """(name, JSON, printed text) of one quick run."""
    path = tmp_path_factory.mktemp("benchmark") / "found.json"
    command = [sys.executable, "-m", f"benchmarks.{request.param}", "--quick", "--json", str(path)]
    if request.param == "step":
        command += ["--trace", str(path.parent / "trace.json")]
    top = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=top, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    assert request.param != "step" or "aten::" in (path.parent / "trace.json").read_text()
    return request.param, json.loads(path.read_text()), done.stdout


@pytest.mark.benchmarks
def test_writes_the_documented_keys(written: tuple[str, dict[str, Any], str], repository: Path) -> None:
    name, found, printed = written
    keys = _documented(repository, name)
    assert set(found) == keys["file"]
    assert found["benchmark"] == name
    assert found["quick"] is True
    assert found["rows"]
    for row in found["rows"]:
        assert set(row) == keys["rows"]
        numbers = [value for value in row.values() if isinstance(value, float)]
        assert numbers
        assert all(math.isfinite(value) and value >= 0 for value in numbers), row
        assert row["name"] in printed
    for target, said in found["targets"].items():
        assert target in printed
        bound = said.get("at_least")
        reached = said["measured"] >= bound if bound is not None else said["measured"] <= said["at_most"]
        assert said["met"] is reached


@pytest.mark.benchmarks
def test_no_peer_is_left_out_silently(written: tuple[str, dict[str, Any], str]) -> None:
    name, found, printed = written
    if name != "loader":
        pytest.skip("only the loader has peers")
    peers = ("Lance", "HF datasets", "mosaicml-streaming MDS", "litdata", "WebDataset")
    measured = {row["name"] for row in found["rows"]}
    absent = {peer["name"] for peer in found["absent"]}
    assert not measured & absent
    for peer in peers:
        assert any(known.startswith(peer) for known in measured | absent), peer
        assert peer in printed


def test_the_readme_documents_each(repository: Path) -> None:
    for name in BENCHMARKS:
        assert (repository / "benchmarks" / f"{name}.py").exists()
        assert set(_documented(repository, name)) == {"file", "rows"}
