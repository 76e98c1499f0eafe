"""A partition of `probes` that is an encoder of corpus.yaml: scored without a training run."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pytest

from assets.probes import probes
from assets.resources import ProjectResource, TrainerResource
from assets.samples import samples
from assets.training_run import WhichRun, WhichScores
from nextvid.config.project import Project
from nextvid.making.outcome import Outcome
from tests.factories import write_project


def test_an_encoder_is_probed_and_nothing_else_is_made_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = write_project(tmp_path, {}, encoders={"colours": {"family": "pixels"}})
    asked: list[tuple[Any, ...]] = []

    def planned(project: Project, recipe: str, *options: Any) -> SimpleNamespace:
        asked.append((recipe, *options))
        return SimpleNamespace(missing=(), recipe=recipe)

    def finished(planned: SimpleNamespace, **told: Any) -> Outcome:
        return Outcome("probes", planned.recipe, rows=1, size_bytes=1, digest="d" * 32, **told)

    monkeypatch.setattr("nextvid.evaluate.probes.plan_probes", planned)
    monkeypatch.setattr("nextvid.evaluate.probes.finish_probes", finished)
    resource = ProjectResource(corpus=str(project.path))
    with dg.build_asset_context(partition_key="colours") as context:
        found = probes(context, WhichScores(benchmarks=["motion"]), resource, TrainerResource())
        assert asked == [("colours", None, ["motion"], None)]
        assert isinstance(found, dg.MaterializeResult)
        assert found.data_version == dg.DataVersion("d" * 32)
    with (
        dg.build_asset_context(partition_key="colours") as other,
        pytest.raises(dg.Failure, match="'colours' is no recipe but an encoder"),
    ):
        samples(other, WhichRun(), resource)
