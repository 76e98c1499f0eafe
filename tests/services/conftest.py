"""A live Dagster: webserver and daemon as real processes over a small project, in an instance of its own."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from examples.demo.write_corpus import write_corpus
from nextvid.corpus.project import Project, open_project

REPOSITORY = Path(__file__).resolve().parents[2]
DEMO = REPOSITORY / "examples" / "demo"
INSTANCE = "telemetry: {enabled: false}\nnux: {enabled: false}\n"


@dataclass(frozen=True)
class Live:
    """A running Dagster and the project it works on."""

    url: str
    project: Project
    environment: dict[str, str]

    def ask(self, query: str) -> dict[str, Any]:
        """One GraphQL query to the webserver."""
        answer = requests.post(f"{self.url}/graphql", json={"query": query}, timeout=30)
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()["data"]
        return found

    def command(self, *arguments: str) -> str:
        """A `dagster` command on the same instance."""
        done = subprocess.run(
            [sys.executable, "-m", "dagster", *arguments, "-m", "orchestration.definitions"],
            cwd=REPOSITORY,
            env=self.environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """`dagster dev` over eight videos and 32 images: enough for statistics; ended with its whole process group."""
    folder = tmp_path_factory.mktemp("live")
    write_corpus(folder / "data" / "corpus", videos=8, images=32)
    said = (DEMO / "corpus.yaml").read_text().replace("../../data/demo", str(folder / "data"))
    said = said.replace("quarantine_budget: 0.05", "quarantine_budget: 0.9")
    said = said.replace("autoencoder: autoencoder", f"autoencoder: {DEMO / 'autoencoder'}")
    (folder / "corpus.yaml").write_text(said)
    home = folder / "home"
    home.mkdir()
    (home / "dagster.yaml").write_text(INSTANCE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "DAGSTER_HOME": str(home), "NEXTVID_CORPUS": str(folder / "corpus.yaml")}
    with (folder / "dagster.log").open("wb") as log:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "dagster",
                "dev",
                "-m",
                "orchestration.definitions",
                "-h",
                "127.0.0.1",
                "-p",
                str(port),
            ],
            cwd=REPOSITORY,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: answers(url), 90, folder / "dagster.log")
        yield Live(url, open_project(folder / "corpus.yaml"), environment)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def answers(url: str) -> bool:
    """Whether the webserver has loaded the definitions."""
    try:
        found = requests.post(f"{url}/graphql", json={"query": "{ assetNodes { id } }"}, timeout=10).json()
    except requests.ConnectionError:
        return False
    return len(found["data"]["assetNodes"]) == 13


def wait_for(condition: Callable[[], bool], within_s: float, log: Path | None = None) -> None:
    """Ask until it holds; what the log says last is the message otherwise."""
    until = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > until:
            tail = log.read_text(errors="replace")[-3000:] if log else ""
            raise TimeoutError(f"not within {within_s:.0f} s\n{tail}")
        time.sleep(1)
