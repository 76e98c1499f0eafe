"""A partition of `probes` that is an encoder of corpus.yaml: scored without a training run."""

from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from assets.probes import probes
from assets.resources import ProjectResource
from assets.samples import samples
from assets.training_run import WhichRun, WhichScores
from nextvid.config.project import Project
from nextvid.making.outcome import Outcome
from tests.factories import write_project


def test_an_encoder_is_probed_and_nothing_else_is_made_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = write_project(tmp_path, {}, encoders={"colours": {"family": "pixels"}})
    asked: list[tuple[str, list[str]]] = []

    def made(project: Project, recipe: str, benchmarks: list[str], **_: Any) -> Outcome:
        asked.append((recipe, benchmarks))
        return Outcome("probes", recipe, made=True, rows=1, size_bytes=1, seconds=0.0, digest="d" * 32)

    monkeypatch.setattr("nextvid.evaluate.probes.make_probes", made)
    context, resource = dg.build_asset_context(partition_key="colours"), ProjectResource(corpus=str(project.path))
    found = probes(context, WhichScores(benchmarks=["motion"]), resource)
    assert asked == [("colours", ["motion"])]
    assert isinstance(found, dg.MaterializeResult)
    assert found.data_version == dg.DataVersion("d" * 32)
    with pytest.raises(dg.Failure, match="'colours' is no recipe but an encoder"):
        samples(dg.build_asset_context(partition_key="colours"), WhichRun(), resource)
