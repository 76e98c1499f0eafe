"""One training run from mask plan to report, and what Dagster calls stale once another run was trained."""

import contextvars
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster._core.definitions.data_version import CachingStaleStatusResolver
from dagster._core.loader import LoadingContextForTest

from assets.resources import TrainerResource
from nextvid.config.overrides import as_overrides
from nextvid.config.project import Project
from nextvid.train.distributed import join
from nextvid.train.loop import train
from nextvid.train.node import PreparedRun
from nextvid.train.run import find_run, open_run
from nextvid.trainset.trainset import Trainset
from orchestration.definitions import build_defs
from storage.store import LatentStore
from storage.withdrawn import record_withdrawal
from tests.factories import copy_project, publish_trainset
from tests.nextvid.tiny_project import OVERRIDES, RECIPE, probe, write_evaluated

HOW = {"device": "cpu", "log_every_steps": 1, "diagnose_every_steps": 2, "checkpoint_every_steps": 100}
LOOKING = "probes", "samples", "report"


class TrainsHere(TrainerResource):
    """Trains and probes in the step's process; dies as often as asked before it begins."""

    project: Any = None
    deaths: Any = None

    def train(self, context: dg.AssetExecutionContext, run: PreparedRun) -> None:
        if self.deaths:
            self.deaths.pop()
            raise dg.Failure("the trainer was killed", allow_retries=False)
        if run.asset == "probes":
            probe(self.project, RECIPE, run.run_id)
            return
        opened = open_run(Path(run.folder))
        with join(opened.how) as ranks:
            train(self.project, opened, ranks)


@dataclass
class Graph:
    """The definitions over a small project, on an instance of their own."""

    project: Project
    instance: dg.DagsterInstance
    deaths: list[str]

    def defs(self) -> dg.Definitions:
        trainer = TrainsHere.model_construct(project=self.project, deaths=self.deaths)
        return build_defs(
            str(self.project.path), resources={"trainer": dg.ResourceDefinition.hardcoded_resource(trainer)}
        )

    def run(self, *assets: str, recipe: str = RECIPE, **config: Mapping[str, Any]) -> dg.ExecuteInProcessResult:
        """`experiment`, or single assets of it, in a context of its own (tests/orchestration/conftest.py)."""

        def execute() -> dg.ExecuteInProcessResult:
            return (
                self.defs()
                .resolve_job_def("experiment")
                .execute_in_process(
                    instance=self.instance,
                    partition_key=recipe,
                    asset_selection=[dg.AssetKey(asset) for asset in assets] or None,
                    run_config={"ops": {asset: {"config": values} for asset, values in config.items()}},
                    raise_on_error=False,
                )
            )

        return contextvars.Context().run(execute)

    def stale(self, *assets: str) -> dict[str, str]:
        """The status of each asset by Dagster's own resolver."""
        graph = contextvars.Context().run(self.defs().resolve_asset_graph)
        resolver = CachingStaleStatusResolver(self.instance, graph, LoadingContextForTest(self.instance))
        return {asset: resolver.get_status(dg.AssetKey(asset), RECIPE).value for asset in assets}

    def freeze_fewer(self) -> None:
        """Another trainset, with three rows fewer."""
        now = Trainset.open(self.project.root)
        store, rows = LatentStore(self.project.root, now.spec), now.lineage()
        publish_trainset(store, rows.head(rows.height - 3), now.weights, now.mean.tolist(), now.std.tolist())
        self.report_trainset()

    def report_trainset(self) -> None:
        """Materialise the newest trainset as Dagster's asset would."""
        version = {"dagster/data_version": Trainset.open(self.project.root).digest}
        self.instance.report_runless_asset_event(dg.AssetMaterialization("trainset", tags=version))


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with a run without overrides, which `latest.json` names and Dagster has never seen."""
    return write_evaluated(tmp_path_factory.mktemp("evaluated"))


@pytest.fixture
def graph(evaluated: Project, tmp_path: Path) -> Iterator[Graph]:
    """A copy of it, on an instance of its own."""
    with dg.DagsterInstance.ephemeral() as instance:
        found = Graph(copy_project(evaluated, tmp_path / "copy"), instance, [])
        found.report_trainset()
        yield found


def training(**changes: Any) -> dict[str, Any]:
    """The launchpad's configuration of `pretrain`."""
    overrides: dict[str, Any] = {"seed": 1}
    for override in OVERRIDES:
        path, value = override.split("=")
        *folders, last = path.split(".")
        inside = overrides
        for name in folders:
            inside = inside.setdefault(name, {})
        inside[last] = json.loads(value)
    return {"overrides": overrides, "how": HOW} | changes


def runs_of(result: dg.ExecuteInProcessResult) -> dict[str, str]:
    """The training run that each materialisation names."""
    assert result.success, [event.message for event in result.all_events if event.is_step_failure]
    made = [event.materialization for event in result.get_asset_materialization_events()]
    return {m.asset_key.to_user_string(): str(m.metadata["run"].value) for m in made if "run" in m.metadata}


def failure(result: dg.ExecuteInProcessResult) -> str:
    """The message of the one step that failed."""
    (data,) = [event.step_failure_data for event in result.all_events if event.is_step_failure]
    assert data.user_failure_data
    return str(data.user_failure_data.description)


def test_an_experiment_is_about_one_run_and_a_retrain_makes_what_looked_at_it_stale(graph: Graph) -> None:
    latest = find_run(graph.project, RECIPE).id
    experiment = graph.run(pretrain=training())
    (first,) = set(runs_of(experiment).values())
    assert set(runs_of(experiment)) == {"pretrain", *LOOKING}
    assert first != latest
    assert [run.run_id for run in graph.instance.get_runs(dg.RunsFilter(tags={"training_run": first}))] == [
        experiment.run_id
    ]
    record = graph.instance.get_latest_data_version_record(dg.AssetKey("pretrain"), partition_key=RECIPE)
    assert record
    assert record.event_log_entry.tags
    assert record.event_log_entry.tags["dagster/data_version"] == first
    assert set(graph.stale("pretrain", *LOOKING).values()) == {"FRESH"}

    graph.freeze_fewer()
    assert graph.stale("pretrain", *LOOKING) == {"pretrain": "STALE", **dict.fromkeys(LOOKING, "FRESH")}
    second = runs_of(graph.run("pretrain", pretrain=training()))["pretrain"]
    assert second != first
    assert graph.stale("pretrain", *LOOKING) == {"pretrain": "FRESH", **dict.fromkeys(LOOKING, "STALE")}
    for asset in LOOKING:
        assert runs_of(graph.run(asset)) == {asset: second}
    assert set(graph.stale("pretrain", *LOOKING).values()) == {"FRESH"}

    assert runs_of(graph.run("samples", samples={"run_id": first})) == {"samples": first}
    assert graph.stale("samples") == {"samples": "STALE"}, "of a run that pretrain made before"


def test_without_a_materialisation_it_is_the_latest_run_without_overrides(graph: Graph) -> None:
    assert runs_of(graph.run("samples")) == {"samples": find_run(graph.project, RECIPE).id}


def test_a_failed_run_resumes_though_the_trainset_moved(graph: Graph) -> None:
    before = Trainset.open(graph.project.root).digest
    graph.deaths.append("killed")
    assert failure(graph.run("mask_plan", "pretrain", pretrain=training())) == "the trainer was killed"
    folders = {path.parent for path in Path(graph.project.root.recipe_folder(RECIPE)).glob("*/config.json")}
    (begun,) = folders - {find_run(graph.project, RECIPE).folder}
    graph.freeze_fewer()
    relaunched = graph.run("pretrain", pretrain=training(trainset=before))
    assert runs_of(relaunched) == {"pretrain": begun.name}
    (made,) = relaunched.get_asset_materialization_events()
    assert made.materialization.tags
    assert made.materialization.tags["dagster/input_data_version/trainset"] == before
    assert open_run(begun).trainset == before
    (tagged,) = graph.instance.get_runs(dg.RunsFilter(tags={"training_run": begun.name, "trainset": before}), limit=1)
    assert tagged.run_id == relaunched.run_id
    assert "data:image/jpeg;base64," in str(made.materialization.metadata["training curves"].value)
    assert before in str(made.materialization.metadata["lineage"].value)
    assert graph.stale("pretrain") == {"pretrain": "STALE"}, "it was trained on an earlier trainset"


def test_what_does_not_fit_is_one_line(graph: Graph) -> None:
    trainset, run = Trainset.open(graph.project.root), find_run(graph.project, RECIPE).id
    assert failure(graph.run("samples", recipe="nextvid_s", samples={"run_id": run})) == (
        f"config: run {run} is of recipe demo, not of nextvid_s: choose that recipe, or another run"
    )
    assert failure(graph.run("pretrain", pretrain=training(trainset="f" * 32))) == (
        f"config: there is no trainset '{'f' * 32}': correct the digest, or leave it out for the newest"
    )
    assert failure(graph.run("probes", probes={"run_id": run, "checkpoint": 0})).startswith(
        f"upstream: run {run} has no checkpoint of step 0; there are those of "
    )
    lineage = trainset.lineage()
    record_withdrawal(graph.project.root, lineage["media_id"][0].hex(), [lineage["row_id"][0]])
    refused = failure(graph.run("mask_plan", "pretrain", pretrain=training(trainset=trainset.digest)))
    assert refused.startswith(f"refused: trainset {trainset.digest} holds row {lineage['row_id'][0].hex()}, which was")
    with pytest.raises(dg.DagsterUnknownPartitionError, match="no_such_recipe"):
        graph.run(recipe="no_such_recipe")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"overrides": {"sed": 1}}, 'unexpected config entry "sed" at path root:ops:pretrain:config:overrides'),
        ({"overrides": ["seed=1"]}, "overrides must be dict"),
        (
            {"overrides": {"stages": {"warmup": {"steps": "many"}}}},
            r"stages:'warmup':value:steps. Value \"many\" of type .* is not valid for expected type \"Int\"",
        ),
        ({"overrides": {"losses": {"target": "pixel"}}}, "target not in enum type recipe_losses_target"),
        ({"overrides": {"init": {"parts": ["coder"]}}}, "parts"),
        ({"how": {"devise": "cpu"}}, 'unexpected config entry "devise"'),
        ({"how": {"ranks": "four"}}, "ranks"),
    ],
)
def test_the_launchpad_refuses_names_and_types(config: dict[str, Any], message: str) -> None:
    job = contextvars.Context().run(lambda: build_defs().resolve_job_def("experiment"))
    with pytest.raises(dg.DagsterInvalidConfigError, match=message):
        dg.validate_run_config(job, {"ops": {"pretrain": {"config": config}}})


def test_without_options_the_launchpad_changes_nothing() -> None:
    job = contextvars.Context().run(lambda: build_defs().resolve_job_def("experiment"))
    taken: Any = dg.validate_run_config(job, {})
    assert taken["ops"]["pretrain"]["config"] == {"overrides": {}, "how": {}, "trainset": "", "repeat": 0}


def test_what_the_launchpad_takes_is_what_the_command_line_takes() -> None:
    given = training()["overrides"] | {"model": {"encoder": {"input": "pixels"}}, "losses": {"target_norm": False}}
    assert as_overrides(given | {"stages": {"warmup": {"decoder_lr": None}}}) == [
        "seed=1", "stages.warmup.decoder_lr=null", "model.encoder.input=pixels", "masks.entries=256",
        "losses.target_norm=false",
    ]  # fmt: skip
