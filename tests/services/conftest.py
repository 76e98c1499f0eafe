"""A live Dagster: webserver and daemon as real processes over a small project, in an instance of its own."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from examples.demo.write_corpus import write_corpus
from nextvid.config.project import Project, open_project
from tests.factories import demo_settings
from tests.nextvid.train.corpus import make_project, tiny_spec

REPOSITORY = Path(__file__).resolve().parents[2]

DEFINITIONS = "tests.services.quick_definitions"
ASSETS = 13  # sources and what follows of it
EXTRA = """
  extra: {{uri: {uri}, weight: 0.1, clips: [{{frames: 8, fps: 4, crop: whole, pad: skip}}], quarantine_budget: 0.5}}
"""  # a dataset without files so far, whose budget the demo's does not lend
LONGEST = "test_training.py", "test_live.py", "test_scaling.py"
ENDED = {"SUCCESS", "FAILURE", "CANCELED"}
LAUNCH = """mutation($params: ExecutionParams!) { launchPipelineExecution(executionParams: $params) {
  __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message }
  ... on RunConfigValidationInvalid { errors { message } } } }"""
RUNS = """{ runsOrError { ... on Runs { results {
  runId status jobName parentRunId startTime endTime tags { key value } } } } }"""
EVENTS = """query($id: ID!) { logsForRun(runId: $id) { ... on EventConnection { events {
  __typename ... on MessageEvent { message stepKey timestamp } } } } }"""
ADD = """mutation($selector: RepositorySelector!, $key: String!) { addDynamicPartition(
  repositorySelector: $selector, partitionsDefName: "batch", partitionKey: $key) { __typename } }"""
CANCEL = """mutation($id: String!) { terminateRun(runId: $id, terminatePolicy: SAFE_TERMINATE) {
  __typename ... on PythonError { message } } }"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: two workers that take a file each then end at about the same time."""
    rank = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@dataclass(frozen=True)
class Live:
    """A running Dagster and the project it works on."""

    url: str
    project: Project
    environment: dict[str, str]

    def ask(self, query: str, **variables: object) -> dict[str, Any]:
        """One GraphQL query to the webserver."""
        asked: Any = {"query": query, "variables": variables}
        answer = requests.post(f"{self.url}/graphql", json=asked, timeout=60)
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()["data"]
        return found

    def launch(
        self, asset: str, partition: str | None, config: Mapping[str, Any] | None = None, job: str = "__ASSET_JOB"
    ) -> dict[str, Any]:
        """Launch one asset as the launchpad does, or a job whose `asset` is configured; what the webserver says."""
        selector = {
            "repositoryLocationName": DEFINITIONS,
            "repositoryName": "__repository__",
            "jobName": job,
        } | ({"assetSelection": [{"path": [asset]}]} if job == "__ASSET_JOB" else {})
        params = {
            "selector": selector,
            "runConfigData": {"ops": {asset: {"config": config}}} if config else {},
            "mode": "default",
            "executionMetadata": {"tags": [{"key": "dagster/partition", "value": partition}] if partition else []},
        }
        said: dict[str, Any] = self.ask(LAUNCH, params=params)["launchPipelineExecution"]
        return said

    def runs(self) -> list[dict[str, Any]]:
        """All runs so far, newest first."""
        found: list[dict[str, Any]] = self.ask(RUNS)["runsOrError"]["results"]
        return found

    def run(self, run_id: str) -> dict[str, Any]:
        """One of them."""
        return next(run for run in self.runs() if run["runId"] == run_id)

    def ended(self, run_id: str, within_s: float) -> str:
        """How a run ended, once it did."""
        wait_for(lambda: self.run(run_id)["status"] in ENDED, within_s)
        found: str = self.run(run_id)["status"]
        return found

    def events(self, run_id: str) -> list[dict[str, Any]]:
        """The event log of a run, in order."""
        found: list[dict[str, Any]] = self.ask(EVENTS, id=run_id)["logsForRun"]["events"]
        return found

    def add_batch(self, key: str) -> None:
        """Add a partition by hand, as the sensor would."""
        selector = {"repositoryName": "__repository__", "repositoryLocationName": DEFINITIONS}
        said = self.ask(ADD, selector=selector, key=key)["addDynamicPartition"]
        assert said["__typename"] == "AddDynamicPartitionSuccess", said

    def cancel(self, run_id: str) -> None:
        """What the button "Terminate" does."""
        said = self.ask(CANCEL, id=run_id)["terminateRun"]
        assert said["__typename"] == "TerminateRunSuccess", said

    def command(self, *arguments: str) -> str:
        """A `dagster` command on the same instance."""
        done = subprocess.run(
            [sys.executable, "-m", "dagster", *arguments, "-m", DEFINITIONS],
            cwd=REPOSITORY,
            env=self.environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout


def instance_settings(path: str = "dagster.yaml") -> str:
    """An instance's file of this checkout, so that what is tested is what is used; its folders below the instance's
    home, and looking every second or two instead of every minute.
    """
    said: dict[str, Any] = yaml.safe_load((REPOSITORY / path).read_text())
    for part in ("storage", "local_artifact_storage", "compute_logs"):
        if "'base_dir': 'data" in str(said.get(part)):
            del said[part]  # by default below DAGSTER_HOME
    said["run_monitoring"] |= {"poll_interval_seconds": 2, "free_slots_after_run_end_seconds": 1}
    said["run_coordinator"]["config"] = {"dequeue_interval_seconds": 1}
    said["auto_materialize"] |= {"minimum_interval_seconds": 2}
    return yaml.safe_dump(said)


@contextmanager
def live_dagster(folder: Path, corpus: Path, settings: str, **environment: str) -> Iterator[Live]:
    """`dagster dev` over a project; ended with its whole process group."""
    home = folder / "home"
    home.mkdir()
    (home / "dagster.yaml").write_text(settings)
    variables = {
        **os.environ, "DAGSTER_HOME": str(home), "NEXTVID_CORPUS": str(corpus), "PYTHONPATH": str(REPOSITORY)
    } | environment  # fmt: skip
    port = free_port()
    command = ["-m", "dagster", "dev", "-m", DEFINITIONS, "-h", "127.0.0.1", "-p", str(port)]
    with (folder / "dagster.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=REPOSITORY,
            env=variables,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: answers(url), 300, folder / "dagster.log")
        yield Live(url, open_project(corpus), variables)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def demo_project(folder: Path, videos: int, images: int) -> Path:
    """A corpus of the demo's kind and its corpus.yaml."""
    write_corpus(folder / "data" / "corpus", videos=videos, images=images)
    (folder / "data" / "extra").mkdir()
    said = demo_settings(folder).replace("\nbenchmarks:", EXTRA.format(uri=folder / "data" / "extra") + "\nbenchmarks:")
    (folder / "corpus.yaml").write_text(said)
    return folder / "corpus.yaml"


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A live Dagster over eight videos and 32 images: enough for statistics."""
    folder = tmp_path_factory.mktemp("live")
    with live_dagster(folder, demo_project(folder, videos=8, images=32), instance_settings()) as found:
        yield found


def trainset_project(folder: Path) -> Project:
    """A project with a trainset of random latents in the demo's shape: 8 x 8 cells of 16 channels; with its lineage."""
    return make_project(folder, spec=tiny_spec(height=8, channels=16))


def free_port() -> int:
    """A port of the loopback interface that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def answers(url: str) -> bool:
    """Whether the webserver has loaded the definitions."""
    try:
        found = requests.post(f"{url}/graphql", json={"query": "{ assetNodes { id } }"}, timeout=10).json()
    except (requests.ConnectionError, requests.Timeout):
        return False
    return len(found["data"]["assetNodes"]) == ASSETS


def wait_for(condition: Callable[[], bool], within_s: float, log: Path | None = None, every_s: float = 1.0) -> None:
    """Ask until it holds; what the log says last is the message otherwise."""
    until = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > until:
            tail = log.read_text(errors="replace")[-3000:] if log else ""
            raise TimeoutError(f"not within {within_s:.0f} s\n{tail}")
        time.sleep(every_s)
