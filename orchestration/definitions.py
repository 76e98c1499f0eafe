"""The Dagster definitions; `dagster dev` loads `defs` from here, without torch.

corpus.yaml is read by each step and by each tick of sensor and schedule, not while definitions load.
"""

import os
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import dagster as dg

from assets.compute import TRAIN_ON
from assets.resources import ProjectResource, TrainerResource
from nextvid.config.corpus import corpus_path
from nextvid.graph import GRAPH
from orchestration.executors import executor
from orchestration.failures import failures
from orchestration.jobs import JOBS, forecast_of, show
from orchestration.notices import notices
from orchestration.schedules import NIGHT, nightly_at
from orchestration.sensors import TICK_S, follow, new_sources_every


def build_defs(
    corpus: str = "",
    *,
    night: str = NIGHT,
    tick_s: int = TICK_S,
    steps: str | None = None,
    resources: Mapping[str, Any] | None = None,
) -> dg.Definitions:
    """All definitions for one corpus.yaml; empty means NEXTVID_CORPUS, else ./corpus.yaml.

    Args:
        corpus: path of corpus.yaml.
        night: cron line of the nightly schedule.
        tick_s: seconds between two listings by the sensor.
        steps: where steps run (orchestration/executors.py); None reads NEXTVID_STEPS.
        resources: replace `project` or `trainer`, or add resources.
    """
    resources = {
        "project": ProjectResource(corpus=str(corpus_path(corpus))),
        "trainer": TrainerResource(on=os.environ.get(TRAIN_ON, "")),
        **(resources or {}),
    }
    forecast = forecast_of(resources["project"])
    return dg.Definitions(
        assets=dg.load_assets_from_modules([import_module(f"assets.{asset}") for asset in GRAPH]),
        jobs=[*JOBS, show, forecast],
        schedules=[nightly_at(night)],
        sensors=[new_sources_every(tick_s, forecast), follow, failures, notices],
        executor=executor(steps),
        resources=resources,
    )


defs = build_defs()
