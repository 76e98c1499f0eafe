"""Whom the sensor `failures` tells of a failed run, and that a webhook which does not answer holds nothing up."""

import http.server
import json
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from assets.reporting import readable_errors
from assets.resources import ProjectResource
from orchestration import failures as module
from orchestration.failures import failures
from storage.errors import ConfigError
from tests.factories import write_project

SAID = "config: there is no such thing"


@dg.op
def broken() -> None:
    with readable_errors():
        raise ConfigError("there is no such thing")


@dg.job
def breaking() -> None:
    broken()


@pytest.fixture
def posted() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The address of a webhook, and what was posted to it."""
    found: list[dict[str, Any]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            found.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", found
        server.shutdown()
        thread.join()


def tick(folder: Path, tags: dict[str, str] | None = None, **keys: object) -> dg.SkipReason | None:
    """What the sensor does about a run that failed."""
    project = write_project(folder, {"stills": {"uri": "stills"}}, **keys)
    with dg.instance_for_test() as instance:
        result = breaking.execute_in_process(instance=instance, tags=tags, raise_on_error=False)
        (failure,) = [event for event in result.all_events if event.event_type_value == "PIPELINE_FAILURE"]
        context = dg.build_run_status_sensor_context(
            "failures", failure, instance, result.dagster_run,
            resources={"project": ProjectResource(corpus=str(project.path))},
        ).for_run_failure()  # fmt: skip
        found = failures(context)
    assert found is None or isinstance(found, dg.SkipReason)
    return found


def test_without_the_key_nothing_is_told(tmp_path: Path) -> None:
    found = tick(tmp_path)
    assert found
    assert "names no `on_failure`" in str(found.skip_message)


def test_a_webhook_gets_the_first_failure(tmp_path: Path, posted: tuple[str, list[dict[str, Any]]]) -> None:
    url, messages = posted
    tags = {"dagster/partition": "demo", "training_run": "0123456789ab"}
    assert tick(tmp_path, tags, on_failure=url) is None
    (message,) = messages
    assert len(message.pop("run")) == 36
    assert message == {
        "job": "breaking", "partition": "demo", "training_run": "0123456789ab", "step": "broken", "text": SAID
    }  # fmt: skip


def test_a_run_that_is_retried_is_not_told_of(tmp_path: Path, posted: tuple[str, list[dict[str, Any]]]) -> None:
    url, messages = posted
    assert tick(tmp_path, {"dagster/will_retry": "true"}, on_failure=url)
    assert messages == []


def test_a_command_reads_it(tmp_path: Path) -> None:
    code = "import pathlib, sys; pathlib.Path('told').write_text(sys.stdin.read())"
    assert tick(tmp_path, on_failure=[sys.executable, "-c", code]) is None
    assert json.loads((tmp_path / "told").read_text())["text"] == SAID


def test_nobody_there_is_a_line_and_no_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ANSWER_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never answers
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        for whom in (
            address,
            "http://127.0.0.1:1",
            ["/no/such/command"],
            [sys.executable, "-c", "raise SystemExit(3)"],
        ):
            began = time.monotonic()
            found = tick(tmp_path, on_failure=whom)
            assert found
            assert str(found.skip_message).startswith("nobody was notified of run ")
            assert time.monotonic() - began < 60


@pytest.mark.parametrize("wrong", ["hooks.example.com", [], "ftp://example.com", 3])
def test_a_key_that_names_nobody_is_refused(tmp_path: Path, wrong: object) -> None:
    with pytest.raises(ConfigError, match="on_failure"):
        write_project(tmp_path, {"stills": {"uri": "stills"}}, on_failure=wrong)
