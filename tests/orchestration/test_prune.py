"""Old runs of Dagster: which are deleted, and that nothing which was made counts as missing afterwards."""

from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from orchestration import prune

BATCH = dg.DynamicPartitionsDefinition(name="batch")


@dg.asset(partitions_def=BATCH)
def media() -> dg.MaterializeResult:  # type: ignore[type-arg]
    return dg.MaterializeResult(data_version=dg.DataVersion("1"))


@dg.asset(deps=[media])
def trainset() -> None: ...


@dg.asset
def broken() -> None:
    raise dg.Failure("on purpose")


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.local_temp(str(tmp_path)) as found:
        found.add_dynamic_partitions("batch", ["x.000000", "x.000001", "x.000002"])
        yield found


def made(instance: dg.DagsterInstance, batch: str) -> str:
    return dg.materialize([media], partition_key=batch, instance=instance).run_id


def test_only_the_newest_run_of_each_partition_is_kept(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prune, "PAGE", 2)  # several pages of runs and of events
    again = [made(instance, "x.000000"), made(instance, "x.000000")]
    kept = [made(instance, batch) for batch in ("x.000000", "x.000001", "x.000002")]
    frozen = dg.materialize([media, trainset], selection=["trainset"], instance=instance).run_id
    failed = dg.materialize([broken], instance=instance, raise_on_error=False).run_id
    assert prune.runs_in_use(instance) == {*kept, frozen}
    assert list(prune.old_runs(instance, days=1)) == []
    old = list(prune.old_runs(instance, days=0))
    assert sorted(old) == sorted([*again, failed])
    for run in old:
        instance.delete_run(run)
    assert instance.get_materialized_partitions(media.key) == {"x.000000", "x.000001", "x.000002"}
    assert instance.get_latest_materialization_event(trainset.key)
    assert list(prune.old_runs(instance, days=0)) == []


def test_a_run_in_progress_is_kept(instance: dg.DagsterInstance) -> None:
    job = dg.Definitions([broken], jobs=[dg.define_asset_job("again")]).resolve_job_def("again")
    running = instance.create_run_for_job(job, status=dg.DagsterRunStatus.STARTED)
    assert running.run_id not in list(prune.old_runs(instance, days=0))


def test_without_yes_nothing_is_deleted(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made(instance, "x.000000")
    made(instance, "x.000000")
    monkeypatch.setattr(dg.DagsterInstance, "get", lambda: instance)
    prune.main(days=0)
    assert capsys.readouterr().out == (
        "1 runs of more than 0 days ago would be deleted; nothing is changed without --yes\n"
    )
    assert len(instance.get_runs()) == 2
    prune.main(days=0, yes=True)
    assert capsys.readouterr().out == "1 runs of more than 0 days ago deleted\n"
    assert len(instance.get_runs()) == 1
