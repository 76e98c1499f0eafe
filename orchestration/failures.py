"""The sensor `failures`: tells a webhook or a command of each run that failed for good, where corpus.yaml names one."""

import json
import os
import subprocess
import urllib.request
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from pathlib import Path

import dagster as dg

from assets.resources import ProjectResource
from assets.training_run import TAG

ANSWER_S = 10.0  # our choice: Dagster aborts a tick after 60 s


@dg.run_failure_sensor(
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Tells what `on_failure` in corpus.yaml names of each failed run; without that key it does nothing.",
)
def failures(context: dg.RunFailureSensorContext, project: ProjectResource) -> dg.SkipReason | None:
    """Send one message; where nobody takes it, the tick and its log say so in a line."""
    opened, tags = project.open(), context.dagster_run.tags
    if opened.asked.on_failure is None:
        return dg.SkipReason(f"{opened.path} names no `on_failure`")
    if tags.get("dagster/will_retry") == "true":
        return dg.SkipReason("the run is retried")
    steps = context.get_step_failure_events()
    data = steps[0].step_failure_data if steps else None
    told = data and data.user_failure_data and data.user_failure_data.description
    message = {
        "run": context.dagster_run.run_id,
        "job": context.dagster_run.job_name,
        "partition": tags.get("dagster/partition"),
        "training_run": tags.get(TAG),
        "step": steps[0].step_key if steps else None,
        "text": told or (data and data.error and data.error.message) or context.failure_event.message,
    }
    try:
        tell(opened.asked.on_failure, message, opened.path.parent)
    except (OSError, ValueError, HTTPException, subprocess.SubprocessError) as error:
        line = f"nobody was notified of run {message['run']}: {error}"
        context.log.error(line)
        return dg.SkipReason(line)
    return None


def tell(whom: str | Sequence[str], message: Mapping[str, str | None], folder: Path) -> None:
    """POST the message as JSON to a URL, or give it to a command on its stdin, run in `folder`.

    Raises OSError, ValueError, HTTPException or SubprocessError where it is not taken within ANSWER_S.
    """
    body = json.dumps(message).encode()
    if isinstance(whom, str):
        url = os.path.expandvars(whom)  # the configuration checked its scheme
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})  # noqa: S310
        with urllib.request.urlopen(request, timeout=ANSWER_S):  # noqa: S310
            return
    subprocess.run(whom, input=body, cwd=folder, timeout=ANSWER_S, check=True, capture_output=True)
