"""Training from the UI: refused, started, watched, killed, resumed and cancelled, with real processes.

The trainset is of random latents, so that a run begins within seconds; everything else is as a user has it: a live
`dagster dev`, the launchpad's mutation, the queue, torchrun, the daemon that retries.
"""

import json
import os
import re
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest

from nextvid.train.events import NAME, read_events
from nextvid.trainset.trainset import Trainset
from storage.withdrawn import record_withdrawal
from tests.nextvid.train.corpus import tiny_spec, write_trainset
from tests.services.conftest import Live, instance_settings, live_dagster, trainset_project, wait_for

pytestmark = [
    pytest.mark.services,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads process states from /proc"),
]

HOW = {"device": "cpu", "log_every_steps": 1, "diagnose_every_steps": 1000000, "checkpoint_every_steps": 3}
ENDLESS = {"overrides": {"stages": {"warmup": {"steps": 1000000}}}, "how": HOW}
STAGES = {str(stage): {"steps": 1} for stage in range(4)}
SHORT = {"overrides": {"stages": STAGES, "seed": 1}, "how": HOW | {"diagnose_every_steps": 1}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A live Dagster over a trainset of the demo's shape."""
    folder = tmp_path_factory.mktemp("training")
    project = trainset_project(folder)
    with live_dagster(folder, project.path, instance_settings(), OMP_NUM_THREADS="1") as found:
        yield found


def launched(live: Live, config: dict[str, Any]) -> str:
    """Launch `pretrain` of the demo recipe; the id of the Dagster run."""
    said = live.launch("pretrain", "demo", config)
    assert said["__typename"] == "LaunchRunSuccess", said
    found: str = said["run"]["runId"]
    return found


def said(live: Live, run_id: str) -> str:
    """Every message of a run."""
    return "\n".join(event["message"] for event in live.events(run_id) if event.get("message"))


def failure(live: Live, config: dict[str, Any]) -> str:
    """Launch, wait for the failure, and what it says."""
    return failed(live, launched(live, config))


def failed(live: Live, run_id: str) -> str:
    """What the one step that failed says, once its run has ended."""
    assert live.ended(run_id, 300) == "FAILURE"
    answer = live.ask(
        """query($id: ID!) { logsForRun(runId: $id) { ... on EventConnection { events {
           ... on ExecutionStepFailureEvent { failureMetadata { description } } } } } }""",
        id=run_id,
    )
    events = answer["logsForRun"]["events"]
    (found,) = [event["failureMetadata"]["description"] for event in events if event.get("failureMetadata")]
    return str(found)


def folder_of(live: Live, run_id: str) -> Path:
    """The folder of the training run that a Dagster run is about, once its log names it."""
    wait_for(lambda: "run " in said(live, run_id) and " in /" in said(live, run_id), 300)
    match = re.search(r"run ([0-9a-f]{12}) in (/\S+)", said(live, run_id))
    assert match
    return Path(match[2])


def starts(folder: Path) -> list[dict[str, Any]]:
    """The `start` event of each attempt."""
    return [event for event in read_events(folder) if event["kind"] == "start"] if (folder / NAME).exists() else []


def attempts(folder: Path) -> list[tuple[float, float]]:
    """First and last event of each attempt at a run, in seconds of the clock."""
    found: list[tuple[float, float]] = []
    for line in (folder / NAME).read_text().splitlines():
        event = json.loads(line)
        began_s = event["time_s"] if event["kind"] == "start" else found.pop()[0]
        found.append((began_s, event["time_s"]))
    return found


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return False


def above(process: int, levels: int) -> list[int]:
    """Process ids from this one up: trainer, torchrun, step, run."""
    found = [process]
    for _ in range(levels):
        found.append(int(Path(f"/proc/{found[-1]}/stat").read_text().rpartition(")")[2].split()[1]))
    return found


def test_what_the_launchpad_refuses_is_one_clear_line(trained: Live) -> None:
    for wrong, place in (
        ({"overrides": "seed=1"}, "overrides"),
        ({"overrides": {"sed": 1}}, 'config entry "sed" at path root:ops:pretrain:config:overrides'),
        ({"overrides": {"stages": {"warmup": {"steps": "many"}}}}, "stages:'warmup':value:steps"),
        ({"how": {"device": "tpu"}}, "device"),
    ):
        refused = trained.launch("pretrain", "demo", wrong)
        assert refused["__typename"] == "RunConfigValidationInvalid"
        (problem,) = refused["errors"]
        assert place in problem["message"]
    assert trained.runs() == [], "nothing was queued"
    assert failure(trained, {"overrides": {"stages": {"warmpu": {"steps": 1}}}}) == (
        "config: override 'stages.warmpu.steps=1': there is no 'warmpu'; did you mean 'warmup'?"
    )
    assert "stages.0.steps" in failure(trained, {"overrides": {"stages": {"warmup": {"steps": -1}}}})
    assert not (Path(trained.project.root.runs_url) / "pretrain").exists(), "nothing was begun"


def test_an_experiment_on_no_recipe_is_one_clear_line(trained: Live) -> None:
    answer = trained.launch("pretrain", "no_such_recipe", job="experiment")
    assert failed(trained, answer["run"]["runId"]).startswith("config: unknown recipe 'no_such_recipe'; known recipes:")


def test_a_cancelled_run_resumes_on_its_trainset_though_that_changed(trained: Live) -> None:
    root = trained.project.root
    before = Trainset.open(root).digest
    first = launched(trained, ENDLESS)
    folder = folder_of(trained, first)
    wait_for(lambda: "step 4/" in said(trained, first), 300)
    trained.cancel(first)
    assert trained.ended(first, 300) == "CANCELED"
    write_trainset(root, tiny_spec(height=8, channels=16), seed=1)
    assert Trainset.open(root).digest != before
    again = launched(trained, ENDLESS | {"trainset": before})
    assert folder_of(trained, again) == folder
    wait_for(lambda: len(starts(folder)) == 2, 300, every_s=0.2)
    assert starts(folder)[1]["step"] >= 3
    assert ("training_run", folder.name) in {(tag["key"], tag["value"]) for tag in trained.run(again)["tags"]}
    trained.cancel(again)
    assert trained.ended(again, 300) == "CANCELED"


def test_a_run_is_watched_killed_resumed_and_cancelled(trained: Live) -> None:
    first = launched(trained, ENDLESS)
    folder = folder_of(trained, first)
    wait_for(lambda: "step 7/" in said(trained, first), 300)  # metrics arrive while it trains
    chain = above(starts(folder)[0]["process"], 3)
    trainer, _, _, worker = chain
    assert f"(pid: {worker})" in said(trained, first), "the fourth is the run's own process"

    waiting = launched(trained, SHORT)  # one pool `gpu`: it waits for the device
    wait_for(lambda: trained.run(waiting)["status"] == "QUEUED", 120)

    os.kill(trainer, signal.SIGKILL)  # a crash of the trainer is retried by the step, in the same Dagster run
    wait_for(lambda: len(starts(folder)) == 2, 300, every_s=0.2)
    resumed = starts(folder)[1]
    assert resumed["run"] == folder.name
    assert resumed["step"] >= 3
    assert trained.run(first)["status"] == "STARTED"
    # the slot was free between the two attempts: the other run may have started, then its step waits (see the end)
    assert trained.run(waiting)["status"] in ("QUEUED", "STARTED")

    step = above(resumed["process"], 3)
    wait_for(lambda: read_events(folder)[-1]["step"] >= resumed["step"] + 4, 300, every_s=0.2)
    os.kill(step[3], signal.SIGKILL)  # the run worker: nobody is left to end the group
    wait_for(lambda: not any(map(alive, step)), 60, every_s=0.1)

    wait_for(lambda: any(run["parentRunId"] == first for run in trained.runs()), 300)
    (retry,) = [run["runId"] for run in trained.runs() if run["parentRunId"] == first]
    assert folder_of(trained, retry) == folder, "the retry resumes the same run"
    wait_for(lambda: len(starts(folder)) == 3, 300, every_s=0.2)
    assert starts(folder)[2]["step"] > resumed["step"]

    group = above(starts(folder)[2]["process"], 2)
    trained.cancel(retry)
    wait_for(lambda: not any(map(alive, group[:2])), 60, every_s=0.1)  # ten seconds are our aim
    assert trained.ended(retry, 300) == "CANCELED"

    # the slots of the killed and of the cancelled run are free: what waited has its turn, and two never share a device
    assert trained.ended(waiting, 300) == "SUCCESS", said(trained, waiting)
    other = folder_of(trained, waiting)
    (turn,) = attempts(other)
    assert all(turn[1] <= began_s or ended_s <= turn[0] for began_s, ended_s in attempts(folder))


def test_one_training_waits_for_another_and_a_withdrawal_for_neither(trained: Live) -> None:
    """The table "Several at once" of docs/operations.md, where runs are involved."""
    root = trained.project.root
    write_trainset(root, tiny_spec(height=8, channels=16), seed=2)
    mine = launched(trained, ENDLESS)
    folder = folder_of(trained, mine)
    wait_for(lambda: "step 4/" in said(trained, mine), 300)
    same = launched(trained, ENDLESS)
    other = launched(trained, SHORT)
    trained.add_batch("films.000000")
    encoding = trained.launch("latents", "films.000000")["run"]["runId"]  # wants the pool `gpu` too
    plan = trained.launch("mask_plan", "demo")["run"]["runId"]  # wants no pool
    assert trained.ended(plan, 300) == "SUCCESS"
    assert {trained.run(run)["status"] for run in (same, other, encoding)} == {"QUEUED"}

    row = Trainset.open(root).lineage().filter(pl.col("frames") == 8)["row_id"][0]  # as long as the recipe's clips
    record_withdrawal(root, row.hex(), [row])
    newest = read_events(folder)[-1]["step"]
    wait_for(lambda: read_events(folder)[-1]["step"] > newest, 300, every_s=0.2)  # it trains on
    trained.cancel(mine)
    assert trained.ended(mine, 300) == "CANCELED"
    line = f"refused: trainset {Trainset.open(root).digest} holds row {row.hex()}, which was withdrawn"
    assert failed(trained, same).startswith(line)


def test_a_training_behind_fifty_batches_starts_next(trained: Live) -> None:
    write_trainset(trained.project.root, tiny_spec(height=8, channels=16), seed=3)
    trained.add_batch("waiting.000000")
    first = trained.launch("media", "waiting.000000", job="ingest")["run"]["runId"]
    with dg.DagsterInstance.from_config(trained.environment["DAGSTER_HOME"]) as instance:
        like = instance.get_run_by_id(first)
        assert like is not None
        for _ in range(50):  # as the sensor would request them, without its 0.1 s each
            instance.add_run(like._replace(run_id=str(uuid.uuid4()), status=dg.DagsterRunStatus.QUEUED))
    training = launched(trained, SHORT)
    wait_for(lambda: trained.run(training)["startTime"] is not None, 300, every_s=0.2)
    assert sum(run["status"] == "QUEUED" for run in trained.runs() if run["jobName"] == "ingest") > 40

    # from when it was queued to when it left the queue: being asked for and starting take seconds each, in which
    # batches end and the next ones leave the queue
    with dg.DagsterInstance.from_config(trained.environment["DAGSTER_HOME"]) as instance:
        (queued,) = instance.all_logs(training, of_type=dg.DagsterEventType.PIPELINE_ENQUEUED)
        left = {
            run["runId"]: entry.timestamp
            for run in trained.runs()
            for entry in instance.all_logs(run["runId"], of_type=dg.DagsterEventType.PIPELINE_STARTING)
        }
    meanwhile = [run for run, at_s in left.items() if queued.timestamp < at_s < left[training]]
    assert len(meanwhile) <= 6, "3 may run beside it: those of the look at the queue that was under way, and a margin"
