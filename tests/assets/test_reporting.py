"""An Outcome as Dagster sees it."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import dagster as dg
import polars as pl
import pytest
from PIL import Image

from assets import reporting
from assets.clips import clips
from assets.latents import latents
from assets.media import media
from assets.resources import ProjectResource
from assets.shots import shots
from benchmarks.registered import register
from nextvid.corpus.sources import update_sources
from nextvid.making.outcome import Check, Outcome
from orchestration.sensors import apply_partitions
from storage.errors import UpstreamError
from tests.factories import write_project
from tests.nextvid.corpus.small_media import write_picture
from tests.orchestration.conftest import load_defs


def outcome(**changes: object) -> Outcome:
    """A plain outcome with some fields changed."""
    values = {"asset": "media", "partition": "d.000000", "made": True, "rows": 4, "size_bytes": 10, "seconds": 2.0}
    return Outcome(**{**values, **changes})  # type: ignore[arg-type]


def test_rows_seconds_throughput_and_numbers_are_metadata() -> None:
    found = reporting.result(outcome(numbers={"video_s": 3.5}, quarantined=1)).metadata
    assert found is not None
    assert found["dagster/row_count"] == 4
    assert found["rows_per_s"] == 2.0
    assert (found["quarantined"], found["rows_made"]) == (1, 4)
    assert found["video_s"] == 3.5


@pytest.mark.parametrize(
    ("changes", "made", "rate"), [({"rows_made": 1}, 1, 0.5), ({"made": False}, 0, None), ({"rows_made": 0}, 0, None)]
)
def test_the_rate_is_of_the_rows_that_were_made(changes: dict[str, object], made: int, rate: float | None) -> None:
    found = reporting.result(outcome(**changes)).metadata or {}
    assert (found["rows_made"], found.get("rows_per_s")) == (made, rate)


def test_the_digest_is_the_data_version() -> None:
    assert reporting.result(outcome(digest="ab" * 16)).data_version == dg.DataVersion("ab" * 16)
    assert reporting.result(outcome()).data_version is None


def test_checks_carry_their_numbers_and_severity() -> None:
    checks = (Check("one", True, {"rows": 4}), Check("pixels", False, {"share": 0.5}))
    one, two = reporting.result(outcome(checks=checks)).check_results or ()
    assert (one.passed, one.severity, one.metadata["rows"].value) == (True, dg.AssetCheckSeverity.ERROR, 4)
    assert (two.passed, two.severity, two.metadata["share"].value) == (False, dg.AssetCheckSeverity.WARN, 0.5)


def test_a_picture_is_scaled_into_the_metadata_and_a_missing_one_is_left_out(tmp_path: Path) -> None:
    wide = tmp_path / "wide.png"
    Image.new("RGB", (4000, 100), (200, 30, 30)).save(wide)
    pictures = {"sheet": str(wide), "gone": str(tmp_path / "gone.png")}
    found = reporting.result(outcome(pictures=pictures)).metadata
    assert found is not None
    assert "gone" not in found
    sheet = found["sheet"]
    assert isinstance(sheet, dg.MarkdownMetadataValue)
    text = sheet.value
    assert text is not None
    assert text.startswith("![sheet](data:image/jpeg;base64,")
    assert len(text) < 20_000


def test_an_error_of_ours_is_a_failure_that_is_not_retried() -> None:
    with pytest.raises(dg.Failure, match="upstream: 'clips' has not been made") as raised, reporting.readable_errors():
        raise UpstreamError("'clips' has not been made: make it first")
    assert raised.value.allow_retries is False


def test_a_limit_of_the_machine_says_what_to_do() -> None:
    full = pytest.raises(dg.Failure, match="unwritable: /x/y cannot be written: its disk is full")
    with full, reporting.readable_errors():
        raise OSError(errno.ENOSPC, "No space left on device", "/x/y")


@pytest.mark.parametrize("cancelled", [True, False])
def test_a_cancelled_step_does_not_begin_again(cancelled: bool) -> None:
    """A signal to a run that nobody cancels is a crash: of a node that is drained."""
    begun = 0

    @dg.asset(retry_policy=dg.RetryPolicy(max_retries=2))
    def stopped(context: dg.AssetExecutionContext) -> None:
        nonlocal begun
        begun += 1
        with reporting.readable_errors():
            if cancelled:
                context.instance.report_run_canceling(context.run)
            if begun < 3:
                raise dg.DagsterExecutionInterruptedError

    with dg.DagsterInstance.ephemeral() as instance:
        found = dg.materialize([stopped], instance=instance, raise_on_error=False)
    assert (begun, found.success) == ((1, False) if cancelled else (3, True))
    if cancelled:
        (event,) = found.filter_events(lambda event: event.is_step_failure)
        assert event.step_failure_data.user_failure_data is not None
        assert "goes on from there" in str(event.step_failure_data.user_failure_data.description)


def test_an_error_of_the_program_keeps_its_trace() -> None:
    with pytest.raises(dg.Failure, match="KeyError: 'a bug'") as raised, reporting.readable_errors():
        raise KeyError("a bug")
    assert isinstance(raised.value.__cause__, KeyError)
    assert raised.value.allow_retries is False, "what raises on its data raises again: only a killed process is retried"


def test_a_preview_is_a_small_table() -> None:
    rows = [(bytes(16), "a" * 60 + ".mp4", 1.23456, None, [1, 2], list(range(9)))] * 9
    frame = pl.DataFrame(rows, ["id", "uri", "score", "reason", "few", "many"], orient="row")
    lines = reporting.preview(frame).value.splitlines()
    assert lines[0] == "| id | uri | score | reason | few | many |"
    assert lines[2] == f"| 00000000 | ...{'a' * 36}.mp4 | 1.235 |  | 1, 2 | 9 values |"
    assert len([line for line in lines if line.startswith("| 0")]) == 5
    assert lines[-1] == "9 rows in all"


@contextmanager
def context_of(partition: str) -> Iterator[dg.AssetExecutionContext]:
    """Of a step that somebody launched by hand."""
    with (
        dg.instance_for_test() as instance,
        dg.build_asset_context(instance=instance, partition_key=partition) as found,
    ):
        yield found


@pytest.mark.parametrize("asset", [media, shots, clips, latents])
def test_a_batch_that_is_not_there_is_one_clear_line(asset: dg.AssetsDefinition, tmp_path: Path) -> None:
    """As where the UI's launchpad, which does not look, is given a partition that does not exist."""
    project = register(tmp_path / "data", 1, 1)
    with context_of("pictures.000009") as context, pytest.raises(dg.Failure) as caught:
        asset(context, project=ProjectResource(corpus=str(project.path)))
    assert caught.value.description == ("config: there is no batch 'pictures.000009'; did you mean 'pictures.000000'?")


def test_the_red_check_of_a_stopped_batch_stays_red_when_another_passes(tmp_path: Path) -> None:
    write_picture(tmp_path / "good" / "0.jpg", "0")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "0.jpg").write_bytes(b"no picture")
    datasets = {name: {"uri": str(tmp_path / name), "clips": [{"frames": 1}]} for name in ("bad", "good")}
    project = write_project(tmp_path, datasets, benchmarks={})
    update_sources(project)
    with dg.instance_for_test() as instance:
        apply_partitions(instance, project)
        job = load_defs(project).resolve_implicit_global_asset_job_def()
        for batch in ("bad.000000", "good.000000"):
            job.execute_in_process(
                instance=instance, partition_key=batch, asset_selection=[dg.AssetKey("media")], raise_on_error=False
            )
        launched = instance.get_runs(dg.RunsFilter(tags={"dataset": "bad", "reason": "launched by hand"}))
        key = dg.AssetCheckKey(dg.AssetKey("media"), "quarantined_within_budget")
        found = instance.event_log_storage.get_asset_check_partition_info([key])
    assert [run.tags["dagster/partition"] for run in launched] == ["bad.000000"]
    assert {one.partition_key: one.latest_execution_status.name for one in found if one.latest_execution_status} == {
        "bad.000000": "FAILED", "good.000000": "SUCCEEDED"
    }  # fmt: skip
